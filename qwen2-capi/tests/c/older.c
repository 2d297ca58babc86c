/* A program of an older header, with today's library and the model in argv[1]: uses only what that header has. */
#include "check.h"

static int32_t on_progress(uint64_t done, uint64_t total, void *user_data) {
    *(int *)user_data += done <= total;
    return 0;
}

static void answers(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(6);
    qwen2_options_set_seed(options, 1);
    OK(qwen2_options_add_stop(options, "\n\n\n", NUL, &error));
    qwen2_generation *whole = NULL, *streamed = NULL, *said = NULL;
    OK(qwen2_generate(model, prompt, options, &whole, &error));
    CHECK(qwen2_generation_completion_tokens(whole) == 6);
    CHECK(qwen2_generation_finish_reason(whole) == QWEN2_FINISH_LENGTH);

    qwen2_stream *stream = NULL;
    OK(qwen2_stream_new(model, prompt, options, &stream, &error));
    const char *piece = NULL;
    size_t len = 0;
    OK(qwen2_stream_next(stream, &piece, &len, &error));
    CHECK(strlen(piece) == len);
    OK(qwen2_stream_finish(stream, &streamed, &error));
    CHECK(strcmp(qwen2_generation_text(streamed, NULL), qwen2_generation_text(whole, NULL)) == 0);
    CHECK(qwen2_stream_next(stream, &piece, &len, &error) == QWEN2_DONE);

    qwen2_session *session = NULL;
    OK(qwen2_session_new(model, &session, &error));
    OK(qwen2_session_append(session, prompt, &error));
    OK(qwen2_session_generate(session, options, &said, &error));
    CHECK(strcmp(qwen2_generation_text(said, NULL), qwen2_generation_text(whole, NULL)) == 0);

    qwen2_options_set_temperature(options, -1.0f);
    qwen2_generation *none = NULL;
    FAILS(qwen2_generate(model, prompt, options, &none, &error), QWEN2_ERROR_INVALID_ARGUMENT, "temperature");
    CHECK(none == NULL);
    qwen2_generation_free(whole);
    qwen2_generation_free(streamed);
    qwen2_generation_free(said);
    qwen2_session_free(session);
    qwen2_stream_free(stream);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

static void texts(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_tokenizer *tokenizer = qwen2_model_tokenizer(model);
    qwen2_tokens *tokens = NULL;
    qwen2_text *text = NULL;
    size_t n = 0;
    OK(qwen2_tokenizer_encode(tokenizer, "a b", 3, &tokens, &error));
    const uint32_t *ids = qwen2_tokens_data(tokens, &n);
    OK(qwen2_tokenizer_decode(tokenizer, ids, n, 1, &text, &error));
    CHECK(strcmp(qwen2_text_data(text, NULL), "a b") == 0);
    qwen2_logits *logits = NULL;
    size_t rows = 0, columns = 0;
    OK(qwen2_model_logits(model, ids, n, &logits, &error));
    CHECK(qwen2_logits_data(logits, &rows, &columns) != NULL);
    CHECK(rows == n && columns == qwen2_model_vocab_size(model));
    qwen2_logits_free(logits);
    qwen2_text_free(text);
    qwen2_tokens_free(tokens);
    qwen2_tokenizer_free(tokenizer);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    CHECK(qwen2_abi_version() == QWEN2_ABI_VERSION);
    qwen2_error *error = NULL;
    qwen2_model *model = NULL;
    int calls = 0;
    qwen2_load_options *options = qwen2_load_options_new();
    OK(qwen2_load_options_set_device(options, "cpu", NUL, &error));
    qwen2_load_options_set_threads(options, 1);
    qwen2_load_options_set_progress(options, on_progress, &calls);
    OK(qwen2_model_load(argv[1], NUL, options, &model, &error));
    CHECK(calls > 0 && qwen2_model_threads(model) == 1);
    qwen2_load_options_free(options);
    answers(model);
    texts(model);
    qwen2_model_free(model);
    puts("older: all well");
    return 0;
}
