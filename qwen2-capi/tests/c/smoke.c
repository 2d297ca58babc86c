/* Every promise of the header, on the model in argv[1]. Is C11 and C++17. */
#include <pthread.h>

#include "check.h"

/* The call fails with this status and this message, and leaves its outputs alone. */
#define FAILS_WITH(call, status, message) expect_failure(__LINE__, (call), (status), (message), &error)

static void expect_failure(int line, qwen2_status got, qwen2_status want, const char *message, qwen2_error **error) {
    if (got != want || *error == NULL || strcmp(qwen2_error_message(*error), message) != 0) {
        fprintf(stderr, "smoke.c:%d:\n  got  %d %s\n  want %d %s\n", line, got, qwen2_error_message(*error), want,
                message);
        exit(1);
    }
    CHECK(qwen2_error_code(*error) == want);
    qwen2_error_free(*error);
    *error = NULL;
}

typedef struct {
    int calls;
    int stop_at;
    uint64_t done, total;
} Loading;

static int32_t on_progress(uint64_t done, uint64_t total, void *user_data) {
    Loading *loading = (Loading *)user_data;
    loading->calls += 1;
    loading->done = done;
    loading->total = total;
    return loading->calls == loading->stop_at;
}

static void versions(void) {
    CHECK(qwen2_abi_version() == QWEN2_ABI_VERSION);
    CHECK(strchr(qwen2_version(), '.') != NULL);
    CHECK(strstr(qwen2_devices(), "cpu") != NULL);
    CHECK(strcmp(qwen2_status_name(QWEN2_ERROR_CONTEXT_OVERFLOW), "context_overflow") == 0);
    CHECK(strcmp(qwen2_status_name(QWEN2_DONE), "done") == 0);
    CHECK(strcmp(qwen2_status_name(-77), "unknown") == 0);
}

static qwen2_model *load_and_look(const char *directory) {
    qwen2_error *error = NULL;
    Loading loading = {0, 0, 0, 0};
    qwen2_load_options *options = qwen2_load_options_new();
    OK(qwen2_load_options_set_device(options, "cpu", 3, &error));
    qwen2_load_options_set_threads(options, 2);
    qwen2_load_options_set_context_length(options, 96);
    qwen2_load_options_set_progress(options, on_progress, &loading);

    qwen2_model *model = NULL;
    OK(qwen2_model_load(directory, NUL, options, &model, &error));
    CHECK(loading.calls > 1 && loading.done == loading.total && loading.total > 1000);
    CHECK(strcmp(qwen2_model_device(model), "cpu") == 0);
    CHECK(qwen2_model_threads(model) == 2 && qwen2_model_context_length(model) == 96);
    CHECK(qwen2_model_parameter_count(model) > 1000 && qwen2_model_weight_bytes(model) > 1000);
    CHECK(qwen2_model_hidden_size(model) > 0 && qwen2_model_num_hidden_layers(model) > 0);
    CHECK(qwen2_model_cache_bytes_per_token(model) > 0 && qwen2_model_name(model)[0] != '\0');
    CHECK(strlen(qwen2_model_dtype(model)) >= 3);
    CHECK(strstr(qwen2_model_config_json(model), "\"num_key_value_heads\":") != NULL);
    CHECK(strstr(qwen2_model_generation_config_json(model), "\"eos_token_ids\":") != NULL);
    size_t n = 0;
    CHECK(qwen2_model_eos_token_ids(model, &n) != NULL && n >= 1);

    /* A callback that does not return 0 stops the loading. */
    qwen2_model *none = NULL;
    loading.calls = 0;
    loading.stop_at = 2;
    CHECK(qwen2_model_load(directory, NUL, options, &none, NULL) == QWEN2_ERROR_CANCELLED);
    CHECK(none == NULL && loading.calls == 2);
    qwen2_load_options_set_progress(options, NULL, NULL);

    qwen2_load_options_set_context_length(options, 0);
    FAILS_WITH(qwen2_model_load(directory, NUL, options, &none, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "setting is out of range: context_length: 0");
    qwen2_load_options_free(options);
    return model;
}

static void load_errors(const char *directory) {
    qwen2_error *error = NULL;
    qwen2_model *model = NULL;
    FAILS_WITH(qwen2_model_load("/nowhere/at all", NUL, NULL, &model, &error), QWEN2_ERROR_NOT_FOUND,
          "no such model: /nowhere/at all");
    CHECK(qwen2_model_load("/nowhere", NUL, NULL, &model, &error) == QWEN2_ERROR_NOT_FOUND);
    CHECK(strcmp(qwen2_error_path(error), "/nowhere") == 0 && qwen2_error_key(error) == NULL);
    CHECK(strstr(qwen2_error_help(error), "config.json") != NULL);
    qwen2_error_free(error);
    error = NULL;

    FAILS_WITH(qwen2_model_load(NULL, 4, NULL, &model, &error), QWEN2_ERROR_INVALID_ARGUMENT, "argument is NULL: path");
    FAILS_WITH(qwen2_model_load(NULL, NUL, NULL, &model, &error), QWEN2_ERROR_INVALID_ARGUMENT, "argument is NULL: path");
    FAILS_WITH(qwen2_model_load(directory, NUL, NULL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "argument is NULL: out");
    FAILS_WITH(qwen2_model_load("a\xFF", NUL, NULL, &model, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "text is not UTF-8: path: byte 1");
    FAILS_WITH(qwen2_model_load("a\0b", 3, NULL, &model, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "path holds NUL: path: byte 1");
    CHECK(model == NULL);

    qwen2_load_options *options = qwen2_load_options_new();
    FAILS_WITH(qwen2_load_options_set_device(options, "gpu", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown device: device: `gpu`");
    FAILS_WITH(qwen2_load_options_set_device(options, "c\0u", 3, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown device: device: `c\\0u`");
    FAILS_WITH(qwen2_load_options_set_dtype(options, "f8", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown dtype: dtype: f8");
    FAILS_WITH(qwen2_load_options_set_quantize(options, "q3", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown quantization: quantize: `q3`");
    CHECK(qwen2_quantize(directory, NUL, directory, NUL, "q8", 2, NULL, NULL, NULL) ==
          QWEN2_ERROR_INVALID_ARGUMENT); /* it exists */
    CHECK(qwen2_convert(directory, NUL, directory, NUL, NULL, 0, NULL, NULL, NULL) ==
          QWEN2_ERROR_INVALID_ARGUMENT);
    CHECK(qwen2_merge_lora(directory, NUL, "/nowhere", NUL, "/other", NUL, NULL, 0, NULL, NULL, NULL) ==
          QWEN2_ERROR_NOT_FOUND);
    FAILS_WITH(qwen2_convert(directory, NUL, "/nowhere", NUL, "q3", NUL, NULL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown dtype: dtype: q3");
    FAILS_WITH(qwen2_quantize(directory, NUL, "/nowhere", NUL, "q3", NUL, NULL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown quantization: quantize: `q3`");
    FAILS_WITH(qwen2_quantize(directory, NUL, NULL, 4, "q8", NUL, NULL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "argument is NULL: path");
    FAILS_WITH(qwen2_load_options_set_adapter(options, NULL, 3, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "argument is NULL: path");
    FAILS_WITH(qwen2_load_options_set_kv_cache(options, "f8", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown kind of cache: kv_cache: f8");
    OK(qwen2_load_options_set_kv_cache(options, "bf16", NUL, &error));
    FAILS_WITH(qwen2_load_options_set_long_context(options, "ntk", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown kind of long context: long_context: ntk");
    OK(qwen2_load_options_set_long_context(options, "dual_chunk", NUL, &error));
    qwen2_load_options_set_preload(options, 1);
    qwen2_load_options_set_screened_head(options, 0);
    FAILS_WITH(qwen2_load_options_set_activations(options, "f8", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown dtype: dtype: f8");
    OK(qwen2_load_options_set_activations(options, "bf16", NUL, &error));
    if (strstr(qwen2_devices(), "cuda") == NULL) {
        OK(qwen2_load_options_set_device(options, "cuda:1", NUL, &error));
        FAILS_WITH(qwen2_model_load(directory, NUL, options, &model, &error), QWEN2_ERROR_DEVICE_UNAVAILABLE,
              "device is not available: cuda:1: not compiled in");
    }
    qwen2_load_options_free(options);
    FAILS_WITH(qwen2_load_options_set_device(options, "cpu", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "handle is not live: qwen2_load_options: it was freed, or this library never made it");
    CHECK(qwen2_model_load("", 0, NULL, &model, &error) != QWEN2_OK && model == NULL);
    qwen2_error_free(error);
}

static void tokenizer(const char *directory, const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_tokenizer *own = qwen2_model_tokenizer(model), *tokenizer = NULL;
    OK(qwen2_tokenizer_load(directory, NUL, &tokenizer, &error));
    CHECK(qwen2_tokenizer_vocab_size(own) == qwen2_tokenizer_vocab_size(tokenizer));
    CHECK(qwen2_tokenizer_vocab_size(own) <= qwen2_model_vocab_size(model));
    const int64_t im_end = qwen2_tokenizer_token_to_id(own, "<|im_end|>", NUL);
    CHECK(im_end > 0 && im_end == qwen2_tokenizer_eos_token_id(own));
    CHECK(qwen2_tokenizer_is_special(own, (uint32_t)im_end) == 1);
    CHECK(qwen2_tokenizer_token_to_id(own, "no such token", NUL) == -1);
    CHECK(strstr(qwen2_tokenizer_chat_template(own), "<|im_start|>") != NULL);

    /* Text with NUL in it, in several alphabets, comes back whole. */
    static const char text[] = "Hello\0 \xE4\xBD\xA0\xE5\xA5\xBD <|im_end|>";
    qwen2_tokens *tokens = NULL;
    OK(qwen2_tokenizer_encode(tokenizer, text, sizeof text - 1, &tokens, &error));
    size_t n = 0, len = 0;
    const uint32_t *ids = qwen2_tokens_data(tokens, &n);
    CHECK(n > 3);
    for (size_t i = 0; i < n; i++)
        CHECK(ids[i] != (uint32_t)im_end);
    qwen2_text *decoded = NULL;
    OK(qwen2_tokenizer_decode(tokenizer, ids, n, 0, &decoded, &error));
    const char *bytes = qwen2_text_data(decoded, &len);
    CHECK(len == sizeof text - 1 && memcmp(bytes, text, len + 1) == 0);
    qwen2_text_free(decoded);
    qwen2_tokens_free(tokens);

    OK(qwen2_tokenizer_encode_with_special_tokens(tokenizer, "<|im_end|>", NUL, &tokens, &error));
    CHECK(qwen2_tokens_data(tokens, &n)[0] == (uint32_t)im_end && n == 1);
    OK(qwen2_tokenizer_decode(tokenizer, qwen2_tokens_data(tokens, NULL), 1, 1, &decoded, &error));
    CHECK(strcmp(qwen2_text_data(decoded, NULL), "") == 0);
    qwen2_text_free(decoded);
    qwen2_tokens_free(tokens);

    qwen2_prompt *prompt = message("Hi");
    OK(qwen2_tokenizer_apply_chat_template(tokenizer, prompt, 1, &decoded, &error));
    CHECK(strstr(qwen2_text_data(decoded, NULL), "<|im_start|>user\nHi<|im_end|>") != NULL);
    qwen2_text_free(decoded);
    OK(qwen2_tokenizer_encode_chat(tokenizer, prompt, 1, &tokens, &error));
    CHECK(qwen2_tokens_data(tokens, &n) != NULL && n > 3);
    qwen2_tokens_free(tokens);
    qwen2_prompt_clear(prompt);
    tokens = NULL;
    FAILS_WITH(qwen2_tokenizer_encode_chat(tokenizer, prompt, 1, &tokens, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "no messages: messages: the list is empty");
    const uint32_t unknown = 4000000000u;
    decoded = NULL;
    CHECK(qwen2_tokenizer_decode(tokenizer, &unknown, 1, 0, &decoded, NULL) == QWEN2_ERROR_INVALID_ARGUMENT);
    FAILS_WITH(qwen2_tokenizer_encode(tokenizer, "ab\xC3", 3, &tokens, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "text is not UTF-8: text: byte 2");
    CHECK(tokens == NULL && decoded == NULL);
    qwen2_prompt_free(prompt);
    qwen2_tokenizer_free(own);
    qwen2_tokenizer_free(tokenizer);
}

static void prompts_and_options(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_generation *out = NULL;
    qwen2_prompt *prompt = qwen2_prompt_new();
    FAILS_WITH(qwen2_generate(model, prompt, NULL, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT, "prompt is empty: prompt");
    FAILS_WITH(qwen2_prompt_set_text(prompt, "caf\xE9", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "text is not UTF-8: text: byte 3");
    FAILS_WITH(qwen2_prompt_add_message(prompt, "user", NUL, "\x80", 1, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "text is not UTF-8: content: byte 0");
    FAILS_WITH(qwen2_prompt_add_message(prompt, "\xFE", NUL, "", 0, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "text is not UTF-8: role: byte 0");
    FAILS_WITH(qwen2_prompt_set_tokens(prompt, NULL, 3, &error), QWEN2_ERROR_INVALID_ARGUMENT, "argument is NULL: tokens");
    OK(qwen2_prompt_set_text(prompt, "a\0b", 3, &error));
    FAILS_WITH(qwen2_prompt_add_message(prompt, "user", NUL, "x", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "prompt holds no messages: prompt: it was set to text or tokens");

    static const struct {
        float temperature, top_p, min_p, penalty;
        size_t top_k, max_new_tokens;
        const char *message;
    } bad[] = {
        {-1, 1, 0, 1, 1, 1, "option out of range: temperature: expected 0 to 100, found -1"},
        {1, 0, 0, 1, 1, 1, "option out of range: top_p: expected above 0 to 1, found 0"},
        {1, 1, 2, 1, 1, 1, "option out of range: min_p: expected 0 to 1, found 2"},
        {1, 1, 0, 0, 1, 1, "option out of range: repetition_penalty: expected above 0 and finite, found 0"},
        {1, 1, 0, 1, 0, 1, "option out of range: top_k: expected 1 or more, found 0"},
        {1, 1, 0, 1, 1, 0, "option out of range: max_new_tokens: expected 1 or more, found 0"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        qwen2_options *options = qwen2_options_new();
        qwen2_options_set_temperature(options, bad[i].temperature);
        qwen2_options_set_top_p(options, bad[i].top_p);
        qwen2_options_set_min_p(options, bad[i].min_p);
        qwen2_options_set_repetition_penalty(options, bad[i].penalty);
        qwen2_options_set_top_k(options, bad[i].top_k);
        qwen2_options_set_max_new_tokens(options, bad[i].max_new_tokens);
        FAILS_WITH(qwen2_generate(model, prompt, options, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT, bad[i].message);
        qwen2_options_free(options);
    }
    qwen2_options *options = qwen2_options_new();
    OK(qwen2_options_add_stop(options, "", 0, &error));
    FAILS_WITH(qwen2_generate(model, prompt, options, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "option out of range: stop[0]: expected 1 to 4096 bytes, found 0 bytes");
    qwen2_options_free(options);

    /* The context holds 96 tokens. */
    options = greedy(96);
    uint32_t tokens[97];
    for (size_t i = 0; i < 97; i++)
        tokens[i] = (uint32_t)(i % 7 + 1);
    OK(qwen2_prompt_set_tokens(prompt, tokens, 1, &error));
    FAILS_WITH(qwen2_generate(model, prompt, options, &out, &error), QWEN2_ERROR_CONTEXT_OVERFLOW,
          "prompt and new tokens exceed the context: max_new_tokens: 1 prompt tokens and 96 new ones, the context "
          "holds 96");
    CHECK(out == NULL);
    qwen2_options_set_max_new_tokens(options, 1);
    OK(qwen2_prompt_set_tokens(prompt, tokens, 95, &error));
    OK(qwen2_generate(model, prompt, options, &out, &error));
    CHECK(qwen2_generation_finish_reason(out) == QWEN2_FINISH_LENGTH);
    CHECK(qwen2_generation_prompt_tokens(out) == 95 && qwen2_generation_completion_tokens(out) == 1);
    qwen2_generation_free(out);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

static void generations(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = message("What is 2 + 3?");
    qwen2_options *options = greedy(12);
    qwen2_generation *whole = NULL, *streamed = NULL;
    OK(qwen2_generate(model, prompt, options, &whole, &error));
    size_t n = 0, len = 0;
    const uint32_t *tokens = qwen2_generation_tokens(whole, &n);
    CHECK(n == 12 && qwen2_generation_completion_tokens(whole) == 12);
    CHECK(qwen2_generation_finish_reason(whole) == QWEN2_FINISH_LENGTH);
    CHECK(qwen2_generation_stop_match(whole) == QWEN2_STOP_MATCH_NONE);
    CHECK(qwen2_generation_stop_token(whole) == -1 && qwen2_generation_stop_text(whole, &len) == NULL);
    CHECK(qwen2_generation_prefill_s(whole) > 0 && qwen2_generation_decode_s(whole) > 0);
    CHECK(qwen2_generation_prefill_tokens_per_s(whole) > 0 && qwen2_generation_decode_tokens_per_s(whole) > 0);
    uint64_t seed = 77;
    CHECK(qwen2_generation_seed(whole, &seed) == 0 && seed == 77);

    /* Pieces add up to the whole; a prompt, options and model that are gone do no harm. */
    qwen2_stream *stream = NULL;
    qwen2_model *clone = qwen2_model_clone(model);
    OK(qwen2_stream_new(clone, prompt, options, &stream, &error));
    qwen2_model_free(clone);
    CHECK(qwen2_stream_token(stream) == UINT32_MAX);
    char text[4096] = "";
    const char *piece = NULL;
    qwen2_status status;
    for (size_t i = 0; (status = qwen2_stream_next(stream, &piece, &len, &error)) == QWEN2_OK; i++) {
        CHECK(i < n && qwen2_stream_token(stream) == tokens[i] && piece[len] == '\0');
        strncat(text, piece, sizeof text - strlen(text) - 1);
    }
    CHECK(status == QWEN2_DONE && error == NULL);
    piece = text;
    CHECK(qwen2_stream_next(stream, &piece, &len, &error) == QWEN2_DONE && piece == text);
    OK(qwen2_stream_finish(stream, &streamed, &error));
    CHECK(strcmp(qwen2_generation_text(streamed, &len), qwen2_generation_text(whole, NULL)) == 0);
    CHECK(strcmp(qwen2_generation_text(streamed, &len), text) == 0 && len == strlen(text));
    qwen2_generation *again = NULL;
    FAILS_WITH(qwen2_stream_finish(stream, &again, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "stream was finished already: stream");
    CHECK(again == NULL);
    qwen2_stream_free(stream);
    qwen2_generation_free(streamed);

    /* A stop token, and a seed that can be read and used again. */
    qwen2_options_add_stop_token_id(options, tokens[3]);
    OK(qwen2_generate(model, prompt, options, &streamed, &error));
    CHECK(qwen2_generation_finish_reason(streamed) == QWEN2_FINISH_STOP);
    CHECK(qwen2_generation_stop_match(streamed) == QWEN2_STOP_MATCH_TOKEN);
    CHECK(qwen2_generation_stop_token(streamed) == (int64_t)tokens[3]);
    CHECK(qwen2_generation_completion_tokens(streamed) <= 4);
    qwen2_generation_free(streamed);
    qwen2_options_free(options);
    qwen2_generation_free(whole);

    options = qwen2_options_new();
    qwen2_options_set_max_new_tokens(options, 8);
    qwen2_options_set_temperature(options, 1.5f);
    OK(qwen2_generate(model, prompt, options, &whole, &error));
    CHECK(qwen2_generation_seed(whole, &seed) == 1);
    qwen2_options *copy = qwen2_options_clone(options);
    qwen2_options_set_seed(copy, seed);
    OK(qwen2_generate(model, prompt, copy, &streamed, &error));
    CHECK(strcmp(qwen2_generation_text(whole, NULL), qwen2_generation_text(streamed, NULL)) == 0);
    qwen2_generation_free(whole);
    qwen2_generation_free(streamed);
    qwen2_options_free(copy);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

static void *cancel_from_thread(void *cancel) {
    qwen2_cancel_now((const qwen2_cancel *)cancel);
    return NULL;
}

static void cancelling(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = message("Hello");
    qwen2_options *options = greedy(40);
    qwen2_cancel *cancel = qwen2_cancel_new();
    qwen2_options_set_cancel(options, cancel);
    qwen2_stream *stream = NULL;
    OK(qwen2_stream_new(model, prompt, options, &stream, &error));
    const char *piece = NULL;
    size_t len = 0;
    for (int i = 0; i < 3; i++)
        OK(qwen2_stream_next(stream, &piece, &len, &error));
    CHECK(qwen2_cancel_is_cancelled(cancel) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, cancel_from_thread, cancel) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(qwen2_cancel_is_cancelled(cancel) == 1);
    CHECK(qwen2_stream_next(stream, &piece, &len, &error) == QWEN2_DONE);
    qwen2_generation *out = NULL;
    OK(qwen2_stream_finish(stream, &out, &error));
    CHECK(qwen2_generation_finish_reason(out) == QWEN2_FINISH_CANCELLED);
    CHECK(qwen2_generation_completion_tokens(out) == 3);
    qwen2_generation_free(out);
    qwen2_stream_free(stream);

    /* A stream has a switch of its own when its options have none. */
    qwen2_options_set_cancel(options, NULL);
    OK(qwen2_stream_new(model, prompt, options, &stream, &error));
    qwen2_cancel *own = qwen2_stream_cancel(stream);
    qwen2_cancel_now(own);
    qwen2_cancel_now(NULL);
    CHECK(qwen2_stream_next(stream, &piece, &len, &error) == QWEN2_DONE);
    qwen2_cancel_free(own);
    qwen2_stream_free(stream);
    qwen2_cancel_free(cancel);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

typedef struct {
    const qwen2_model *model;
    char text[1024];
} Job;

static void *generate_in_thread(void *raw) {
    Job *job = (Job *)raw;
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = message("Count from 3 to 6.");
    qwen2_options *options = greedy(16);
    for (int i = 0; i < 3; i++) {
        qwen2_generation *out = NULL;
        OK(qwen2_generate(job->model, prompt, options, &out, &error));
        strncpy(job->text, qwen2_generation_text(out, NULL), sizeof job->text - 1);
        qwen2_generation_free(out);
    }
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
    return NULL;
}

static void threads_share_a_model(const qwen2_model *model) {
    Job jobs[3];
    pthread_t threads[3];
    memset(jobs, 0, sizeof jobs);
    for (int i = 0; i < 3; i++) {
        jobs[i].model = model;
        CHECK(pthread_create(&threads[i], NULL, generate_in_thread, &jobs[i]) == 0);
    }
    for (int i = 0; i < 3; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(strcmp(jobs[0].text, jobs[1].text) == 0 && strcmp(jobs[1].text, jobs[2].text) == 0);
}

static int32_t on_prefill(uint64_t done, uint64_t total, void *user_data) {
    return on_progress(done, total, user_data);
}

/* Proposals, timeouts, and what a prompt tells while it is read. */
static void speculating(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_model *both = NULL;
    OK(qwen2_model_with_draft(model, model, &both, &error));
    qwen2_prompt *prompt = message("Hi there");
    qwen2_options *options = greedy(20);
    qwen2_generation *plain = NULL, *fast = NULL;
    OK(qwen2_generate(model, prompt, options, &plain, &error));
    OK(qwen2_generate(both, prompt, options, &fast, &error));
    size_t n = 0, m = 0;
    const uint32_t *want = qwen2_generation_tokens(plain, &n), *got = qwen2_generation_tokens(fast, &m);
    CHECK(n == m && memcmp(want, got, n * sizeof *want) == 0);
    CHECK(qwen2_generation_draft_tokens(plain) == 0);
    CHECK(qwen2_generation_draft_tokens(fast) > 10);
    CHECK(qwen2_generation_accepted_tokens(fast) == qwen2_generation_draft_tokens(fast));
    qwen2_generation_free(fast);
    fast = NULL;
    qwen2_options_set_prompt_lookup(options, 4);
    OK(qwen2_generate(model, prompt, options, &fast, &error));
    got = qwen2_generation_tokens(fast, &m);
    CHECK(n == m && memcmp(want, got, n * sizeof *want) == 0);
    qwen2_generation_free(fast);
    qwen2_generation_free(plain);
    plain = fast = NULL;
    qwen2_options_set_prompt_lookup(options, 65);
    FAILS_WITH(qwen2_generate(model, prompt, options, &plain, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "option out of range: prompt_lookup: expected 1 to 64, found 65");
    qwen2_options_free(options);

    options = greedy(20);
    qwen2_options_set_draft_tokens(options, 3);
    FAILS_WITH(qwen2_generate(model, prompt, options, &plain, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "model has no draft model: draft_tokens");
    qwen2_options_set_timeout(options, 1e-9);
    OK(qwen2_generate(both, prompt, options, &plain, &error));
    CHECK(qwen2_generation_finish_reason(plain) == QWEN2_FINISH_TIMEOUT);
    CHECK(qwen2_generation_completion_tokens(plain) == 0);
    qwen2_generation_free(plain);
    plain = NULL;
    qwen2_options_free(options);

    options = greedy(2);
    Loading reading = {0, 0, 0, 0};
    qwen2_options_set_on_prefill(options, on_prefill, &reading);
    OK(qwen2_generate(model, prompt, options, &plain, &error));
    CHECK(reading.calls > 1 && reading.done == reading.total);
    CHECK(reading.total == qwen2_generation_prompt_tokens(plain));
    qwen2_generation_free(plain);
    plain = NULL;
    /* After the first layer it is told to stop: nothing more is computed. */
    reading.calls = 0;
    reading.stop_at = 1;
    OK(qwen2_generate(model, prompt, options, &plain, &error));
    CHECK(reading.calls == 1 && qwen2_generation_finish_reason(plain) == QWEN2_FINISH_CANCELLED);
    qwen2_generation_free(plain);

    qwen2_cancel *cancel = qwen2_cancel_new();
    const uint32_t tokens[3] = {5, 6, 7};
    float scores[2] = {9, 9}, same[2] = {0, 0};
    qwen2_logits *logits = NULL;
    OK(qwen2_model_score_with(model, tokens, 3, NULL, scores, &error));
    OK(qwen2_model_score(model, tokens, 3, same, &error));
    CHECK(scores[0] == same[0] && scores[1] == same[1] && scores[0] < 0);
    OK(qwen2_model_warmup(model, NULL, &error));
    OK(qwen2_model_warmup(model, cancel, &error));
    qwen2_cancel_now(cancel);
    CHECK(qwen2_model_warmup(model, cancel, NULL) == QWEN2_ERROR_CANCELLED);
    CHECK(qwen2_model_score_with(model, tokens, 3, cancel, scores, NULL) == QWEN2_ERROR_CANCELLED);
    CHECK(qwen2_model_logits_with(model, tokens, 3, cancel, &logits, NULL) == QWEN2_ERROR_CANCELLED);
    CHECK(logits == NULL);
    qwen2_cancel_free(cancel);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
    qwen2_model_free(both);
}

static size_t length(const qwen2_session *session) {
    qwen2_error *error = NULL;
    qwen2_tokens *tokens = NULL;
    OK(qwen2_session_tokens(session, &tokens, &error));
    size_t n = 0;
    qwen2_tokens_data(tokens, &n);
    qwen2_tokens_free(tokens);
    return n;
}

/* What a session forgets on demand, and how it outlives the process. */
static void sessions_that_forget_and_last(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_session *session = NULL, *restored = NULL;
    qwen2_options *options = greedy(4);
    qwen2_prompt *first = message("Hi"), *second = message("And?");
    qwen2_generation *answer = NULL;
    OK(qwen2_session_new(model, &session, &error));
    OK(qwen2_session_append(session, first, &error));
    const size_t asked = length(session);
    OK(qwen2_session_generate(session, options, &answer, &error));
    qwen2_generation_free(answer);
    OK(qwen2_session_rollback(session, 1, &error));
    CHECK(length(session) == asked);
    FAILS_WITH(qwen2_session_rollback(session, 2, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "session has fewer messages: n_messages: 2, the session has 1");
    FAILS_WITH(qwen2_session_shift(session, 0, 1, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "session holds messages: session: their turns would be cut");
    OK(qwen2_session_generate(session, options, &answer, &error));
    qwen2_generation_free(answer);
    OK(qwen2_session_append(session, second, &error));
    OK(qwen2_session_shift_messages(session, 0, 2, &error));
    OK(qwen2_session_generate(session, options, &answer, &error));
    qwen2_generation_free(answer);

    char path[64];
    snprintf(path, sizeof path, "/tmp/qwen2-smoke-%p.session", (void *)session);
    OK(qwen2_session_save(session, path, NUL, &error));
    OK(qwen2_session_open(model, path, NUL, &restored, &error));
    CHECK(length(restored) == length(session));
    OK(qwen2_session_generate(restored, options, &answer, &error));
    CHECK(qwen2_generation_cached_tokens(answer) + 1 == length(session));
    qwen2_generation_free(answer);
    qwen2_session_free(restored);
    restored = NULL;
    FILE *file = fopen(path, "ab");
    CHECK(file != NULL && fputc(0, file) == 0 && fclose(file) == 0);
    CHECK(qwen2_session_open(model, path, NUL, &restored, NULL) == QWEN2_ERROR_INVALID_FILE);
    CHECK(restored == NULL && remove(path) == 0);
    CHECK(qwen2_session_open(model, path, NUL, &restored, NULL) == QWEN2_ERROR_NOT_FOUND);

    OK(qwen2_session_truncate(session, 9, &error));
    OK(qwen2_session_shift(session, 2, 3, &error));
    CHECK(length(session) == 6);
    qwen2_session_free(session);
    qwen2_prompt_free(first);
    qwen2_prompt_free(second);
    qwen2_options_free(options);
}

static void sessions(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_session *session = NULL, *fork = NULL;
    qwen2_model *clone = qwen2_model_clone(model);
    OK(qwen2_session_new(clone, &session, &error));
    qwen2_model_free(clone);
    qwen2_options *options = greedy(6);
    qwen2_prompt *first = message("Hi"), *second = message("And?");
    qwen2_generation *answer = NULL;
    OK(qwen2_session_append(session, first, &error));
    OK(qwen2_session_generate(session, options, &answer, &error));
    CHECK(qwen2_generation_cached_tokens(answer) == 0);
    const uint64_t said = qwen2_generation_prompt_tokens(answer) + qwen2_generation_completion_tokens(answer);
    qwen2_generation_free(answer);
    qwen2_tokens *tokens = NULL;
    OK(qwen2_session_tokens(session, &tokens, &error));
    size_t n = 0;
    CHECK(qwen2_tokens_data(tokens, &n) != NULL && n == said);
    qwen2_tokens_free(tokens);
    CHECK(qwen2_session_memory(session) > 0);

    /* The second turn: while the stream runs, the session is the stream's. */
    OK(qwen2_session_fork(session, &fork, &error));
    OK(qwen2_session_append(session, second, &error));
    qwen2_stream *stream = NULL, *another = NULL;
    OK(qwen2_session_stream(session, options, &stream, &error));
    const char *busy = "session is in use: session: a stream of it has not ended";
    FAILS_WITH(qwen2_session_append(session, first, &error), QWEN2_ERROR_INVALID_ARGUMENT, busy);
    FAILS_WITH(qwen2_session_stream(session, options, &another, &error), QWEN2_ERROR_INVALID_ARGUMENT, busy);
    FAILS_WITH(qwen2_session_truncate(session, 0, &error), QWEN2_ERROR_INVALID_ARGUMENT, busy);
    const char *piece = NULL;
    qwen2_status status;
    while ((status = qwen2_stream_next(stream, &piece, NULL, &error)) == QWEN2_OK) {
    }
    CHECK(status == QWEN2_DONE);
    OK(qwen2_stream_finish(stream, &answer, &error));
    CHECK(qwen2_generation_cached_tokens(answer) > 0);
    qwen2_generation_free(answer);
    qwen2_stream_free(stream);

    /* The fork knows the first turn only; freeing a stream early keeps what it made. */
    OK(qwen2_session_append(fork, second, &error));
    OK(qwen2_session_stream(fork, options, &stream, &error));
    OK(qwen2_stream_next(stream, &piece, NULL, &error));
    qwen2_stream_free(stream);
    OK(qwen2_session_tokens(fork, &tokens, &error));
    CHECK(qwen2_tokens_data(tokens, &n) != NULL && n > said);
    qwen2_tokens_free(tokens);
    OK(qwen2_session_truncate(fork, 3, &error));
    FAILS_WITH(qwen2_session_truncate(fork, 4, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "session is shorter: n_tokens: 4, the session has 3");

    /* A stream outlives its session's handle. */
    OK(qwen2_session_stream(fork, options, &stream, &error));
    qwen2_session_free(fork);
    OK(qwen2_stream_finish(stream, &answer, &error));
    CHECK(qwen2_generation_prompt_tokens(answer) == 3);
    qwen2_generation_free(answer);
    qwen2_stream_free(stream);
    qwen2_session_free(session);
    qwen2_prompt_free(first);
    qwen2_prompt_free(second);
    qwen2_options_free(options);
}

static void logits(const qwen2_model *model) {
    qwen2_error *error = NULL;
    const uint32_t tokens[] = {1, 2, 3, 4};
    qwen2_logits *out = NULL;
    OK(qwen2_model_logits(model, tokens, 4, &out, &error));
    size_t rows = 0, columns = 0;
    const float *data = qwen2_logits_data(out, &rows, &columns);
    CHECK(rows == 4 && columns == qwen2_model_vocab_size(model));
    for (size_t i = 0; i < rows * columns; i++)
        CHECK(data[i] == data[i] && data[i] < 1e4f && data[i] > -1e4f);
    qwen2_logits_free(out);
    out = NULL;
    float scores[3] = {1, 1, 1};
    OK(qwen2_model_score(model, tokens, 4, scores, &error));
    CHECK(scores[0] < 0 && scores[1] < 0 && scores[2] < 0);
    FAILS_WITH(qwen2_model_score(model, tokens, 4, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "argument is NULL: scores");
    FAILS_WITH(qwen2_model_logits(model, NULL, 0, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT, "no tokens given: tokens");
    CHECK(qwen2_model_logits(model, tokens, SIZE_MAX / 2, &out, NULL) == QWEN2_ERROR_INVALID_ARGUMENT);
    CHECK(out == NULL);
}

static void handles(qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_generation *out = NULL;
    qwen2_prompt *prompt = message("Hi");
    FAILS_WITH(qwen2_generate(NULL, prompt, NULL, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "handle is NULL: qwen2_model");
    FAILS_WITH(qwen2_generate(model, NULL, NULL, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "handle is NULL: qwen2_prompt");
    FAILS_WITH(qwen2_generate((const qwen2_model *)(const void *)prompt, prompt, NULL, &out, &error),
          QWEN2_ERROR_INVALID_ARGUMENT, "handle has another type: qwen2_model: it is a qwen2_prompt");
    char foreign[64] = "not a model";
    FAILS_WITH(qwen2_generate((const qwen2_model *)(const void *)foreign, prompt, NULL, &out, &error),
          QWEN2_ERROR_INVALID_ARGUMENT,
          "handle is not live: qwen2_model: it was freed, or this library never made it");
    CHECK(qwen2_generate(NULL, NULL, NULL, NULL, NULL) == QWEN2_ERROR_INVALID_ARGUMENT);

    qwen2_model_free(model);
    FAILS_WITH(qwen2_generate(model, prompt, NULL, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "handle is not live: qwen2_model: it was freed, or this library never made it");
    qwen2_model_free(model); /* twice: nothing happens */
    CHECK(qwen2_model_name(model) == NULL && qwen2_model_clone(model) == NULL && qwen2_model_vocab_size(model) == 0);

    size_t len = 5;
    CHECK(qwen2_generation_text(NULL, &len) == NULL && len == 0);
    CHECK(qwen2_tokens_data(NULL, NULL) == NULL && qwen2_text_data(NULL, NULL) == NULL);
    CHECK(qwen2_error_code(NULL) == QWEN2_OK && strcmp(qwen2_error_message(NULL), "") == 0);
    CHECK(qwen2_error_help(NULL) == NULL);
    qwen2_options_set_temperature(NULL, 1);
    qwen2_prompt_clear(NULL);
    qwen2_error_free(NULL);
    qwen2_model_free(NULL);
    qwen2_stream_free(NULL);
    qwen2_session_free(NULL);
    qwen2_prompt_free(prompt);
    CHECK(out == NULL && error == NULL);
}

static void a_thousand_times(const char *directory, const qwen2_model *model) {
    qwen2_error *error = NULL;
    for (int i = 0; i < 1000; i++) {
        qwen2_prompt *prompt = message("Hi");
        qwen2_options *options = qwen2_options_new();
        OK(qwen2_options_add_stop(options, "x", 1, &error));
        qwen2_cancel *cancel = qwen2_cancel_new();
        qwen2_options_set_cancel(options, cancel);
        qwen2_load_options *load = qwen2_load_options_new();
        qwen2_model *clone = qwen2_model_clone(model);
        qwen2_session *session = NULL;
        OK(qwen2_session_new(clone, &session, &error));
        OK(qwen2_session_append(session, prompt, &error));
        qwen2_stream *alone = NULL, *inside = NULL;
        OK(qwen2_stream_new(clone, prompt, options, &alone, &error));
        OK(qwen2_session_stream(session, options, &inside, &error));
        qwen2_tokenizer *tokenizer = qwen2_model_tokenizer(clone);
        qwen2_error *failure = NULL;
        CHECK(qwen2_options_add_stop(options, "\xFF", 1, &failure) == QWEN2_ERROR_INVALID_ARGUMENT);
        qwen2_model_free(clone);
        qwen2_session_free(session);
        qwen2_tokenizer_free(tokenizer);
        qwen2_stream_free(inside);
        qwen2_stream_free(alone);
        qwen2_load_options_free(load);
        qwen2_options_free(options);
        qwen2_cancel_free(cancel);
        qwen2_prompt_free(prompt);
        qwen2_error_free(failure);
    }
    for (int i = 0; i < 20; i++) {
        qwen2_model *again = NULL;
        OK(qwen2_model_load(directory, NUL, NULL, &again, &error));
        qwen2_model_free(again);
    }
}

typedef struct {
    int lines;
    int loaded;
} Log;

static void on_log(int32_t level, const char *line, size_t len, void *user_data) {
    Log *log = (Log *)user_data;
    CHECK(level >= QWEN2_LOG_ERROR && level <= QWEN2_LOG_DEBUG && line[len] == '\0' && strlen(line) == len);
    log->lines += 1;
    log->loaded += level == QWEN2_LOG_INFO && strstr(line, "loaded") != NULL;
    qwen2_set_log(NULL, NULL); /* has no effect in here */
}

static void logging(const char *directory) {
    qwen2_error *error = NULL;
    Log log = {0, 0};
    qwen2_model *model = NULL;
    qwen2_set_log(on_log, &log);
    OK(qwen2_model_load(directory, NUL, NULL, &model, &error));
    qwen2_model_free(model);
    CHECK(log.loaded == 1 && log.lines >= 2);
    qwen2_set_log(NULL, NULL);
    const int lines = log.lines;
    OK(qwen2_model_load(directory, NUL, NULL, &model, &error));
    qwen2_model_free(model);
    CHECK(log.lines == lines);
}

typedef struct {
    const qwen2_model *model;
    qwen2_stream *stream;
    int calls, stop_at;
} Choosing;

static int32_t choose_nine(const uint32_t *tokens, size_t n_tokens, float *logits, size_t n_logits, void *user_data) {
    Choosing *choosing = (Choosing *)user_data;
    CHECK(tokens != NULL && n_tokens >= 1);
    CHECK(n_logits == qwen2_model_vocab_size(choosing->model));
    choosing->calls += 1;
    if (choosing->stream != NULL) {
        /* What calls is in use. */
        const char *text = NULL;
        qwen2_error *error = NULL;
        FAILS_WITH(qwen2_stream_next(choosing->stream, &text, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
              "object is in use: stream: a callback uses what calls it");
        CHECK(qwen2_stream_token(choosing->stream) == UINT32_MAX);
    }
    for (size_t i = 0; i < n_logits; i++)
        logits[i] = i == 9 ? 1.0f : 0.0f;
    return choosing->calls == choosing->stop_at ? 7 : 0;
}

static void processors(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_generation *out = NULL;
    qwen2_stream *stream = NULL;
    size_t n = 0;
    Choosing choosing = {model, NULL, 0, 0};
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(3);
    qwen2_options_set_logits_processor(options, choose_nine, &choosing);
    OK(qwen2_generate(model, prompt, options, &out, &error));
    const uint32_t *tokens = qwen2_generation_tokens(out, &n);
    CHECK(n == 3 && tokens[0] == 9 && tokens[2] == 9 && choosing.calls == 3);
    qwen2_generation_free(out);

    qwen2_options *copy = qwen2_options_clone(options);
    qwen2_options_free(options);
    OK(qwen2_stream_new(model, prompt, copy, &stream, &error));
    choosing.stream = stream;
    const char *text = NULL;
    OK(qwen2_stream_next(stream, &text, NULL, &error));
    CHECK(qwen2_stream_token(stream) == 9);
    choosing.stream = NULL;
    qwen2_stream_free(stream);

    qwen2_session *session = NULL;
    OK(qwen2_session_new(model, &session, &error));
    OK(qwen2_session_append(session, prompt, &error));
    choosing.calls = 0;
    choosing.stop_at = 2;
    out = NULL;
    FAILS_WITH(qwen2_session_generate(session, copy, &out, &error), QWEN2_ERROR_CANCELLED,
          "logits processor stopped the generation: it returned 7");
    CHECK(out == NULL);
    qwen2_options_set_logits_processor(copy, NULL, NULL);
    OK(qwen2_session_generate(session, copy, &out, &error));
    qwen2_generation_free(out);
    qwen2_session_free(session);
    qwen2_options_free(copy);
    qwen2_prompt_free(prompt);
}

static void log_probabilities(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_generation *out = NULL;
    qwen2_stream *stream = NULL;
    const uint32_t prompt_tokens[4] = {5, 6, 7, 8};
    qwen2_prompt *prompt = qwen2_prompt_new();
    OK(qwen2_prompt_set_tokens(prompt, prompt_tokens, 4, &error));
    qwen2_options *options = greedy(2);
    qwen2_options_set_logprobs(options, 3);
    qwen2_options_set_prompt_logprobs(options, 0);
    OK(qwen2_generate(model, prompt, options, &out, &error));
    size_t n = 0, n_prompt = 0;
    const float *logprobs = qwen2_generation_logprobs(out, &n);
    const float *of_prompt = qwen2_generation_prompt_logprobs(out, &n_prompt);
    CHECK(n == 2 && n_prompt == 3 && logprobs[0] <= 0 && of_prompt[2] < 0);
    const uint32_t *tokens = NULL;
    const float *top = NULL;
    CHECK(qwen2_generation_top_logprobs(out, 1, &tokens, &top) == 3);
    /* Greedy: the likeliest was taken. */
    CHECK(tokens[0] == qwen2_generation_tokens(out, NULL)[1] && top[0] == logprobs[1] && top[1] >= top[2]);
    CHECK(qwen2_generation_top_logprobs(out, 2, &tokens, &top) == 0);
    CHECK(qwen2_generation_prompt_top_logprobs(out, 0, NULL, NULL) == 0);

    OK(qwen2_stream_new(model, prompt, options, &stream, &error));
    const float before = qwen2_stream_logprob(stream);
    CHECK(before != before);
    const char *text = NULL;
    OK(qwen2_stream_next(stream, &text, NULL, &error));
    CHECK(qwen2_stream_logprob(stream) == logprobs[0]);
    CHECK(qwen2_stream_top_logprobs(stream, &tokens, &top) == 3 && top[0] == logprobs[0]);
    qwen2_stream_free(stream);
    qwen2_generation_free(out);
    qwen2_options_free(options);
    CHECK(qwen2_generation_logprobs(NULL, &n) == NULL && n == 0);
    qwen2_prompt_free(prompt);
}

static void other_options(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_generation *out = NULL;
    size_t n = 0;
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(4);
    OK(qwen2_generate(model, prompt, options, &out, &error));
    const uint32_t first = qwen2_generation_tokens(out, &n)[0];
    qwen2_generation_free(out);
    qwen2_options_set_typical_p(options, 0.9f);
    qwen2_options_set_presence_penalty(options, 0.5f);
    qwen2_options_set_frequency_penalty(options, 0.5f);
    qwen2_options_set_min_new_tokens(options, 2);
    qwen2_options_set_logit_bias(options, 11, 100.0f);
    OK(qwen2_options_add_bad_tokens(options, &first, 1, &error));
    OK(qwen2_options_add_bad_word(options, "zzz", NUL, &error));
    OK(qwen2_generate(model, prompt, options, &out, &error));
    CHECK(qwen2_generation_tokens(out, &n)[0] == 11 && n == 4);
    qwen2_generation_free(out);
    FAILS_WITH(qwen2_options_add_bad_word(options, "\xFF", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "text is not UTF-8: text: byte 0");
    qwen2_options_set_logit_bias(options, 11, 101.0f);
    out = NULL;
    FAILS_WITH(qwen2_generate(model, prompt, options, &out, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "option out of range: logit_bias[11]: expected -100 to 100, found 101");
    qwen2_options_free(options);

    const size_t hidden_size = (size_t)qwen2_model_hidden_size(model);
    float *embedding = (float *)malloc(hidden_size * sizeof *embedding);
    CHECK(embedding != NULL);
    OK(qwen2_model_embed(model, prompt, QWEN2_POOLING_LAST_TOKEN, embedding, &error));
    double squares = 0;
    for (size_t i = 0; i < hidden_size; i++)
        squares += (double)embedding[i] * embedding[i];
    CHECK(squares > 0.9999 && squares < 1.0001);
    FAILS_WITH(qwen2_model_embed(model, prompt, 5, embedding, &error), QWEN2_ERROR_INVALID_ARGUMENT,
          "unknown pooling: pooling: 5");
    float *again = (float *)malloc(hidden_size * sizeof *again);
    CHECK(again != NULL);
    qwen2_cancel *cancel = qwen2_cancel_new();
    OK(qwen2_model_embed_with(model, prompt, QWEN2_POOLING_LAST_TOKEN, cancel, again, &error));
    CHECK(memcmp(again, embedding, hidden_size * sizeof *again) == 0);
    OK(qwen2_model_embed_with(model, prompt, QWEN2_POOLING_LAST_TOKEN, NULL, again, &error));
    qwen2_cancel_now(cancel);
    again[0] = 9;
    CHECK(qwen2_model_embed_with(model, prompt, QWEN2_POOLING_MEAN, cancel, again, NULL) == QWEN2_ERROR_CANCELLED);
    CHECK(again[0] == 9);
    qwen2_cancel_free(cancel);
    free(again);
    free(embedding);
    qwen2_prompt_free(prompt);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    versions();
    load_errors(argv[1]);
    qwen2_model *model = load_and_look(argv[1]);
    tokenizer(argv[1], model);
    prompts_and_options(model);
    generations(model);
    cancelling(model);
    threads_share_a_model(model);
    speculating(model);
    sessions(model);
    sessions_that_forget_and_last(model);
    logits(model);
    other_options(model);
    log_probabilities(model);
    processors(model);
    a_thousand_times(argv[1], model);
    logging(argv[1]);
    handles(model);
    puts("smoke: all well");
    return 0;
}
