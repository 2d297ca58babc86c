/* A conversation of two turns: the second one only reads what is new.
 *
 *     cc session.c $(pkg-config --cflags --libs qwen2) -o session && ./session MODEL */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "qwen2.h"

static void check(qwen2_status status, qwen2_error **error) {
    if (status == QWEN2_OK)
        return;
    fprintf(stderr, "%s\n", qwen2_error_message(*error));
    exit(1);
}

static void ask(qwen2_session *session, const char *question) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = qwen2_prompt_new();
    check(qwen2_prompt_add_message(prompt, "user", QWEN2_NUL_TERMINATED, question, QWEN2_NUL_TERMINATED, &error),
          &error);
    check(qwen2_session_append(session, prompt, &error), &error);

    qwen2_options *options = qwen2_options_new_greedy();
    qwen2_options_set_max_new_tokens(options, 16);
    qwen2_generation *answer = NULL;
    check(qwen2_session_generate(session, options, &answer, &error), &error);
    printf("> %s\n%s\n", question, qwen2_generation_text(answer, NULL));
    printf("(%" PRIu64 " of %" PRIu64 " tokens were read before)\n", qwen2_generation_cached_tokens(answer),
           qwen2_generation_prompt_tokens(answer));

    qwen2_generation_free(answer);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : "examples/demo-model";
    qwen2_error *error = NULL;
    qwen2_model *model = NULL;
    check(qwen2_model_load(directory, QWEN2_NUL_TERMINATED, NULL, &model, &error), &error);
    qwen2_session *session = NULL;
    check(qwen2_session_new(model, &session, &error), &error);
    qwen2_model_free(model); /* the session keeps the weights */

    ask(session, "What is 2 + 3?");
    ask(session, "What is 7 - 4?");

    qwen2_session_free(session);
    return 0;
}
