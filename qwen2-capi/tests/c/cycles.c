/* Handles made and freed very often, on the model in argv[1]: nothing is lost, and nothing grows. */
#include <unistd.h>

#include "check.h"

/* Kilobytes of this process in memory. */
static long resident(void) {
    long pages = 0, in_memory = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%ld %ld", &pages, &in_memory) == 2);
    fclose(file);
    return in_memory * (sysconf(_SC_PAGESIZE) / 1024);
}

static void values(const qwen2_model *model, const qwen2_tokenizer *tokenizer, int i) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = qwen2_prompt_new();
    OK(qwen2_prompt_add_message(prompt, "user", NUL, "Hi", NUL, &error));
    qwen2_options *options = qwen2_options_new();
    OK(qwen2_options_add_stop(options, "stop", NUL, &error));
    OK(qwen2_options_add_bad_word(options, "bad", NUL, &error));
    qwen2_options *copy = qwen2_options_clone(options);
    FAILS(qwen2_options_add_stop(copy, "\xFF", 1, &error), QWEN2_ERROR_INVALID_ARGUMENT, "stop");
    qwen2_tokens *tokens = NULL;
    qwen2_text *text = NULL;
    size_t n = 0;
    OK(qwen2_tokenizer_encode(tokenizer, "Hi there", NUL, &tokens, &error));
    const uint32_t *ids = qwen2_tokens_data(tokens, &n);
    OK(qwen2_tokenizer_decode(tokenizer, ids, n, 1, &text, &error));
    qwen2_session *session = NULL;
    OK(qwen2_session_new(model, &session, &error));
    /* It renders a template, which takes more time than all the rest. */
    if (i % 10 == 0) OK(qwen2_session_append(session, prompt, &error));
    qwen2_session_free(session);
    qwen2_text_free(text);
    qwen2_tokens_free(tokens);
    qwen2_options_free(copy);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

static int32_t hear(qwen2_request *request, qwen2_status status, const char *text, size_t len, void *user_data) {
    *(int *)user_data += status != QWEN2_OK;
    return request == NULL || text[len] != '\0';
}

static void engine(const qwen2_model *model, int i) {
    qwen2_error *error = NULL;
    qwen2_engine_options *settings = qwen2_engine_options_new();
    qwen2_engine_options_set_max_sequences(settings, 2);
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, settings, &engine, &error));
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(3);
    qwen2_request *read = NULL, *told = NULL;
    int n_ends = 0;
    OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &read, &error));
    OK(qwen2_engine_submit_callback(engine, prompt, options, 0, NULL, hear, &n_ends, &told, &error));
    OK(qwen2_engine_submit_callback(engine, prompt, options, 0, NULL, hear, &n_ends, NULL, &error));
    if (i % 3 == 0) {
        qwen2_generation *generation = NULL;
        OK(qwen2_request_finish(read, &generation, &error));
        qwen2_generation_free(generation);
    }
    qwen2_engine_free(engine);
    CHECK(n_ends == 2);
    qwen2_request_free(read);
    qwen2_request_free(told);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
    qwen2_engine_options_free(settings);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    /* Kilobytes that it may grow by; a sanitizer keeps freed memory for a while. */
    const long may_grow = strtol(argv[2], NULL, 10);
    qwen2_model *model = load(argv[1]);
    qwen2_tokenizer *tokenizer = qwen2_model_tokenizer(model);
    long before = 0;
    for (int i = 0; i < 100000; i++) {
        if (i == 10000) before = resident();
        values(model, tokenizer, i);
    }
    for (int i = 0; i < 1000; i++) {
        /* The first ones fill what the allocator keeps for each thread. */
        if (i == 100) {
            CHECK(resident() - before <= may_grow);
            before = resident();
        }
        engine(model, i);
    }
    CHECK(resident() - before <= may_grow);
    qwen2_tokenizer_free(tokenizer);
    qwen2_model_free(model);
    puts("cycles: all well");
    return 0;
}
