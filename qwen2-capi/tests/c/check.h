/* What the test programs share: checks that end the program, and short ways to prompts and options. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qwen2.h"

#define NUL QWEN2_NUL_TERMINATED

#define CHECK(condition)                                                                            \
    do {                                                                                            \
        if (!(condition)) {                                                                         \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                         \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)

/* The call succeeds; `error` is a variable of the caller's. */
#define OK(call)                                                                                    \
    do {                                                                                            \
        const qwen2_status status_ = (call);                                                        \
        if (status_ != QWEN2_OK || error != NULL) {                                                 \
            fprintf(stderr, "%s:%d: %d %s\n", __FILE__, __LINE__, status_, qwen2_error_message(error)); \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)

/* The call fails with this status, and its error is about this key; NULL: about none. */
#define FAILS(call, status, key) check_failure(__FILE__, __LINE__, (call), (status), (key), &error)

static inline void check_failure(const char *file, int line, qwen2_status got, qwen2_status want, const char *key,
                                 qwen2_error **error) {
    const char *found = qwen2_error_key(*error);
    const int same_key = key == NULL ? found == NULL : found != NULL && strcmp(found, key) == 0;
    if (got != want || *error == NULL || qwen2_error_code(*error) != want || !same_key) {
        fprintf(stderr, "%s:%d: %d %s\n", file, line, got, qwen2_error_message(*error));
        exit(1);
    }
    qwen2_error_free(*error);
    *error = NULL;
}

static inline qwen2_prompt *message(const char *content) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = qwen2_prompt_new();
    OK(qwen2_prompt_add_message(prompt, "user", NUL, content, NUL, &error));
    return prompt;
}

/* Greedy options for as many tokens, beyond the end token too. */
static inline qwen2_options *greedy(size_t max_new_tokens) {
    qwen2_options *options = qwen2_options_new_greedy();
    qwen2_options_set_max_new_tokens(options, max_new_tokens);
    qwen2_options_set_ignore_eos(options, 1);
    return options;
}

static inline qwen2_model *load(const char *directory) {
    qwen2_error *error = NULL;
    qwen2_model *model = NULL;
    OK(qwen2_model_load(directory, NUL, NULL, &model, &error));
    return model;
}

#endif
