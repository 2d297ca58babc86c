/* Answers a conversation and says what it took.
 *
 *     cc chat.c $(pkg-config --cflags --libs qwen2) -o chat && ./chat MODEL "What comes after Monday?" */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "qwen2.h"

/* Ends the program with the library's own words. */
static void check(qwen2_status status, qwen2_error **error) {
    if (status == QWEN2_OK)
        return;
    const char *help = qwen2_error_help(*error);
    fprintf(stderr, "%s\n%s%s\n", qwen2_error_message(*error), help ? "help: " : "", help ? help : "");
    exit(1);
}

static int32_t show_progress(uint64_t done, uint64_t total, void *user_data) {
    fprintf((FILE *)user_data, "\rloading: %3.0f %%", total ? 100.0 * (double)done / (double)total : 100.0);
    return 0; /* go on */
}

static void add(qwen2_prompt *prompt, const char *role, const char *content) {
    qwen2_error *error = NULL;
    check(qwen2_prompt_add_message(prompt, role, QWEN2_NUL_TERMINATED, content, QWEN2_NUL_TERMINATED, &error), &error);
}

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : "examples/demo-model";
    const char *question = argc > 2 ? argv[2] : "What comes after Monday?";
    qwen2_error *error = NULL;

    qwen2_load_options *load = qwen2_load_options_new();
    qwen2_load_options_set_progress(load, show_progress, stderr);
    qwen2_model *model = NULL;
    check(qwen2_model_load(directory, QWEN2_NUL_TERMINATED, load, &model, &error), &error);
    fputc('\n', stderr);

    qwen2_prompt *prompt = qwen2_prompt_new();
    add(prompt, "system", "You are a helpful assistant.");
    add(prompt, "user", question);

    qwen2_options *options = qwen2_options_new();
    qwen2_options_set_max_new_tokens(options, 32);
    qwen2_options_set_temperature(options, 0.0f);

    qwen2_generation *answer = NULL;
    check(qwen2_generate(model, prompt, options, &answer, &error), &error);
    puts(qwen2_generation_text(answer, NULL));
    fprintf(stderr, "%" PRIu64 " tokens read, %" PRIu64 " written, %.0f tokens/s\n",
            qwen2_generation_prompt_tokens(answer), qwen2_generation_completion_tokens(answer),
            qwen2_generation_decode_tokens_per_s(answer));

    qwen2_generation_free(answer);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
    qwen2_model_free(model);
    qwen2_load_options_free(load);
    return 0;
}
