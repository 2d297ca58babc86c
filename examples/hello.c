/* Loads a model and completes a text.
 *
 *     cc hello.c $(pkg-config --cflags --libs qwen2) -o hello && ./hello MODEL */
#include <stdio.h>

#include "qwen2.h"

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : "examples/demo-model";
    qwen2_error *error = NULL;
    qwen2_model *model = NULL;
    qwen2_generation *answer = NULL;
    qwen2_prompt *prompt = qwen2_prompt_new();

    qwen2_status status = qwen2_model_load(directory, QWEN2_NUL_TERMINATED, NULL, &model, &error);
    if (status == QWEN2_OK)
        status = qwen2_prompt_add_message(prompt, "user", QWEN2_NUL_TERMINATED, "What is 2 + 3?",
                                          QWEN2_NUL_TERMINATED, &error);
    if (status == QWEN2_OK)
        status = qwen2_generate(model, prompt, NULL, &answer, &error);

    if (status == QWEN2_OK)
        puts(qwen2_generation_text(answer, NULL));
    else
        fprintf(stderr, "%s\n", qwen2_error_message(error));

    qwen2_generation_free(answer);
    qwen2_prompt_free(prompt);
    qwen2_model_free(model);
    qwen2_error_free(error);
    return status != QWEN2_OK;
}
