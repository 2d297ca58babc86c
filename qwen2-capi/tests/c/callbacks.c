/* Requests that callbacks hear, on the demo model in argv[1]. Is C11 and C++17. */
#include <pthread.h>

#include "check.h"

typedef struct Heard Heard;

/* What one callback heard, and what it is to do at its first piece. */
struct Heard {
    char text[4096];
    int n_pieces, stop_at;
    qwen2_status end;
    int has_ended;
    void (*at_first)(Heard *heard, qwen2_request *request);
    int done;
    const qwen2_model *model;
    qwen2_engine *engine;
    qwen2_request *other;
    Heard *next;
    pthread_t thread;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended = PTHREAD_COND_INITIALIZER;

static int32_t hear(qwen2_request *request, qwen2_status status, const char *text, size_t len, void *user_data) {
    Heard *heard = (Heard *)user_data;
    CHECK(!heard->has_ended && text[len] == '\0' && strlen(text) == len);
    heard->thread = pthread_self();
    if (status == QWEN2_OK) {
        CHECK(strlen(heard->text) + len < sizeof heard->text);
        strcat(heard->text, text);
        heard->n_pieces++;
        if (heard->n_pieces == 1 && heard->at_first != NULL) heard->at_first(heard, request);
        return heard->n_pieces == heard->stop_at;
    }
    CHECK(len == 0);
    pthread_mutex_lock(&lock);
    heard->end = status;
    heard->has_ended = 1;
    pthread_cond_broadcast(&ended);
    pthread_mutex_unlock(&lock);
    return 0;
}

static void wait_for(Heard *heard) {
    pthread_mutex_lock(&lock);
    while (!heard->has_ended)
        pthread_cond_wait(&ended, &lock);
    pthread_mutex_unlock(&lock);
}

static qwen2_engine *engine_of(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, NULL, &engine, &error));
    return engine;
}

/* The request goes on by itself where `out` is NULL. */
static void submit(const qwen2_engine *engine, size_t max_new_tokens, Heard *heard, qwen2_request **out) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = message("Count from 3 to 9.");
    qwen2_options *options = greedy(max_new_tokens);
    OK(qwen2_engine_submit_callback(engine, prompt, options, 0, NULL, hear, heard, out, &error));
    qwen2_prompt_free(prompt);
    qwen2_options_free(options);
}

static Heard *new_heard(void) { return (Heard *)calloc(1, sizeof(Heard)); }

/* 16 at once hear what generate gives; half of them without a handle, all on one thread. */
static void told(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = engine_of(model);
    Heard *heard[16];
    qwen2_request *requests[16] = {NULL};
    for (int i = 0; i < 16; i++) {
        heard[i] = new_heard();
        submit(engine, 24, heard[i], i % 2 ? &requests[i] : NULL);
    }
    qwen2_prompt *prompt = message("Count from 3 to 9.");
    qwen2_options *options = greedy(24);
    qwen2_generation *alone = NULL;
    OK(qwen2_generate(model, prompt, options, &alone, &error));
    for (int i = 0; i < 16; i++) {
        wait_for(heard[i]);
        CHECK(heard[i]->end == QWEN2_DONE && heard[i]->n_pieces == 24);
        CHECK(strcmp(heard[i]->text, qwen2_generation_text(alone, NULL)) == 0);
        CHECK(pthread_equal(heard[i]->thread, heard[0]->thread) && !pthread_equal(heard[i]->thread, pthread_self()));
        if (requests[i] != NULL) {
            const char *text = NULL;
            qwen2_generation *generation = NULL;
            FAILS(qwen2_request_poll(requests[i], &text, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "request");
            FAILS(qwen2_request_next(requests[i], &text, NULL, &error), QWEN2_ERROR_INVALID_ARGUMENT, "request");
            OK(qwen2_request_finish(requests[i], &generation, &error));
            CHECK(strcmp(heard[i]->text, qwen2_generation_text(generation, NULL)) == 0);
            size_t n = 0;
            const uint32_t *tokens = qwen2_generation_tokens(generation, &n);
            CHECK(qwen2_request_token(requests[i]) == tokens[n - 1]);
            qwen2_generation_free(generation);
            FAILS(qwen2_request_finish(requests[i], &generation, &error), QWEN2_ERROR_INVALID_ARGUMENT, "request");
            qwen2_request_free(requests[i]);
        }
    }
    qwen2_engine_free(engine);
    for (int i = 0; i < 16; i++)
        free(heard[i]);
    qwen2_generation_free(alone);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

static void stopped_by_its_answer(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = engine_of(model);
    Heard *heard = new_heard();
    heard->stop_at = 3;
    qwen2_request *request = NULL;
    qwen2_generation *generation = NULL;
    submit(engine, 900, heard, &request);
    OK(qwen2_request_finish(request, &generation, &error));
    CHECK(qwen2_generation_finish_reason(generation) == QWEN2_FINISH_CANCELLED);
    wait_for(heard);
    CHECK(heard->end == QWEN2_DONE && heard->n_pieces == 3);
    CHECK(strncmp(qwen2_generation_text(generation, NULL), heard->text, strlen(heard->text)) == 0);
    qwen2_generation_free(generation);
    qwen2_request_free(request);
    qwen2_engine_free(engine);
    free(heard);
}

/* Everything that a callback may do; what could only wait for ever fails. */
static void use_the_library(Heard *heard, qwen2_request *request) {
    qwen2_error *error = NULL;
    qwen2_generation *generation = NULL;
    uint64_t stats[QWEN2_N_STATS];
    CHECK(qwen2_engine_stats(heard->engine, stats, QWEN2_N_STATS) == QWEN2_N_STATS);
    CHECK(stats[QWEN2_STATS_SUBMITTED] >= 1);
    FAILS(qwen2_request_finish(request, &generation, &error), QWEN2_ERROR_INVALID_ARGUMENT, "request");
    submit(heard->engine, 8, heard->next, &heard->other);
    FAILS(qwen2_request_finish(heard->other, &generation, &error), QWEN2_ERROR_INVALID_ARGUMENT, "request");

    qwen2_prompt *prompt = message("What is 2 plus 3?");
    qwen2_options *options = greedy(4);
    OK(qwen2_generate(heard->model, prompt, options, &generation, &error));
    qwen2_generation_free(generation);
    qwen2_request *read = NULL;
    OK(qwen2_engine_submit(heard->engine, prompt, options, 0, NULL, &read, &error));
    OK(qwen2_request_finish(read, &generation, &error));
    CHECK(qwen2_generation_completion_tokens(generation) == 4);
    qwen2_generation_free(generation);
    qwen2_request_free(read);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
    heard->done = 1;
}

static void entering_again(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = engine_of(model);
    Heard *heard = new_heard();
    heard->at_first = use_the_library;
    heard->model = model;
    heard->engine = engine;
    heard->next = new_heard();
    submit(engine, 40, heard, NULL);
    wait_for(heard);
    wait_for(heard->next);
    CHECK(heard->done && heard->end == QWEN2_DONE && heard->n_pieces == 40);
    CHECK(heard->next->end == QWEN2_DONE && heard->next->n_pieces == 8);
    qwen2_generation *generation = NULL;
    OK(qwen2_request_finish(heard->other, &generation, &error));
    qwen2_generation_free(generation);
    qwen2_request_free(heard->other);
    qwen2_engine_free(engine);
    free(heard->next);
    free(heard);
}

/* A full queue refuses what a callback submits, also where others would wait. */
static void find_it_full(Heard *heard, qwen2_request *request) {
    qwen2_error *error = NULL;
    qwen2_prompt *prompt = message("Hi");
    qwen2_options *options = greedy(4);
    qwen2_request *none = NULL;
    CHECK(request != NULL);
    qwen2_status status = QWEN2_OK;
    for (int i = 0; status == QWEN2_OK && i < 3; i++)
        status = qwen2_engine_submit_callback(heard->engine, prompt, options, 0, NULL, hear, heard->next, &none, &error);
    FAILS(status, QWEN2_ERROR_OUT_OF_MEMORY, "queue_limit");
    qwen2_request_free(none);
    qwen2_prompt_free(prompt);
    qwen2_options_free(options);
    heard->done = 1;
}

static void full(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine_options *settings = qwen2_engine_options_new();
    qwen2_engine_options_set_max_sequences(settings, 1);
    qwen2_engine_options_set_queue_limit(settings, 1);
    OK(qwen2_engine_options_set_when_full(settings, QWEN2_WHEN_FULL_WAIT, &error));
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, settings, &engine, &error));
    qwen2_engine_options_free(settings);
    Heard *heard = new_heard();
    heard->engine = engine;
    heard->at_first = find_it_full;
    heard->next = new_heard();
    submit(engine, 600, heard, NULL);
    wait_for(heard);
    CHECK(heard->done && heard->end == QWEN2_DONE && heard->n_pieces == 600);
    qwen2_engine_free(engine);
    free(heard->next);
    free(heard);
}

static void freed_with_running_requests(const qwen2_model *model) {
    qwen2_error *error = NULL;
    qwen2_engine *engine = engine_of(model);
    Heard *one = new_heard(), *two = new_heard();
    qwen2_request *request = NULL;
    submit(engine, 900, one, &request);
    submit(engine, 900, two, NULL);
    qwen2_engine_free(engine);
    /* No waiting: they have heard. */
    CHECK(one->has_ended && one->end == QWEN2_ERROR_CANCELLED);
    CHECK(two->has_ended && two->end == QWEN2_ERROR_CANCELLED);
    qwen2_generation *generation = NULL;
    for (int i = 0; i < 2; i++)
        FAILS(qwen2_request_finish(request, &generation, &error), QWEN2_ERROR_CANCELLED, NULL);
    qwen2_request_free(request);
    free(one);
    free(two);
}

/* Whoever has freed a request hears no more of it, and may let go of what the callback used. */
static void freed_requests(const qwen2_model *model) {
    qwen2_engine *engine = engine_of(model);
    for (int i = 0; i < 50; i++) {
        Heard *heard = new_heard();
        qwen2_request *request = NULL;
        submit(engine, 900, heard, &request);
        if (i % 2)
            while (qwen2_request_token(request) == UINT32_MAX) {
            }
        qwen2_request_free(request);
        CHECK(!heard->has_ended);
        free(heard);
    }
    qwen2_engine_free(engine);
}

static void free_itself(Heard *heard, qwen2_request *request) {
    qwen2_request_free(request);
    heard->done = 1;
}

static void free_the_engine(Heard *heard, qwen2_request *request) {
    CHECK(request != NULL);
    qwen2_engine_free(heard->engine);
    heard->done = 1;
}

static void freed_inside_callbacks(const qwen2_model *model) {
    qwen2_engine *engine = engine_of(model);
    Heard *heard = new_heard(), *other = new_heard();
    heard->at_first = free_itself;
    submit(engine, 900, heard, NULL);
    submit(engine, 30, other, NULL);
    wait_for(other);
    qwen2_engine_free(engine);
    CHECK(heard->done && heard->n_pieces == 1 && !heard->has_ended);
    free(heard);
    free(other);

    heard = new_heard(), other = new_heard();
    heard->engine = engine_of(model);
    heard->at_first = free_the_engine;
    submit(heard->engine, 900, other, NULL);
    submit(heard->engine, 900, heard, NULL);
    wait_for(heard);
    wait_for(other);
    CHECK(heard->done && heard->end == QWEN2_ERROR_CANCELLED && other->end == QWEN2_ERROR_CANCELLED);
    free(heard);
    free(other);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    qwen2_model *model = load(argv[1]);
    told(model);
    stopped_by_its_answer(model);
    entering_again(model);
    full(model);
    freed_with_running_requests(model);
    freed_requests(model);
    freed_inside_callbacks(model);
    qwen2_model_free(model);
    puts("callbacks: all well");
    return 0;
}
