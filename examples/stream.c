/* Prints an answer as it comes; Ctrl-C ends the answer, not the program.
 *
 *     cc stream.c $(pkg-config --cflags --libs qwen2) -o stream && ./stream MODEL "Count from 3 to 9." */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "qwen2.h"

static qwen2_cancel *interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    qwen2_cancel_now(interrupted); /* one atomic store: safe here */
}

static void check(qwen2_status status, qwen2_error **error) {
    if (status == QWEN2_OK || status == QWEN2_DONE)
        return;
    fprintf(stderr, "%s\n", qwen2_error_message(*error));
    exit(1);
}

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : "examples/demo-model";
    const char *question = argc > 2 ? argv[2] : "Count from 3 to 9.";
    qwen2_error *error = NULL;

    qwen2_model *model = NULL;
    check(qwen2_model_load(directory, QWEN2_NUL_TERMINATED, NULL, &model, &error), &error);
    qwen2_prompt *prompt = qwen2_prompt_new();
    check(qwen2_prompt_add_message(prompt, "user", QWEN2_NUL_TERMINATED, question, QWEN2_NUL_TERMINATED, &error),
          &error);

    interrupted = qwen2_cancel_new();
    signal(SIGINT, on_interrupt);
    qwen2_options *options = qwen2_options_new();
    qwen2_options_set_max_new_tokens(options, 64);
    qwen2_options_set_cancel(options, interrupted);

    qwen2_stream *stream = NULL;
    check(qwen2_stream_new(model, prompt, options, &stream, &error), &error);
    const char *piece = NULL;
    size_t len = 0;
    qwen2_status status;
    while ((status = qwen2_stream_next(stream, &piece, &len, &error)) == QWEN2_OK) {
        fwrite(piece, 1, len, stdout);
        fflush(stdout);
    }
    check(status, &error);
    putchar('\n');

    qwen2_generation *answer = NULL;
    check(qwen2_stream_finish(stream, &answer, &error), &error);
    if (qwen2_generation_finish_reason(answer) == QWEN2_FINISH_CANCELLED)
        fputs("interrupted\n", stderr);

    qwen2_generation_free(answer);
    qwen2_stream_free(stream);
    qwen2_options_free(options);
    qwen2_cancel_free(interrupted);
    qwen2_prompt_free(prompt);
    qwen2_model_free(model);
    return 0;
}
