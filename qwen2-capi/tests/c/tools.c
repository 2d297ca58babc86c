/* Constraints and tools, on the model in argv[1]. Is C11 and C++17. */
#include "check.h"

static qwen2_error *error = NULL;

static void fails(qwen2_status status, qwen2_status want) {
    CHECK(status == want && error != NULL && qwen2_error_code(error) == want);
    qwen2_error_free(error);
    error = NULL;
}

static const char TOOL[] =
    "{\"type\": \"function\", \"function\": {\"name\": \"measure\", \"strict\": true, \"parameters\": {\"type\": "
    "\"object\", \"properties\": {\"size\": {\"enum\": [\"small\"]}}, \"required\": [\"size\"], "
    "\"additionalProperties\": false}}}";

static qwen2_prompt *question(void) {
    qwen2_prompt *prompt = qwen2_prompt_new();
    OK(qwen2_prompt_add_message(prompt, "user", NUL, "What is 2 plus 3?", NUL, &error));
    return prompt;
}

static void constraints(const qwen2_model *model) {
    qwen2_prompt *prompt = question();
    qwen2_options *options = qwen2_options_new_greedy();
    qwen2_generation *generation = NULL;
    const char *texts[] = {"one two", "one two"};
    const size_t lens[] = {7, 3};

    OK(qwen2_options_set_choice(options, texts, NULL, 1, &error));
    OK(qwen2_generate(model, prompt, options, &generation, &error));
    CHECK(strcmp(qwen2_generation_text(generation, NULL), "one two") == 0);
    CHECK(qwen2_generation_finish_reason(generation) == QWEN2_FINISH_STOP);
    CHECK(qwen2_generation_stop_match(generation) == QWEN2_STOP_MATCH_CONSTRAINT);
    CHECK(qwen2_generation_n_tool_calls(generation) == 0);
    CHECK(qwen2_generation_tool_call_name(generation, 0, NULL) == NULL);
    qwen2_generation_free(generation);

    OK(qwen2_options_set_choice(options, texts + 1, lens + 1, 1, &error));
    OK(qwen2_generate(model, prompt, options, &generation, &error));
    CHECK(strcmp(qwen2_generation_text(generation, NULL), "one") == 0);
    qwen2_generation_free(generation);

    OK(qwen2_options_set_regex(options, "[0-9]{3}", NUL, &error));
    OK(qwen2_generate(model, prompt, options, &generation, &error));
    CHECK(strspn(qwen2_generation_text(generation, NULL), "0123456789") == 3);
    qwen2_generation_free(generation);

    OK(qwen2_options_set_grammar(options, "start: \"x\" | \"yy\"", NUL, &error));
    OK(qwen2_generate(model, prompt, options, &generation, &error));
    CHECK(strchr("xy", qwen2_generation_text(generation, NULL)[0]) != NULL);
    qwen2_generation_free(generation);

    OK(qwen2_options_set_json_schema(options, "{\"const\": [true]}", NUL, &error));
    OK(qwen2_generate(model, prompt, options, &generation, &error));
    CHECK(strstr(qwen2_generation_text(generation, NULL), "true") != NULL);
    qwen2_generation_free(generation);

    OK(qwen2_options_set_json_schema(options, "{\"type\": \"animal\"}", NUL, &error));
    fails(qwen2_generate(model, prompt, options, &generation, &error), QWEN2_ERROR_INVALID_CONSTRAINT);
    fails(qwen2_options_set_regex(options, NULL, NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT);
    fails(qwen2_options_set_choice(options, NULL, NULL, 2, &error), QWEN2_ERROR_INVALID_ARGUMENT);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
}

static void tools(const qwen2_model *model) {
    const int32_t formats[] = {QWEN2_TOOL_FORMAT_HERMES, QWEN2_TOOL_FORMAT_QWEN_AGENT, QWEN2_TOOL_FORMAT_DEFAULT};
    for (size_t i = 0; i < 3; i++) {
        qwen2_prompt *prompt = question();
        qwen2_options *options = qwen2_options_new_greedy();
        qwen2_generation *generation = NULL;
        size_t len = 0;
        OK(qwen2_options_add_tool(options, TOOL, NUL, &error));
        OK(qwen2_options_set_tool_format(options, formats[i], &error));
        OK(qwen2_options_set_tool_choice_name(options, "measure", NUL, &error));
        OK(qwen2_generate(model, prompt, options, &generation, &error));
        CHECK(qwen2_generation_finish_reason(generation) == QWEN2_FINISH_TOOL_CALLS);
        CHECK(qwen2_generation_n_tool_calls(generation) == 1);
        CHECK(strcmp(qwen2_generation_tool_call_name(generation, 0, &len), "measure") == 0 && len == 7);
        const char *arguments = qwen2_generation_tool_call_arguments(generation, 0, &len);
        CHECK(strstr(arguments, "\"small\"") != NULL && len == strlen(arguments));
        CHECK(qwen2_generation_tool_call_arguments(generation, 1, &len) == NULL && len == 0);

        fails(qwen2_prompt_add_tool_call(prompt, "measure", NUL, arguments, len, &error), QWEN2_ERROR_INVALID_ARGUMENT);
        OK(qwen2_prompt_add_message(prompt, "assistant", NUL, "", NUL, &error));
        OK(qwen2_prompt_add_tool_call(prompt, "measure", NUL, arguments, NUL, &error));
        OK(qwen2_prompt_add_message(prompt, "tool", NUL, "5", NUL, &error));
        qwen2_generation_free(generation);
        OK(qwen2_options_set_tool_choice(options, QWEN2_TOOL_CHOICE_NONE, &error));
        qwen2_options_set_max_new_tokens(options, 3);
        OK(qwen2_generate(model, prompt, options, &generation, &error));
        qwen2_generation_free(generation);

        fails(qwen2_options_add_tool(options, "{}", NUL, &error), QWEN2_ERROR_INVALID_ARGUMENT);
        fails(qwen2_options_set_tool_choice(options, 9, &error), QWEN2_ERROR_INVALID_ARGUMENT);
        fails(qwen2_options_set_tool_format(options, -1, &error), QWEN2_ERROR_INVALID_ARGUMENT);
        qwen2_options_free(options);
        qwen2_prompt_free(prompt);
    }
}

/* What a reader collects, piece by piece. */
typedef struct {
    char text[512], name[32], arguments[64];
    size_t n_calls, n_ends;
} heard;

static void hear(heard *all, const char *text, size_t n_calls, const char *name, const char *arguments) {
    strcat(all->text, text);
    CHECK((n_calls > 0) == (name != NULL) && (n_calls > 0) == (arguments != NULL));
    if (n_calls > 0) {
        strcpy(all->name, name);
        strcpy(all->arguments, arguments);
    }
    all->n_calls += n_calls;
}

static int32_t on_request(qwen2_request *request, qwen2_status status, const char *text, size_t len, void *user_data) {
    heard *all = (heard *)user_data;
    CHECK(status == QWEN2_OK || status == QWEN2_DONE);
    CHECK(strlen(text) == len);
    hear(all, text, qwen2_request_n_tool_calls(request), qwen2_request_tool_call_name(request, 0, NULL),
         qwen2_request_tool_call_arguments(request, 0, NULL));
    all->n_ends += status == QWEN2_DONE;
    return 0;
}

/* The same calls and the same text as of the whole generation. */
static void same(const heard *all, const qwen2_generation *whole) {
    CHECK(all->n_calls == qwen2_generation_n_tool_calls(whole) && all->n_calls == 1);
    CHECK(strcmp(all->name, qwen2_generation_tool_call_name(whole, 0, NULL)) == 0);
    CHECK(strcmp(all->arguments, qwen2_generation_tool_call_arguments(whole, 0, NULL)) == 0);
    CHECK(strcmp(all->text, qwen2_generation_text(whole, NULL)) == 0);
    CHECK(strchr(all->text, '{') == NULL);
}

static void read_stream(qwen2_stream *stream, const qwen2_generation *whole) {
    heard all;
    const char *text;
    size_t len = 9;
    memset(&all, 0, sizeof all);
    CHECK(qwen2_stream_n_tool_calls(stream) == 0);
    CHECK(qwen2_stream_tool_call_name(stream, 0, &len) == NULL && len == 0);
    while (qwen2_stream_next(stream, &text, NULL, &error) == QWEN2_OK) {
        const char *name = qwen2_stream_tool_call_name(stream, 0, &len);
        CHECK(len == (name == NULL ? 0 : strlen(name)));
        const char *arguments = qwen2_stream_tool_call_arguments(stream, 0, &len);
        CHECK(len == (arguments == NULL ? 0 : strlen(arguments)));
        CHECK(qwen2_stream_tool_call_arguments(stream, 1, &len) == NULL && len == 0);
        hear(&all, text, qwen2_stream_n_tool_calls(stream), name, arguments);
    }
    CHECK(error == NULL);
    same(&all, whole);
    /* Whoever looks once more is not told the same call twice. */
    CHECK(qwen2_stream_n_tool_calls(stream) == 0 && qwen2_stream_tool_call_name(stream, 0, NULL) == NULL);
    qwen2_stream_free(stream);
}

static void read_request(qwen2_request *request, const qwen2_generation *whole) {
    heard all;
    const char *text;
    memset(&all, 0, sizeof all);
    CHECK(qwen2_request_n_tool_calls(request) == 0);
    while (qwen2_request_next(request, &text, NULL, &error) == QWEN2_OK)
        hear(&all, text, qwen2_request_n_tool_calls(request), qwen2_request_tool_call_name(request, 0, NULL),
             qwen2_request_tool_call_arguments(request, 0, NULL));
    CHECK(error == NULL);
    same(&all, whole);
    CHECK(qwen2_request_n_tool_calls(request) == 0);
    qwen2_request_free(request);
}

/* A call comes with the piece that completes it, of a stream, of a session and of an engine. */
static void streams(const qwen2_model *model) {
    const int32_t formats[] = {QWEN2_TOOL_FORMAT_HERMES, QWEN2_TOOL_FORMAT_QWEN_AGENT};
    qwen2_engine *engine = NULL;
    OK(qwen2_engine_new(model, NULL, &engine, &error));
    for (size_t i = 0; i < 2; i++) {
        qwen2_prompt *prompt = question();
        qwen2_options *options = qwen2_options_new_greedy();
        qwen2_generation *whole = NULL, *again = NULL;
        qwen2_stream *stream = NULL;
        qwen2_session *session = NULL;
        qwen2_request *request = NULL;
        heard all;
        memset(&all, 0, sizeof all);
        OK(qwen2_options_add_tool(options, TOOL, NUL, &error));
        OK(qwen2_options_set_tool_format(options, formats[i], &error));
        OK(qwen2_options_set_tool_choice(options, QWEN2_TOOL_CHOICE_REQUIRED, &error));
        OK(qwen2_generate(model, prompt, options, &whole, &error));

        OK(qwen2_stream_new(model, prompt, options, &stream, &error));
        read_stream(stream, whole);
        OK(qwen2_session_new(model, &session, &error));
        OK(qwen2_session_append(session, prompt, &error));
        OK(qwen2_session_stream(session, options, &stream, &error));
        read_stream(stream, whole);
        qwen2_session_free(session);

        OK(qwen2_engine_submit(engine, prompt, options, 0, NULL, &request, &error));
        read_request(request, whole);
        OK(qwen2_engine_submit_callback(engine, prompt, options, 0, NULL, on_request, &all, &request, &error));
        OK(qwen2_request_finish(request, &again, &error));
        qwen2_request_free(request);
        CHECK(all.n_ends <= 1);
        same(&all, again);
        qwen2_generation_free(again);
        qwen2_generation_free(whole);
        qwen2_options_free(options);
        qwen2_prompt_free(prompt);
    }
    qwen2_engine_free(engine);
    CHECK(qwen2_stream_n_tool_calls(NULL) == 0 && qwen2_stream_tool_call_name(NULL, 0, NULL) == NULL);
    CHECK(qwen2_request_n_tool_calls(NULL) == 0 && qwen2_request_tool_call_arguments(NULL, 0, NULL) == NULL);
}

int main(int argc, char **argv) {
    qwen2_model *model = NULL;
    CHECK(argc == 2);
    OK(qwen2_model_load(argv[1], NUL, NULL, &model, &error));
    constraints(model);
    tools(model);
    streams(model);
    qwen2_model_free(model);
    puts("tools: all well");
    return 0;
}
