/* Engines that a host reads, adapters and inspection: on the demo model in argv[1], the fixture in argv[2] and
 * its adapter in argv[3]. Is C11 and C++17. */
#include <math.h>
#include <pthread.h>

#include "check.h"

#define N_REQUESTS 16

static uint64_t stat_of(const qwen2_engine *engine, size_t place) {
    uint64_t stats[QWEN2_N_STATS];
    CHECK(qwen2_engine_stats(engine, stats, QWEN2_N_STATS) == QWEN2_N_STATS);
    return stats[place];
}

static qwen2_engine *engine_of(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, NULL, &engine, &error));
    return engine;
}

static qwen2_request *submit(const qwen2_engine *engine, const char *question, size_t max_new_tokens) {
    qwen2_error *error = NULL;
    qwen2_request *request = NULL;
    qwen2_prompt *prompt = message(question);
    qwen2_options *options = greedy(max_new_tokens);
    OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &request, &error));
    qwen2_prompt_free(prompt);
    qwen2_options_free(options);
    return request;
}

static void same(const qwen2_generation *got, const qwen2_generation *want) {
    size_t n_got = 0, n_want = 0;
    const uint32_t *got_tokens = qwen2_generation_tokens(got, &n_got);
    const uint32_t *want_tokens = qwen2_generation_tokens(want, &n_want);
    CHECK(n_got == n_want && n_got > 0);
    CHECK(memcmp(got_tokens, want_tokens, n_got * sizeof *got_tokens) == 0);
    CHECK(strcmp(qwen2_generation_text(got, NULL), qwen2_generation_text(want, NULL)) == 0);
    CHECK(qwen2_generation_finish_reason(got) == qwen2_generation_finish_reason(want));
    CHECK(qwen2_generation_prompt_tokens(got) == qwen2_generation_prompt_tokens(want));
}

/* Each of 16 requests that are polled in turn gets what it gets alone. */
static void polled_in_turn(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine_options *settings = qwen2_engine_options_new();
    qwen2_engine_options_set_max_sequences(settings, 7);
    qwen2_engine_options_set_prefill_chunk(settings, 32);
    qwen2_engine_options_set_queue_limit(settings, 100);
    qwen2_engine_options_set_reader_patience(settings, 30000);
    qwen2_engine_options_set_prefix_cache(settings, 1);
    qwen2_engine_options_set_deterministic(settings, 0);
    qwen2_engine_options_set_cache_bytes(settings, UINT64_C(1) << 28);
    OK(qwen2_engine_options_set_when_full(settings, QWEN2_WHEN_FULL_REFUSE, &error));
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, settings, &engine, &error));
    qwen2_engine_options_free(settings);
    CHECK(stat_of(engine, QWEN2_STATS_CACHE_LIMIT) == UINT64_C(1) << 28);

    qwen2_options *options = qwen2_options_new_greedy();
    qwen2_options_set_max_new_tokens(options, 40);
    qwen2_options_set_logprobs(options, 2);
    qwen2_generation *alone[N_REQUESTS];
    qwen2_request *requests[N_REQUESTS];
    char texts[N_REQUESTS][512];
    for (int i = 0; i < N_REQUESTS; i++) {
        char question[64];
        snprintf(question, sizeof question, i % 2 ? "What is %d plus %d?" : "Count from %d to %d.", i, i + 6);
        qwen2_prompt *prompt = message(question);
        alone[i] = NULL;
        OK(qwen2_generate(model, prompt, options, &alone[i], &error));
        requests[i] = NULL;
        OK(qwen2_engine_submit(engine, prompt, options, i % 3 - 1, NULL, &requests[i], &error));
        CHECK(qwen2_request_token(requests[i]) == UINT32_MAX && isnan(qwen2_request_logprob(requests[i])));
        qwen2_prompt_free(prompt);
        texts[i][0] = '\0';
    }
    qwen2_options_free(options);

    int n_ended = 0, has_ended[N_REQUESTS] = {0};
    for (int i = 0; n_ended < N_REQUESTS; i = (i + 1) % N_REQUESTS) {
        const char *text = "untouched";
        size_t len = 77;
        const qwen2_status status = qwen2_request_poll(requests[i], &text, &len, &error);
        CHECK(error == NULL && (status == QWEN2_OK || status == QWEN2_PENDING || status == QWEN2_DONE));
        if (status != QWEN2_OK) {
            CHECK(strcmp(text, "untouched") == 0 && len == 77);
            n_ended += status == QWEN2_DONE && !has_ended[i];
            has_ended[i] |= status == QWEN2_DONE;
            continue;
        }
        const uint32_t *tokens = NULL;
        const float *logprobs = NULL;
        CHECK(!has_ended[i] && strlen(text) == len && strlen(texts[i]) + len < sizeof texts[i]);
        strcat(texts[i], text);
        CHECK(qwen2_request_top_logprobs(requests[i], &tokens, &logprobs) == 2);
        CHECK(tokens[0] == qwen2_request_token(requests[i]) && logprobs[0] == qwen2_request_logprob(requests[i]));
    }
    for (int i = 0; i < N_REQUESTS; i++) {
        qwen2_generation *generation = NULL;
        OK(qwen2_request_finish(requests[i], &generation, &error));
        same(generation, alone[i]);
        CHECK(strcmp(texts[i], qwen2_generation_text(generation, NULL)) == 0);
        qwen2_generation_free(generation);
        qwen2_generation_free(alone[i]);
        FAILS(qwen2_request_finish(requests[i], &generation, &error), QWEN2_ERROR_INVALID_ARGUMENT, "request");
        qwen2_request_free(requests[i]);
    }
    CHECK(stat_of(engine, QWEN2_STATS_FINISHED) == N_REQUESTS && stat_of(engine, QWEN2_STATS_FAILED) == 0);
    CHECK(stat_of(engine, QWEN2_STATS_RUNNING) == 0 && stat_of(engine, QWEN2_STATS_WAITING) == 0);
    CHECK(stat_of(engine, QWEN2_STATS_STEPS) < stat_of(engine, QWEN2_STATS_COMPLETION_TOKENS));
    qwen2_engine_free(engine);
}

/* What engine, prompt and options of a request are freed before does not matter to it. */
static void read_by_waiting(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_model *clone = qwen2_model_clone(model);
    qwen2_engine *engine = engine_of(clone);
    qwen2_model_free(clone);
    qwen2_request *request = submit(engine, "Hi", 12);
    const char *text = NULL;
    int n_pieces = 0;
    qwen2_status status;
    while ((status = qwen2_request_next(request, &text, NULL, &error)) == QWEN2_OK)
        n_pieces++;
    CHECK(status == QWEN2_DONE && error == NULL && n_pieces == 12);
    CHECK(qwen2_request_next(request, &text, NULL, &error) == QWEN2_DONE);
    qwen2_engine_free(engine);
    qwen2_generation *generation = NULL;
    OK(qwen2_request_finish(request, &generation, &error));
    CHECK(qwen2_generation_completion_tokens(generation) == 12);
    qwen2_generation_free(generation);
    qwen2_request_free(request);
}

static void *wait_for_it(void *request) {
    qwen2_error *error = NULL;
    qwen2_generation *generation = NULL;
    OK(qwen2_request_finish((qwen2_request *)request, &generation, &error));
    CHECK(qwen2_generation_finish_reason(generation) == QWEN2_FINISH_CANCELLED);
    qwen2_generation_free(generation);
    return NULL;
}

static void cancelled(const qwen2_model *model) {
    qwen2_engine *engine = engine_of(model);
    qwen2_request *request = submit(engine, "Hi", 900);
    qwen2_request *other = submit(engine, "Hello", 20);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, wait_for_it, request) == 0);
    qwen2_cancel *cancel = qwen2_request_cancel(request);
    qwen2_cancel_now(cancel);
    CHECK(pthread_join(thread, NULL) == 0);
    qwen2_cancel_free(cancel);
    qwen2_request_free(request);
    qwen2_error *error = NULL;
    qwen2_generation *generation = NULL;
    OK(qwen2_request_finish(other, &generation, &error));
    CHECK(qwen2_generation_finish_reason(generation) == QWEN2_FINISH_LENGTH);
    qwen2_generation_free(generation);
    qwen2_request_free(other);
    /* Freed while it runs. */
    qwen2_request_free(submit(engine, "Hi", 900));
    qwen2_engine_free(engine);
}

static void freed_with_running_requests(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_generation *generation = NULL;
    const char *text = NULL;
    qwen2_engine *engine = engine_of(model);
    qwen2_request *begun = submit(engine, "Hi", 900), *waiting = submit(engine, "Hello", 900);
    OK(qwen2_request_next(begun, &text, NULL, &error));
    qwen2_engine_free(engine);
    for (int i = 0; i < 2; i++)
        FAILS(qwen2_request_finish(begun, &generation, &error), QWEN2_ERROR_CANCELLED, NULL);
    qwen2_status status;
    while ((status = qwen2_request_poll(waiting, &text, NULL, &error)) == QWEN2_OK) {
    }
    FAILS(status, QWEN2_ERROR_CANCELLED, NULL);
    CHECK(qwen2_request_poll(waiting, &text, NULL, &error) == QWEN2_DONE);
    FAILS(qwen2_request_finish(waiting, &generation, &error), QWEN2_ERROR_CANCELLED, NULL);
    qwen2_request_free(begun);
    qwen2_request_free(waiting);
}

static void full(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine_options *settings = qwen2_engine_options_new();
    qwen2_engine_options_set_max_sequences(settings, 1);
    qwen2_engine_options_set_queue_limit(settings, 1);
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, settings, &engine, &error));
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(60);
    qwen2_request *requests[3] = {NULL, NULL, NULL};
    OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &requests[0], &error));
    while (stat_of(engine, QWEN2_STATS_RUNNING) == 0) {
    }
    OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &requests[1], &error));
    FAILS(qwen2_engine_submit(engine, prompt, options, 0, NULL, &requests[2], &error), QWEN2_ERROR_OUT_OF_MEMORY,
          "queue_limit");
    CHECK(requests[2] == NULL);
    qwen2_request_free(requests[0]);
    qwen2_request_free(requests[1]);
    qwen2_engine_free(engine);

    OK(qwen2_engine_options_set_when_full(settings, QWEN2_WHEN_FULL_WAIT, &error));
    OK(qwen2_engine_new(model, settings, &engine, &error));
    for (int i = 0; i < 3; i++)
        OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &requests[i], &error));
    for (int i = 0; i < 3; i++)
        qwen2_request_free(requests[i]);
    qwen2_engine_free(engine);
    qwen2_engine_options_free(settings);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

/* The only token that it leaves is the one behind `user_data`. */
static int32_t only(const uint32_t *tokens, size_t n_tokens, float *logits, size_t n_logits, void *user_data) {
    CHECK(tokens != NULL && n_tokens > 0);
    for (size_t i = 0; i < n_logits; i++)
        if (i != *(const size_t *)user_data) logits[i] = -INFINITY;
    return 0;
}

static qwen2_options *sampling(uint64_t seed) {
    qwen2_options *options = qwen2_options_new();
    qwen2_options_set_temperature(options, 2.0f);
    qwen2_options_set_ignore_eos(options, 1);
    qwen2_options_set_max_new_tokens(options, 24);
    qwen2_options_set_seed(options, seed);
    return options;
}

/* Constraint, seeds, processor and log-probabilities are each request's own, and in a deterministic engine it gets
 * among the others what the model gives it alone. */
static void own_options(const qwen2_model *model) {
    enum { N = 6 };
    qwen2_error *error = NULL;
    qwen2_engine *engine = NULL;
    qwen2_engine_options *settings = qwen2_engine_options_new();
    qwen2_engine_options_set_deterministic(settings, 1);
    OK(qwen2_engine_new(model, settings, &engine, &error));
    qwen2_engine_options_free(settings);
    size_t token = 77, n = 0;
    qwen2_options *options[N] = {greedy(40), greedy(40), sampling(1), sampling(2), greedy(4), greedy(12)};
    OK(qwen2_options_set_regex(options[0], "[0-9]{5}", NUL, &error));
    OK(qwen2_options_set_json_schema(options[1], "{\"enum\": [\"small\", \"large\"]}", NUL, &error));
    qwen2_options_set_logits_processor(options[4], only, &token);
    qwen2_options_set_logprobs(options[5], 3);
    qwen2_options_set_prompt_logprobs(options[5], 0);
    qwen2_prompt *prompt = message("What is 2 plus 3?");
    qwen2_request *requests[N];
    qwen2_generation *alone[N], *among[N];
    for (int i = 0; i < N; i++) {
        requests[i] = NULL;
        OK(qwen2_engine_submit(engine, prompt, options[i], 0, NULL, &requests[i], &error));
    }
    for (int i = 0; i < N; i++) {
        alone[i] = among[i] = NULL;
        OK(qwen2_generate(model, prompt, options[i], &alone[i], &error));
        OK(qwen2_request_finish(requests[i], &among[i], &error));
        same(among[i], alone[i]);
        qwen2_request_free(requests[i]);
        qwen2_options_free(options[i]);
    }
    CHECK(strspn(qwen2_generation_text(among[0], NULL), "0123456789") == 5);
    CHECK(strlen(qwen2_generation_text(among[0], NULL)) == 5);
    const char *size = qwen2_generation_text(among[1], NULL);
    CHECK(strcmp(size, "\"small\"") == 0 || strcmp(size, "\"large\"") == 0);
    CHECK(memcmp(qwen2_generation_tokens(among[2], NULL), qwen2_generation_tokens(among[3], NULL),
                 24 * sizeof(uint32_t)) != 0);
    const uint32_t *tokens = qwen2_generation_tokens(among[4], &n);
    CHECK(n == 4 && tokens[0] == 77 && tokens[3] == 77);
    CHECK(qwen2_generation_logprobs(among[5], &n)[0] <= 0 && n == 12);
    CHECK(qwen2_generation_top_logprobs(among[5], 11, NULL, NULL) == 3);
    (void)qwen2_generation_prompt_logprobs(among[5], &n);
    CHECK(n + 1 == qwen2_generation_prompt_tokens(among[5]));
    (void)qwen2_generation_logprobs(among[0], &n);
    CHECK(n == 0);
    for (int i = 0; i < N; i++) {
        qwen2_generation_free(alone[i]);
        qwen2_generation_free(among[i]);
    }
    qwen2_engine_free(engine);
    qwen2_prompt_free(prompt);
}

/* One runs; of the two that wait the later one is more urgent. */
static void priorities(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = NULL;
    qwen2_engine_options *settings = qwen2_engine_options_new();
    qwen2_engine_options_set_max_sequences(settings, 1);
    OK(qwen2_engine_new(model, settings, &engine, &error));
    qwen2_engine_options_free(settings);
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(40);
    qwen2_request *first = submit(engine, "Hi", 60), *low = NULL, *high = NULL;
    OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &low, &error));
    OK(qwen2_engine_submit(engine, prompt, options, 1, NULL, &high, &error));
    qwen2_generation *generation = NULL;
    OK(qwen2_request_finish(high, &generation, &error));
    CHECK(stat_of(engine, QWEN2_STATS_FINISHED) < 3);
    qwen2_generation_free(generation);
    qwen2_request_free(first);
    qwen2_request_free(low);
    qwen2_request_free(high);
    qwen2_engine_free(engine);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

/* A constraint that cannot be compiled is refused, one that a processor contradicts fails alone. */
static void bad_constraints(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_request *bad = NULL;
    qwen2_generation *generation = NULL;
    qwen2_engine *engine = engine_of(model);
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(20);
    qwen2_request *good = submit(engine, "Hi", 20);
    OK(qwen2_options_set_regex(options, "([0-9]", NUL, &error));
    FAILS(qwen2_engine_submit(engine, prompt, options, 0, NULL, &bad, &error), QWEN2_ERROR_INVALID_CONSTRAINT,
          "constraint");
    size_t token = 77;
    OK(qwen2_options_set_regex(options, "[0-9]{5}", NUL, &error));
    qwen2_options_set_logits_processor(options, only, &token);
    OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &bad, &error));
    FAILS(qwen2_request_finish(bad, &generation, &error), QWEN2_ERROR_INVALID_CONSTRAINT, "constraint");
    OK(qwen2_request_finish(good, &generation, &error));
    CHECK(qwen2_generation_completion_tokens(generation) == 20);
    CHECK(stat_of(engine, QWEN2_STATS_FAILED) == 1);
    qwen2_generation_free(generation);
    qwen2_request_free(good);
    qwen2_request_free(bad);
    qwen2_engine_free(engine);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

static void bad_settings(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = NULL;
    const char *keys[] = {"max_sequences", "cache_bytes", "prefill_chunk", "queue_limit"};
    for (int i = 0; i < 4; i++) {
        qwen2_engine_options *settings = qwen2_engine_options_new();
        if (i == 0) qwen2_engine_options_set_max_sequences(settings, 0);
        if (i == 1) qwen2_engine_options_set_cache_bytes(settings, 0);
        if (i == 2) qwen2_engine_options_set_prefill_chunk(settings, 0);
        if (i == 3) qwen2_engine_options_set_queue_limit(settings, 0);
        FAILS(qwen2_engine_new(model, settings, &engine, &error), QWEN2_ERROR_INVALID_ARGUMENT, keys[i]);
        FAILS(qwen2_engine_options_set_when_full(settings, 2, &error), QWEN2_ERROR_INVALID_ARGUMENT, "when_full");
        qwen2_engine_options_free(settings);
    }
    FAILS(qwen2_engine_options_set_when_full(NULL, 0, &error), QWEN2_ERROR_INVALID_ARGUMENT, "qwen2_engine_options");
    FAILS(qwen2_engine_new(NULL, NULL, &engine, &error), QWEN2_ERROR_INVALID_ARGUMENT, "qwen2_model");
    FAILS(qwen2_engine_new(model, NULL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "out");
    CHECK(engine == NULL);
    qwen2_engine_options_set_max_sequences(NULL, 3);
    qwen2_engine_options_free(NULL);
    qwen2_engine_free(NULL);
}

static void bad_requests(const qwen2_model *model, const qwen2_model *other) {
    qwen2_error *error = NULL;
    qwen2_request *request = NULL;
    qwen2_engine *engine = engine_of(model);
    qwen2_prompt *prompt = message("Hi"), *empty = qwen2_prompt_new();
    qwen2_options *options = greedy(4);
    const qwen2_status invalid = QWEN2_ERROR_INVALID_ARGUMENT;
    FAILS(qwen2_engine_submit(NULL, prompt, options, 0, NULL, &request, &error), invalid, "qwen2_engine");
    FAILS(qwen2_engine_submit(engine, NULL, options, 0, NULL, &request, &error), invalid, "qwen2_prompt");
    FAILS(qwen2_engine_submit(engine, prompt, options, 0, NULL, NULL, &error), invalid, "out");
    FAILS(qwen2_engine_submit(engine, prompt, options, 128, NULL, &request, &error), invalid, "priority");
    FAILS(qwen2_engine_submit(engine, prompt, options, -129, NULL, &request, &error), invalid, "priority");
    FAILS(qwen2_engine_submit(engine, prompt, options, 0, other, &request, &error), invalid, "model");
    FAILS(qwen2_engine_submit(engine, prompt, (const qwen2_options *)prompt, 0, NULL, &request, &error), invalid,
          "qwen2_options");
    FAILS(qwen2_engine_submit_callback(engine, prompt, options, 0, NULL, NULL, NULL, &request, &error), invalid,
          "callback");
    CHECK(qwen2_engine_submit(engine, empty, options, 0, NULL, &request, NULL) == invalid);
    qwen2_options_set_prompt_lookup(options, 4);
    FAILS(qwen2_engine_submit(engine, prompt, options, 0, NULL, &request, &error), QWEN2_ERROR_UNSUPPORTED,
          "prompt_lookup");
    CHECK(request == NULL && stat_of(engine, QWEN2_STATS_SUBMITTED) == 0);

    const char *text = NULL;
    qwen2_generation *generation = NULL;
    FAILS(qwen2_request_poll(NULL, &text, NULL, &error), invalid, "qwen2_request");
    FAILS(qwen2_request_next(NULL, &text, NULL, &error), invalid, "qwen2_request");
    FAILS(qwen2_request_finish(NULL, &generation, &error), invalid, "qwen2_request");
    CHECK(qwen2_request_token(NULL) == UINT32_MAX && isnan(qwen2_request_logprob(NULL)));
    CHECK(qwen2_request_cancel(NULL) == NULL && qwen2_request_top_logprobs(NULL, NULL, NULL) == 0);
    qwen2_request_free(NULL);
    request = submit(engine, "Hi", 4);
    FAILS(qwen2_request_poll(request, NULL, NULL, &error), invalid, "text");
    FAILS(qwen2_request_finish(request, NULL, &error), invalid, "out");
    qwen2_request_free(request);
    FAILS(qwen2_request_poll(request, &text, NULL, &error), invalid, "qwen2_request");
    qwen2_request_free(request);
    qwen2_engine_free(engine);
    qwen2_prompt_free(prompt);
    qwen2_prompt_free(empty);
    qwen2_options_free(options);
}

/* The library writes as many numbers as there is room for, and no more. */
static void short_arrays(const qwen2_model *model) {
    qwen2_engine *engine = engine_of(model);
    uint64_t stats[QWEN2_N_STATS + 3];
    for (size_t room = 0; room <= QWEN2_N_STATS + 3; room++) {
        const size_t n = room < QWEN2_N_STATS ? room : QWEN2_N_STATS;
        memset(stats, 0x55, sizeof stats);
        CHECK(qwen2_engine_stats(engine, stats, room) == QWEN2_N_STATS);
        for (size_t i = 0; i < QWEN2_N_STATS + 3; i++)
            CHECK((stats[i] == UINT64_C(0x5555555555555555)) == (i >= n));
    }
    CHECK(qwen2_engine_stats(engine, NULL, 0) == QWEN2_N_STATS);
    CHECK(qwen2_engine_stats(NULL, stats, 3) == 0);
    CHECK(strcmp(qwen2_status_name(QWEN2_PENDING), "pending") == 0);
    qwen2_engine_free(engine);
}

static void adapters(const char *fixture, const char *adapter) {
    qwen2_error *error = NULL;
    qwen2_model *model = load(fixture), *adapted = NULL, *twice = NULL;
    OK(qwen2_model_with_adapter(model, adapter, NUL, &adapted, &error));
    OK(qwen2_model_with_adapter(adapted, adapter, strlen(adapter), &twice, &error));
    CHECK(qwen2_model_n_adapters(model) == 0 && qwen2_model_adapter(model, 0) == NULL);
    CHECK(qwen2_model_n_adapters(adapted) == 1 && strcmp(qwen2_model_adapter(adapted, 0), adapter) == 0);
    CHECK(qwen2_model_n_adapters(twice) == 2 && strcmp(qwen2_model_adapter(twice, 1), adapter) == 0);
    CHECK(qwen2_model_adapter(twice, 2) == NULL);
    CHECK(qwen2_model_n_adapters(NULL) == 0 && qwen2_model_adapter(NULL, 0) == NULL);

    /* Each request by its own handle, as alone. */
    qwen2_engine_options *settings = qwen2_engine_options_new();
    qwen2_engine_options_set_deterministic(settings, 1);
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, settings, &engine, &error));
    qwen2_engine_options_free(settings);
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(16);
    const qwen2_model *handles[] = {model, adapted, NULL, twice};
    qwen2_request *requests[4];
    qwen2_generation *got[4];
    for (int i = 0; i < 4; i++)
        OK(qwen2_engine_submit(engine, prompt, options, 0, handles[i], &requests[i], &error));
    for (int i = 0; i < 4; i++) {
        qwen2_generation *alone = NULL;
        OK(qwen2_request_finish(requests[i], &got[i], &error));
        OK(qwen2_generate(handles[i] == NULL ? model : handles[i], prompt, options, &alone, &error));
        same(got[i], alone);
        qwen2_generation_free(alone);
        qwen2_request_free(requests[i]);
    }
    CHECK(memcmp(qwen2_generation_tokens(got[0], NULL), qwen2_generation_tokens(got[1], NULL), 64) != 0);
    for (int i = 0; i < 4; i++)
        qwen2_generation_free(got[i]);

    qwen2_model *none = NULL;
    FAILS(qwen2_model_with_adapter(NULL, adapter, NUL, &none, &error), QWEN2_ERROR_INVALID_ARGUMENT, "qwen2_model");
    FAILS(qwen2_model_with_adapter(model, NULL, NUL, &none, &error), QWEN2_ERROR_INVALID_ARGUMENT, "path");
    FAILS(qwen2_model_with_adapter(model, adapter, NUL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "out");
    CHECK(qwen2_model_with_adapter(model, "/nowhere", NUL, &none, NULL) == QWEN2_ERROR_NOT_FOUND && none == NULL);
    qwen2_engine_free(engine);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
    qwen2_model_free(twice);
    qwen2_model_free(adapted);
    qwen2_model_free(model);
}

static void inspected(const char *fixture, const char *adapter) {
    qwen2_error *error = NULL;
    qwen2_text *text = NULL;
    size_t len = 0;
    OK(qwen2_inspect(fixture, NUL, &text, &error));
    const char *json = qwen2_text_data(text, &len);
    CHECK(strlen(json) == len && json[0] == '{' && json[len - 1] == '}');
    const char *keys[] = {"\"container\":\"safetensors\"", "\"config\":{", "\"generation_config\":{", "\"stored_bytes\":",
                          "\"formats\":{", "\"weight_bytes\":", "\"num_hidden_layers\":"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        CHECK(strstr(json, keys[i]) != NULL);
    qwen2_text_free(text);
    text = NULL;
    OK(qwen2_inspect_adapter(adapter, strlen(adapter), &text, &error));
    CHECK(strstr(qwen2_text_data(text, NULL), "\"ranks\":[") != NULL);
    CHECK(strstr(qwen2_text_data(text, NULL), "\"q_proj\"") != NULL);
    qwen2_text_free(text);
    text = NULL;
    CHECK(qwen2_inspect("/nowhere", NUL, &text, NULL) == QWEN2_ERROR_NOT_FOUND);
    CHECK(qwen2_inspect_adapter("/nowhere", NUL, &text, NULL) == QWEN2_ERROR_NOT_FOUND);
    FAILS(qwen2_inspect(NULL, NUL, &text, &error), QWEN2_ERROR_INVALID_ARGUMENT, "path");
    FAILS(qwen2_inspect(fixture, NUL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "out");
    FAILS(qwen2_inspect_adapter(adapter, NUL, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "out");
    CHECK(text == NULL);
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    qwen2_model *model = load(argv[1]), *other = load(argv[2]);
    polled_in_turn(model);
    read_by_waiting(model);
    cancelled(model);
    freed_with_running_requests(model);
    full(model);
    own_options(model);
    priorities(model);
    bad_constraints(model);
    bad_settings(model);
    bad_requests(model, other);
    short_arrays(model);
    adapters(argv[2], argv[3]);
    inspected(argv[2], argv[3]);
    qwen2_model_free(other);
    qwen2_model_free(model);
    puts("engine: all well");
    return 0;
}
