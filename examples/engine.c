/* Answers several questions at once; a callback hears each answer as it comes.
 *
 *     cc engine.c $(pkg-config --cflags --libs qwen2) -o engine && ./engine MODEL */
#include <stdio.h>
#include <stdlib.h>

#include "qwen2.h"

#define N_QUESTIONS 3

static const char *const questions[N_QUESTIONS] = {"Count from 3 to 9.", "What is 2 plus 3?",
                                                   "What day comes after Monday?"};

static void check(qwen2_status status, qwen2_error **error) {
    if (status == QWEN2_OK)
        return;
    fprintf(stderr, "%s\n", qwen2_error_message(*error));
    exit(1);
}

/* On the engine's thread, one call at a time: pieces, then the end. */
static int32_t on_piece(qwen2_request *request, qwen2_status status, const char *text, size_t len, void *question) {
    (void)request;
    if (status == QWEN2_OK && len > 0)
        printf("%d: %s\n", *(const int *)question, text);
    return 0; /* anything else ends this request */
}

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : "examples/demo-model";
    qwen2_error *error = NULL;
    qwen2_model *model = NULL;
    check(qwen2_model_load(directory, QWEN2_NUL_TERMINATED, NULL, &model, &error), &error);
    qwen2_engine *engine = NULL;
    check(qwen2_engine_new(model, NULL, &engine, &error), &error);

    qwen2_options *options = qwen2_options_new_greedy();
    qwen2_options_set_max_new_tokens(options, 32);
    qwen2_request *requests[N_QUESTIONS];
    int numbers[N_QUESTIONS];
    for (int i = 0; i < N_QUESTIONS; i++) {
        qwen2_prompt *prompt = qwen2_prompt_new();
        check(qwen2_prompt_add_message(prompt, "user", QWEN2_NUL_TERMINATED, questions[i], QWEN2_NUL_TERMINATED,
                                       &error),
              &error);
        numbers[i] = i;
        check(qwen2_engine_submit_callback(engine, prompt, options, 0, NULL, on_piece, &numbers[i], &requests[i],
                                           &error),
              &error);
        qwen2_prompt_free(prompt);
    }
    for (int i = 0; i < N_QUESTIONS; i++) {
        qwen2_generation *answer = NULL;
        check(qwen2_request_finish(requests[i], &answer, &error), &error);
        printf("%s %s\n", questions[i], qwen2_generation_text(answer, NULL));
        qwen2_generation_free(answer);
        qwen2_request_free(requests[i]);
    }
    uint64_t stats[QWEN2_N_STATS] = {0};
    qwen2_engine_stats(engine, stats, QWEN2_N_STATS);
    printf("%llu tokens in %llu steps\n", (unsigned long long)stats[QWEN2_STATS_COMPLETION_TOKENS],
           (unsigned long long)stats[QWEN2_STATS_STEPS]);

    qwen2_options_free(options);
    qwen2_engine_free(engine);
    qwen2_model_free(model);
    return 0;
}
