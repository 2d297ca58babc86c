// Qwen2 for C++17: the handles of qwen2.h as values that free themselves, its errors as exceptions.
//
// Header only, over the C ABI: a program compiled with it runs with every library of the same ABI
// version. Objects move; Model also copies, sharing its weights. Threads: as in qwen2.h, where a
// `const` member function stands for `const T *`.
#ifndef QWEN2_HPP
#define QWEN2_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qwen2.h"

namespace qwen2 {

/// What a function of the library failed with; `what()` is one line, `what: where: why`.
class Error : public std::runtime_error {
public:
    Error(qwen2_status code, const std::string &message, std::string help)
        : std::runtime_error(message), code_(code), help_(std::move(help)) {}
    qwen2_status code() const noexcept { return code_; }             ///< QWEN2_ERROR_*
    const std::string &help() const noexcept { return help_; }       ///< the way out, or empty
private:
    qwen2_status code_;
    std::string help_;
};

namespace detail {
template <auto Free> struct Deleter {
    template <class T> void operator()(T *handle) const noexcept { Free(handle); }
};
template <class T, auto Free> using Handle = std::unique_ptr<T, Deleter<Free>>;

/// Calls `function(args..., &error)` and throws what it fails with.
template <class F, class... Args> qwen2_status call(F function, Args... args) {
    qwen2_error *error = nullptr;
    const qwen2_status status = function(args..., &error);
    if (status == QWEN2_OK || status == QWEN2_DONE || status == QWEN2_PENDING) return status;
    const Handle<qwen2_error, qwen2_error_free> guard(error);
    const char *help = qwen2_error_help(error);
    throw Error(status, qwen2_error_message(error), help ? help : "");
}

inline std::vector<std::uint32_t> tokens(qwen2_tokens *raw) {
    const Handle<qwen2_tokens, qwen2_tokens_free> guard(raw);
    std::size_t n = 0;
    const std::uint32_t *ids = qwen2_tokens_data(raw, &n);
    return {ids, ids + n};
}
inline std::string text(qwen2_text *raw) {
    const Handle<qwen2_text, qwen2_text_free> guard(raw);
    std::size_t len = 0;
    const char *data = qwen2_text_data(raw, &len);
    return {data, len};
}
} // namespace detail

/// A call of a tool that the model asks for.
struct ToolCall {
    std::string name;
    std::string arguments;                                           ///< the text of a JSON object
};

namespace detail {
template <class T, class Count, class Get> std::vector<ToolCall> calls(const T *raw, Count count, Get name, Get arguments) {
    std::vector<ToolCall> found;
    for (std::size_t i = 0, n = count(raw), name_len = 0, len = 0; i < n; i++) {
        const char *called = name(raw, i, &name_len), *given = arguments(raw, i, &len);
        found.push_back({std::string(called, name_len), std::string(given, len)});
    }
    return found;
}
} // namespace detail

/// Ends generations from any thread; copies share one switch only through Options and streams.
class Cancel {
public:
    Cancel() : raw_(qwen2_cancel_new()) {}
    explicit Cancel(qwen2_cancel *raw) : raw_(raw) {}
    void cancel() const noexcept { qwen2_cancel_now(raw_.get()); }
    bool is_cancelled() const noexcept { return qwen2_cancel_is_cancelled(raw_.get()) != 0; }
    const qwen2_cancel *get() const noexcept { return raw_.get(); }
private:
    detail::Handle<qwen2_cancel, qwen2_cancel_free> raw_;
};

/// Settings of a generation; what is not set is as the checkpoint says.
class Options {
public:
    Options() : raw_(qwen2_options_new()) {}
    static Options greedy() { return Options(qwen2_options_new_greedy()); }
    Options &max_new_tokens(std::size_t v) { return qwen2_options_set_max_new_tokens(raw_.get(), v), *this; }
    Options &temperature(float v) { return qwen2_options_set_temperature(raw_.get(), v), *this; }
    Options &top_k(std::size_t v) { return qwen2_options_set_top_k(raw_.get(), v), *this; }
    Options &top_p(float v) { return qwen2_options_set_top_p(raw_.get(), v), *this; }
    Options &min_p(float v) { return qwen2_options_set_min_p(raw_.get(), v), *this; }
    Options &typical_p(float v) { return qwen2_options_set_typical_p(raw_.get(), v), *this; }
    Options &repetition_penalty(float v) { return qwen2_options_set_repetition_penalty(raw_.get(), v), *this; }
    Options &presence_penalty(float v) { return qwen2_options_set_presence_penalty(raw_.get(), v), *this; }
    Options &frequency_penalty(float v) { return qwen2_options_set_frequency_penalty(raw_.get(), v), *this; }
    Options &logit_bias(std::uint32_t token, float v) {
        return qwen2_options_set_logit_bias(raw_.get(), token, v), *this;
    }
    Options &min_new_tokens(std::size_t v) { return qwen2_options_set_min_new_tokens(raw_.get(), v), *this; }
    Options &logprobs(std::size_t top) { return qwen2_options_set_logprobs(raw_.get(), top), *this; }
    Options &prompt_logprobs(std::size_t top) {
        return qwen2_options_set_prompt_logprobs(raw_.get(), top), *this;
    }
    Options &bad_word(std::string_view v) {
        detail::call(qwen2_options_add_bad_word, raw_.get(), v.data(), v.size());
        return *this;
    }
    Options &json_schema(std::string_view v) {
        detail::call(qwen2_options_set_json_schema, raw_.get(), v.data(), v.size());
        return *this;
    }
    Options &regex(std::string_view v) {
        detail::call(qwen2_options_set_regex, raw_.get(), v.data(), v.size());
        return *this;
    }
    Options &grammar(std::string_view v) {
        detail::call(qwen2_options_set_grammar, raw_.get(), v.data(), v.size());
        return *this;
    }
    /// A tool as OpenAI's interface describes it in JSON.
    Options &tool(std::string_view json) {
        detail::call(qwen2_options_add_tool, raw_.get(), json.data(), json.size());
        return *this;
    }
    Options &tool_choice(std::int32_t v) {                           ///< QWEN2_TOOL_CHOICE_*
        detail::call(qwen2_options_set_tool_choice, raw_.get(), v);
        return *this;
    }
    Options &tool_choice(std::string_view name) {
        detail::call(qwen2_options_set_tool_choice_name, raw_.get(), name.data(), name.size());
        return *this;
    }
    Options &tool_format(std::int32_t v) {                           ///< QWEN2_TOOL_FORMAT_*
        detail::call(qwen2_options_set_tool_format, raw_.get(), v);
        return *this;
    }
    /// `user_data` is borrowed until what is generated with these settings has ended.
    Options &logits_processor(qwen2_logits_processor_fn processor, void *user_data) {
        return qwen2_options_set_logits_processor(raw_.get(), processor, user_data), *this;
    }
    Options &seed(std::uint64_t v) { return qwen2_options_set_seed(raw_.get(), v), *this; }
    Options &ignore_eos(bool v) { return qwen2_options_set_ignore_eos(raw_.get(), v), *this; }
    Options &stop_token_id(std::uint32_t v) { return qwen2_options_add_stop_token_id(raw_.get(), v), *this; }
    Options &prompt_lookup(std::size_t v) { return qwen2_options_set_prompt_lookup(raw_.get(), v), *this; }
    Options &draft_tokens(std::size_t v) { return qwen2_options_set_draft_tokens(raw_.get(), v), *this; }
    Options &timeout(double seconds) { return qwen2_options_set_timeout(raw_.get(), seconds), *this; }
    Options &cancel(const Cancel &v) { return qwen2_options_set_cancel(raw_.get(), v.get()), *this; }
    Options &stop(std::string_view v) {
        detail::call(qwen2_options_add_stop, raw_.get(), v.data(), v.size());
        return *this;
    }
    const qwen2_options *get() const noexcept { return raw_.get(); }
private:
    explicit Options(qwen2_options *raw) : raw_(raw) {}
    detail::Handle<qwen2_options, qwen2_options_free> raw_;
};

/// Text, tokens or messages.
class Prompt {
public:
    Prompt() : raw_(qwen2_prompt_new()) {}
    Prompt(std::string_view text) : Prompt() {
        detail::call(qwen2_prompt_set_text, raw_.get(), text.data(), text.size());
    }
    Prompt(const char *text) : Prompt(std::string_view(text)) {}
    Prompt(const std::vector<std::uint32_t> &tokens) : Prompt() {
        detail::call(qwen2_prompt_set_tokens, raw_.get(), tokens.data(), tokens.size());
    }
    Prompt &message(std::string_view role, std::string_view content) & {
        detail::call(qwen2_prompt_add_message, raw_.get(), role.data(), role.size(), content.data(), content.size());
        return *this;
    }
    /// Adds a call to the last message, which is the assistant's.
    Prompt &tool_call(std::string_view name, std::string_view arguments) & {
        detail::call(qwen2_prompt_add_tool_call, raw_.get(), name.data(), name.size(), arguments.data(), arguments.size());
        return *this;
    }
    Prompt message(std::string_view role, std::string_view content) && { return std::move(message(role, content)); }
    const qwen2_prompt *get() const noexcept { return raw_.get(); }
    static Prompt user(std::string_view content) { return Prompt().message("user", content); }
private:
    detail::Handle<qwen2_prompt, qwen2_prompt_free> raw_;
};

/// A finished generation; its views live as long as it does.
class Generation {
public:
    explicit Generation(qwen2_generation *raw) : raw_(raw) {}
    std::string_view text() const {
        std::size_t len = 0;
        const char *data = qwen2_generation_text(raw_.get(), &len);
        return {data, len};
    }
    std::vector<std::uint32_t> tokens() const {
        std::size_t n = 0;
        const std::uint32_t *ids = qwen2_generation_tokens(raw_.get(), &n);
        return {ids, ids + n};
    }
    int finish_reason() const { return qwen2_generation_finish_reason(raw_.get()); } ///< QWEN2_FINISH_*
    std::uint64_t prompt_tokens() const { return qwen2_generation_prompt_tokens(raw_.get()); }
    std::uint64_t cached_tokens() const { return qwen2_generation_cached_tokens(raw_.get()); }
    std::uint64_t completion_tokens() const { return qwen2_generation_completion_tokens(raw_.get()); }
    std::uint64_t draft_tokens() const { return qwen2_generation_draft_tokens(raw_.get()); }
    std::uint64_t accepted_tokens() const { return qwen2_generation_accepted_tokens(raw_.get()); }
    double decode_tokens_per_s() const { return qwen2_generation_decode_tokens_per_s(raw_.get()); }
    /// Calls of tools that the model asks for.
    std::vector<ToolCall> tool_calls() const {
        return detail::calls(raw_.get(), qwen2_generation_n_tool_calls, qwen2_generation_tool_call_name,
                             qwen2_generation_tool_call_arguments);
    }
    const qwen2_generation *get() const noexcept { return raw_.get(); }            ///< for the other getters
private:
    detail::Handle<qwen2_generation, qwen2_generation_free> raw_;
};

/// A generation that runs as it is read: `while (auto piece = stream.next()) std::cout << *piece;`
class Stream {
public:
    explicit Stream(qwen2_stream *raw) : raw_(raw) {}
    /// The next piece, valid until the next call; nothing when it has ended.
    std::optional<std::string_view> next() {
        const char *data = nullptr;
        std::size_t len = 0;
        if (detail::call(qwen2_stream_next, raw_.get(), &data, &len) == QWEN2_DONE) return std::nullopt;
        return std::string_view(data, len);
    }
    std::uint32_t token() const { return qwen2_stream_token(raw_.get()); }
    /// Calls of tools that became whole with the last piece.
    std::vector<ToolCall> tool_calls() const {
        return detail::calls(raw_.get(), qwen2_stream_n_tool_calls, qwen2_stream_tool_call_name,
                             qwen2_stream_tool_call_arguments);
    }
    Cancel cancel() const { return Cancel(qwen2_stream_cancel(raw_.get())); }
    Generation finish() {
        qwen2_generation *out = nullptr;
        detail::call(qwen2_stream_finish, raw_.get(), &out);
        return Generation(out);
    }
private:
    detail::Handle<qwen2_stream, qwen2_stream_free> raw_;
};

/// A conversation that keeps its cache between turns.
class Session {
public:
    explicit Session(qwen2_session *raw) : raw_(raw) {}
    void append(const Prompt &prompt) { detail::call(qwen2_session_append, raw_.get(), prompt.get()); }
    Generation generate(const Options &options = {}) {
        qwen2_generation *out = nullptr;
        detail::call(qwen2_session_generate, raw_.get(), options.get(), &out);
        return Generation(out);
    }
    Stream stream(const Options &options = {}) {
        qwen2_stream *out = nullptr;
        detail::call(qwen2_session_stream, raw_.get(), options.get(), &out);
        return Stream(out);
    }
    Session fork() const {
        qwen2_session *out = nullptr;
        detail::call(qwen2_session_fork, raw_.get(), &out);
        return Session(out);
    }
    void truncate(std::size_t n_tokens) { detail::call(qwen2_session_truncate, raw_.get(), n_tokens); }
    void rollback(std::size_t n_messages) { detail::call(qwen2_session_rollback, raw_.get(), n_messages); }
    void shift(std::size_t keep_first, std::size_t n_tokens) {
        detail::call(qwen2_session_shift, raw_.get(), keep_first, n_tokens);
    }
    void shift_messages(std::size_t keep_first, std::size_t n_messages) {
        detail::call(qwen2_session_shift_messages, raw_.get(), keep_first, n_messages);
    }
    void save(std::string_view path) const { detail::call(qwen2_session_save, raw_.get(), path.data(), path.size()); }
    std::vector<std::uint32_t> tokens() const {
        qwen2_tokens *out = nullptr;
        detail::call(qwen2_session_tokens, raw_.get(), &out);
        return detail::tokens(out);
    }
private:
    detail::Handle<qwen2_session, qwen2_session_free> raw_;
};

/// Text to tokens and back; needs no weights.
class Tokenizer {
public:
    explicit Tokenizer(qwen2_tokenizer *raw) : raw_(raw) {}
    static Tokenizer load(std::string_view path) {
        qwen2_tokenizer *out = nullptr;
        detail::call(qwen2_tokenizer_load, path.data(), path.size(), &out);
        return Tokenizer(out);
    }
    std::vector<std::uint32_t> encode(std::string_view text) const {
        qwen2_tokens *out = nullptr;
        detail::call(qwen2_tokenizer_encode, raw_.get(), text.data(), text.size(), &out);
        return detail::tokens(out);
    }
    std::vector<std::uint32_t> encode_chat(const Prompt &messages, bool add_generation_prompt = true) const {
        qwen2_tokens *out = nullptr;
        detail::call(qwen2_tokenizer_encode_chat, raw_.get(), messages.get(), add_generation_prompt, &out);
        return detail::tokens(out);
    }
    std::string decode(const std::vector<std::uint32_t> &tokens, bool skip_special_tokens = true) const {
        qwen2_text *out = nullptr;
        detail::call(qwen2_tokenizer_decode, raw_.get(), tokens.data(), tokens.size(), skip_special_tokens, &out);
        return detail::text(out);
    }
private:
    detail::Handle<qwen2_tokenizer, qwen2_tokenizer_free> raw_;
};

/// How to load a model.
struct LoadOptions {
    std::string device = "auto", dtype, quantize;                    ///< empty: as stored
    std::string kv_cache, activations;                               ///< empty: the default
    std::string adapter;                                             ///< directory of a LoRA adapter; empty: none
    bool preload = false;                                            ///< copy the weights into memory
    bool screened_head = false;                                      ///< rank tokens in four bits first
    std::optional<std::size_t> context_length, threads;
    std::string long_context;                                        ///< empty: yarn
    std::function<bool(std::uint64_t done, std::uint64_t total)> progress; ///< false stops; must not throw
};

/// Packs a checkpoint, "q8" or "q4", into a new directory, which loads at once and takes less room.
inline void quantize(std::string_view source, std::string_view destination, std::string_view precision = "q8") {
    detail::call(qwen2_quantize, source.data(), source.size(), destination.data(), destination.size(), precision.data(),
                 precision.size(), nullptr, nullptr);
}

/// Converts a checkpoint into a GGUF file, if the name ends in .gguf, or a directory of safetensors; an empty
/// dtype: as stored.
inline void convert(std::string_view source, std::string_view destination, std::string_view dtype = {}) {
    detail::call(qwen2_convert, source.data(), source.size(), destination.data(), destination.size(),
                 dtype.empty() ? nullptr : dtype.data(), dtype.size(), nullptr, nullptr);
}

/// As convert, with a LoRA adapter, as PEFT saves it, added to the weights.
inline void merge_lora(std::string_view source, std::string_view adapter, std::string_view destination,
                       std::string_view dtype = {}) {
    detail::call(qwen2_merge_lora, source.data(), source.size(), adapter.data(), adapter.size(), destination.data(),
                 destination.size(), dtype.empty() ? nullptr : dtype.data(), dtype.size(), nullptr, nullptr);
}

/// What a checkpoint is, as JSON, without reading its weights.
inline std::string inspect(std::string_view source) {
    qwen2_text *out = nullptr;
    detail::call(qwen2_inspect, source.data(), source.size(), &out);
    return detail::text(out);
}

/// What a LoRA adapter is, as JSON.
inline std::string inspect_adapter(std::string_view directory) {
    qwen2_text *out = nullptr;
    detail::call(qwen2_inspect_adapter, directory.data(), directory.size(), &out);
    return detail::text(out);
}

/// A loaded model; copies share the weights.
class Model {
public:
    static Model load(std::string_view path, const LoadOptions &options = {}) {
        const detail::Handle<qwen2_load_options, qwen2_load_options_free> raw(qwen2_load_options_new());
        const auto set = [&](auto setter, std::string_view v) { detail::call(setter, raw.get(), v.data(), v.size()); };
        set(qwen2_load_options_set_device, options.device);
        if (!options.dtype.empty()) set(qwen2_load_options_set_dtype, options.dtype);
        if (!options.quantize.empty()) set(qwen2_load_options_set_quantize, options.quantize);
        if (!options.kv_cache.empty()) set(qwen2_load_options_set_kv_cache, options.kv_cache);
        if (!options.adapter.empty()) set(qwen2_load_options_set_adapter, options.adapter);
        if (!options.activations.empty()) set(qwen2_load_options_set_activations, options.activations);
        qwen2_load_options_set_preload(raw.get(), options.preload);
        qwen2_load_options_set_screened_head(raw.get(), options.screened_head);
        if (options.context_length) qwen2_load_options_set_context_length(raw.get(), *options.context_length);
        if (!options.long_context.empty()) set(qwen2_load_options_set_long_context, options.long_context);
        if (options.threads) qwen2_load_options_set_threads(raw.get(), *options.threads);
        if (options.progress) qwen2_load_options_set_progress(raw.get(), on_progress, const_cast<LoadOptions *>(&options));
        qwen2_model *out = nullptr;
        detail::call(qwen2_model_load, path.data(), path.size(), raw.get(), &out);
        return Model(out);
    }
    Model(const Model &other) : raw_(qwen2_model_clone(other.raw_.get())) {}
    Model &operator=(const Model &other) { return raw_.reset(qwen2_model_clone(other.raw_.get())), *this; }
    Model(Model &&) noexcept = default;
    Model &operator=(Model &&) noexcept = default;
    ~Model() = default;

    Generation generate(const Prompt &prompt, const Options &options = {}) const {
        qwen2_generation *out = nullptr;
        detail::call(qwen2_generate, raw_.get(), prompt.get(), options.get(), &out);
        return Generation(out);
    }
    Stream stream(const Prompt &prompt, const Options &options = {}) const {
        qwen2_stream *out = nullptr;
        detail::call(qwen2_stream_new, raw_.get(), prompt.get(), options.get(), &out);
        return Stream(out);
    }
    Session session() const {
        qwen2_session *out = nullptr;
        detail::call(qwen2_session_new, raw_.get(), &out);
        return Session(out);
    }
    Session open_session(std::string_view path) const {
        qwen2_session *out = nullptr;
        detail::call(qwen2_session_open, raw_.get(), path.data(), path.size(), &out);
        return Session(out);
    }
    /// This model with a smaller one beside it, which proposes tokens.
    Model with_draft(const Model &draft) const {
        qwen2_model *out = nullptr;
        detail::call(qwen2_model_with_draft, raw_.get(), draft.raw_.get(), &out);
        return Model(out);
    }
    /// This model with a LoRA adapter, as PEFT saves it, beside its weights, which both share.
    Model with_adapter(std::string_view directory) const {
        qwen2_model *out = nullptr;
        detail::call(qwen2_model_with_adapter, raw_.get(), directory.data(), directory.size(), &out);
        return Model(out);
    }
    /// The directories of its adapters, in the order they were added.
    std::vector<std::string> adapters() const {
        std::vector<std::string> found;
        for (std::size_t i = 0; i < qwen2_model_n_adapters(raw_.get()); i++)
            found.emplace_back(qwen2_model_adapter(raw_.get(), i));
        return found;
    }
    /// Reads the weights in, and has a GPU compile its kernels, before the first request.
    void warmup() const { detail::call(qwen2_model_warmup, raw_.get(), nullptr); }
    Tokenizer tokenizer() const { return Tokenizer(qwen2_model_tokenizer(raw_.get())); }
    std::string name() const { return qwen2_model_name(raw_.get()); }
    std::string device() const { return qwen2_model_device(raw_.get()); }
    std::size_t context_length() const { return static_cast<std::size_t>(qwen2_model_context_length(raw_.get())); }
    const qwen2_model *get() const noexcept { return raw_.get(); }                 ///< for the other functions
private:
    explicit Model(qwen2_model *raw) : raw_(raw) {}
    static std::int32_t on_progress(std::uint64_t done, std::uint64_t total, void *options) {
        return static_cast<const LoadOptions *>(options)->progress(done, total) ? 0 : 1;
    }
    detail::Handle<qwen2_model, qwen2_model_free> raw_;
};

/// A request to an engine; freeing it stops it.
class Request {
public:
    explicit Request(qwen2_request *raw) : raw_(raw) {}
    /// What poll finds: a piece, nothing yet, or the end.
    struct Polled {
        qwen2_status status;                                         ///< QWEN2_OK, QWEN2_PENDING or QWEN2_DONE
        std::string_view piece;                                      ///< valid until the next call
    };
    /// Never waits.
    Polled poll() {
        const char *data = nullptr;
        std::size_t len = 0;
        const qwen2_status status = detail::call(qwen2_request_poll, raw_.get(), &data, &len);
        return {status, data ? std::string_view(data, len) : std::string_view()};
    }
    /// Waits for the next piece, valid until the next call; nothing when it has ended.
    std::optional<std::string_view> next() {
        const char *data = nullptr;
        std::size_t len = 0;
        if (detail::call(qwen2_request_next, raw_.get(), &data, &len) == QWEN2_DONE) return std::nullopt;
        return std::string_view(data, len);
    }
    std::uint32_t token() const { return qwen2_request_token(raw_.get()); }
    /// Calls of tools that became whole with the last piece.
    std::vector<ToolCall> tool_calls() const {
        return detail::calls(raw_.get(), qwen2_request_n_tool_calls, qwen2_request_tool_call_name,
                             qwen2_request_tool_call_arguments);
    }
    Cancel cancel() const { return Cancel(qwen2_request_cancel(raw_.get())); }
    Generation finish() {
        qwen2_generation *out = nullptr;
        detail::call(qwen2_request_finish, raw_.get(), &out);
        return Generation(out);
    }
private:
    detail::Handle<qwen2_request, qwen2_request_free> raw_;
};

/// How to set up an engine; what is not set has its default.
struct EngineOptions {
    std::optional<std::size_t> max_sequences, prefill_chunk, queue_limit;
    std::optional<std::uint64_t> cache_bytes;
    bool wait_when_full = false;                                     ///< instead of throwing
    bool prefix_cache = true;                                        ///< compute common beginnings once
    bool deterministic = false;                                      ///< the same bits alone and among others
};

/// Many requests on one model, computed together; any number of threads may submit.
class Engine {
public:
    explicit Engine(const Model &model, const EngineOptions &options = {}) {
        const detail::Handle<qwen2_engine_options, qwen2_engine_options_free> raw(qwen2_engine_options_new());
        qwen2_engine_options *set = raw.get();
        if (options.max_sequences) qwen2_engine_options_set_max_sequences(set, *options.max_sequences);
        if (options.prefill_chunk) qwen2_engine_options_set_prefill_chunk(set, *options.prefill_chunk);
        if (options.queue_limit) qwen2_engine_options_set_queue_limit(set, *options.queue_limit);
        if (options.cache_bytes) qwen2_engine_options_set_cache_bytes(set, *options.cache_bytes);
        const std::int32_t when_full = options.wait_when_full ? QWEN2_WHEN_FULL_WAIT : QWEN2_WHEN_FULL_REFUSE;
        detail::call(qwen2_engine_options_set_when_full, set, when_full);
        qwen2_engine_options_set_prefix_cache(set, options.prefix_cache);
        qwen2_engine_options_set_deterministic(set, options.deterministic);
        qwen2_engine *out = nullptr;
        detail::call(qwen2_engine_new, model.get(), set, &out);
        raw_.reset(out);
    }
    /// `model`: the engine's own, or one made of it by with_adapter.
    Request submit(const Prompt &prompt, const Options &options = {}, int priority = 0,
                   const Model *model = nullptr) const {
        qwen2_request *out = nullptr;
        detail::call(qwen2_engine_submit, raw_.get(), prompt.get(), options.get(), priority,
                     model ? model->get() : nullptr, &out);
        return Request(out);
    }
    /// `callback` hears the pieces and the end, see qwen2_request_fn; it must not throw. `user_data` is borrowed
    /// until then, or until the request goes.
    Request submit(const Prompt &prompt, const Options &options, qwen2_request_fn callback, void *user_data,
                   int priority = 0, const Model *model = nullptr) const {
        qwen2_request *out = nullptr;
        detail::call(qwen2_engine_submit_callback, raw_.get(), prompt.get(), options.get(), priority,
                     model ? model->get() : nullptr, callback, user_data, &out);
        return Request(out);
    }
    /// Its numbers; their places are QWEN2_STATS_*.
    std::array<std::uint64_t, QWEN2_N_STATS> stats() const {
        std::array<std::uint64_t, QWEN2_N_STATS> numbers{};
        qwen2_engine_stats(raw_.get(), numbers.data(), numbers.size());
        return numbers;
    }
    const qwen2_engine *get() const noexcept { return raw_.get(); }
private:
    detail::Handle<qwen2_engine, qwen2_engine_free> raw_;
};

} // namespace qwen2

#endif // QWEN2_HPP
