// The engine, adapters and inspection through qwen2.hpp: on the demo model in argv[1], the fixture in argv[2]
// and its adapter in argv[3].
#include <cstdio>
#include <string>
#include <vector>

#include "check.h"
#include "qwen2.hpp"

static std::int32_t hear(qwen2_request *, qwen2_status status, const char *text, std::size_t len, void *user_data) {
    auto *heard = static_cast<std::string *>(user_data);
    heard->append(text, len);
    return status == QWEN2_OK && heard->size() > 10;
}

static void requests(const qwen2::Model &model) {
    qwen2::EngineOptions settings;
    settings.max_sequences = 3;
    const qwen2::Engine engine(model, settings);
    const auto options = std::move(qwen2::Options::greedy().max_new_tokens(24));
    std::vector<qwen2::Request> running;
    std::vector<std::string> alone, texts(6);
    for (int i = 0; i < 6; i++) {
        const auto prompt = qwen2::Prompt::user("What is " + std::to_string(i) + " plus 3?");
        alone.emplace_back(model.generate(prompt, options).text());
        running.push_back(engine.submit(prompt, options, i % 2));
    }
    for (std::size_t n_ended = 0; n_ended < running.size();) {
        n_ended = 0;
        for (std::size_t i = 0; i < running.size(); i++) {
            const auto polled = running[i].poll();
            texts[i].append(polled.piece);
            n_ended += polled.status == QWEN2_DONE;
        }
    }
    for (std::size_t i = 0; i < running.size(); i++) {
        CHECK(texts[i] == alone[i] && !running[i].next());
        CHECK(running[i].finish().text() == alone[i]);
    }
    CHECK(engine.stats()[QWEN2_STATS_FINISHED] == 6);

    std::string heard;
    auto told = engine.submit(qwen2::Prompt::user("Count from 3 to 9."), qwen2::Options::greedy(), hear, &heard);
    const auto generation = told.finish();
    CHECK(generation.finish_reason() == QWEN2_FINISH_CANCELLED && heard.size() > 10);
    CHECK(generation.text().substr(0, heard.size()) == heard);
    auto cancelled = engine.submit(qwen2::Prompt::user("Hi"), std::move(qwen2::Options().ignore_eos(true)));
    cancelled.cancel().cancel();
    CHECK(cancelled.finish().finish_reason() == QWEN2_FINISH_CANCELLED);
}

static const char *const TOOL = R"({"type": "function", "function": {"name": "measure", "strict": true, "parameters":
    {"type": "object", "properties": {"size": {"enum": ["small"]}}, "required": ["size"], "additionalProperties": false}}})";

/* The calls of everything that is read. */
template <class Reader> static std::vector<qwen2::ToolCall> calls_of(Reader reader) {
    std::vector<qwen2::ToolCall> calls;
    while (reader.next())
        for (auto &call : reader.tool_calls()) calls.push_back(std::move(call));
    CHECK(reader.tool_calls().empty());
    return calls;
}

static void tools(const qwen2::Model &model) {
    const qwen2::Engine engine(model);
    auto options = qwen2::Options::greedy();
    options.tool(TOOL).tool_choice("measure").tool_format(QWEN2_TOOL_FORMAT_HERMES);
    auto prompt = qwen2::Prompt::user("What is 2 plus 3?");
    const auto whole = model.generate(prompt, options).tool_calls();
    CHECK(whole.size() == 1 && whole[0].name == "measure");
    CHECK(whole[0].arguments.find("\"small\"") != std::string::npos);
    for (const auto &calls : {calls_of(model.stream(prompt, options)), calls_of(engine.submit(prompt, options))})
        CHECK(calls.size() == 1 && calls[0].name == "measure" && calls[0].arguments == whole[0].arguments);
    prompt.message("assistant", "").tool_call(whole[0].name, whole[0].arguments).message("tool", "5");
    CHECK(!model.generate(prompt, qwen2::Options::greedy().regex("[0-9]")).text().empty());
}

static void adapters(const char *fixture, const char *adapter) {
    const auto model = qwen2::Model::load(fixture);
    const auto adapted = model.with_adapter(adapter);
    CHECK(model.adapters().empty() && adapted.adapters() == std::vector<std::string>{adapter});
    qwen2::EngineOptions settings;
    settings.deterministic = true;
    const qwen2::Engine engine(model, settings);
    const auto options = std::move(qwen2::Options::greedy().max_new_tokens(8).ignore_eos(true));
    const auto prompt = qwen2::Prompt::user("Hi");
    const auto tokens = engine.submit(prompt, options, 0, &adapted).finish().tokens();
    CHECK(tokens == adapted.generate(prompt, options).tokens() && tokens != model.generate(prompt, options).tokens());
    CHECK(qwen2::inspect(fixture).find("\"weight_bytes\":") != std::string::npos);
    CHECK(qwen2::inspect_adapter(adapter).find("\"ranks\":") != std::string::npos);
    const auto other = qwen2::Model::load(fixture);
    try {
        engine.submit(prompt, options, 0, &other);
        CHECK(false);
    } catch (const qwen2::Error &error) {
        CHECK(error.code() == QWEN2_ERROR_INVALID_ARGUMENT && !error.help().empty());
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    requests(qwen2::Model::load(argv[1]));
    tools(qwen2::Model::load(argv[1]));
    adapters(argv[2], argv[3]);
    std::puts("engine: all well");
}
