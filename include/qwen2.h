/* Qwen2 language models in your own program.
 *
 * Generated from qwen2-capi/src by `QWEN2_BLESS=1 cargo test -p qwen2-capi --test header`; do not edit.
 *
 * Threads: a function that takes `const T *` may run concurrently with others like it on the same
 * object; one that takes `T *` needs the object alone. Different objects are independent, also those
 * made from one model. Nothing has to be initialised or shut down.
 *
 * Ownership: what *_new, *_load, *_clone and `**out` give is yours and is freed with the *_free of
 * its type; *_free(NULL) is allowed. Getters return memory that lives as long as their object. What
 * you pass in is copied before the function returns, unless its comment says "borrowed".
 *
 * Text is UTF-8, given as pointer and length in bytes; the length QWEN2_NUL_TERMINATED lets the
 * library call strlen. It may hold NUL where a length is given. Text that comes out has a NUL
 * behind it as well.
 *
 * Errors: a function that can fail returns a status. If it is not QWEN2_OK (or QWEN2_DONE of a
 * stream, or QWEN2_PENDING of a request), the outputs are untouched and *error, if error is not
 * NULL, is a new object that you free with qwen2_error_free; it is untouched on success. Nothing is
 * printed and nothing aborts: a bug of the library arrives as QWEN2_ERROR_INTERNAL.
 *
 * NULL, freed and foreign handles are found where the library can tell, and reported as
 * QWEN2_ERROR_INVALID_ARGUMENT; functions without a status then do nothing or return what their
 * comment says. Do not count on it: a new object may have the address of a freed one.
 */


#ifndef QWEN2_H
#define QWEN2_H

#include <stddef.h>
#include <stdint.h>

/* A length that lets the library call strlen. */
#define QWEN2_NUL_TERMINATED SIZE_MAX


// The version of the binary interface that this header describes: the number behind
// `libqwen2.so.`. It changes when something that compiled and ran would no longer do so.
#define QWEN2_ABI_VERSION 0

// The mean of the tokens' hidden states.
#define QWEN2_POOLING_MEAN 0

// The last token's hidden state, which is what embedding models made of Qwen2 are trained for.
#define QWEN2_POOLING_LAST_TOKEN 1

// An end token, a stop token or a stop string came; which one, says `qwen2_generation_stop_match`.
#define QWEN2_FINISH_STOP 1

// `max_new_tokens` or the end of the context was reached.
#define QWEN2_FINISH_LENGTH 2

// The model asks for tools to be called.
#define QWEN2_FINISH_TOOL_CALLS 3

// The caller cancelled; the text so far is kept.
#define QWEN2_FINISH_CANCELLED 4

// The timeout passed; the text so far is kept.
#define QWEN2_FINISH_TIMEOUT 5

// No stop: the generation ended for another reason.
#define QWEN2_STOP_MATCH_NONE 0

// An end token of the checkpoint.
#define QWEN2_STOP_MATCH_EOS 1

// One of the caller's stop tokens.
#define QWEN2_STOP_MATCH_TOKEN 2

// One of the caller's stop strings.
#define QWEN2_STOP_MATCH_TEXT 3

// The constraint, which allows nothing more.
#define QWEN2_STOP_MATCH_CONSTRAINT 4

// A request fails with `QWEN2_ERROR_OUT_OF_MEMORY` when the queue is full.
#define QWEN2_WHEN_FULL_REFUSE 0

// A request waits in `qwen2_engine_submit` until the queue has room.
#define QWEN2_WHEN_FULL_WAIT 1

// Places in the array of `qwen2_engine_stats`. Requests that wait to be started, now.
#define QWEN2_STATS_WAITING 0

// Requests that are computed, now.
#define QWEN2_STATS_RUNNING 1

// Requests that were submitted since the engine's start, from which all below count.
#define QWEN2_STATS_SUBMITTED 2

// Requests that ended, cancelled and failed ones included.
#define QWEN2_STATS_FINISHED 3

// Requests that ended with an error.
#define QWEN2_STATS_FAILED 4

// Requests whose cache was dropped for lack of memory, to be computed again.
#define QWEN2_STATS_PREEMPTED 5

// Steps of the network.
#define QWEN2_STATS_STEPS 6

// Tokens of prompts that were computed.
#define QWEN2_STATS_PROMPT_TOKENS 7

// Tokens of prompts that were shared with earlier requests.
#define QWEN2_STATS_CACHED_TOKENS 8

// Tokens that were generated.
#define QWEN2_STATS_COMPLETION_TOKENS 9

// Bytes of caches and shared prefixes, now.
#define QWEN2_STATS_CACHE_BYTES 10

// Bytes that they may take.
#define QWEN2_STATS_CACHE_LIMIT 11

// How many numbers this header knows.
#define QWEN2_N_STATS 12

// The model calls tools as it decides.
#define QWEN2_TOOL_CHOICE_AUTO 0

// The tools are not shown to the model.
#define QWEN2_TOOL_CHOICE_NONE 1

// The model calls at least one tool.
#define QWEN2_TOOL_CHOICE_REQUIRED 2

// As the checkpoint's chat template has it: Hermes' form where it knows tools, else Qwen-Agent's.
#define QWEN2_TOOL_FORMAT_DEFAULT 0

// `<tool_call>` with a JSON object.
#define QWEN2_TOOL_FORMAT_HERMES 1

// Qwen-Agent's form for Qwen2, with FUNCTION and ARGS between flowers.
#define QWEN2_TOOL_FORMAT_QWEN_AGENT 2

// Something failed that was not reported as an error.
#define QWEN2_LOG_ERROR 1

// Something is not as it was asked for.
#define QWEN2_LOG_WARN 2

// Milestones, such as a model that is loaded.
#define QWEN2_LOG_INFO 3

// Details for finding mistakes.
#define QWEN2_LOG_DEBUG 4

// A switch that ends generations from any thread. It has no way back: one for each generation.
typedef struct qwen2_cancel qwen2_cancel;

// An engine: requests join and leave at every step of one model, each weight is read once for all of
// them, and what prompts have in common is computed once. Any number of threads may submit.
typedef struct qwen2_engine qwen2_engine;

// Settings of an engine; what is not set has its default. Checked when an engine is made of them.
typedef struct qwen2_engine_options qwen2_engine_options;

// What went wrong, where, and the way out. Owned by the caller that received it.
typedef struct qwen2_error qwen2_error;

// A finished generation. Owned by the caller that received it; never changes.
typedef struct qwen2_generation qwen2_generation;

// Settings for loading a model; what is not set has its default.
typedef struct qwen2_load_options qwen2_load_options;

// Logits of every token of a sequence. Owned by the caller that received it; never changes.
typedef struct qwen2_logits qwen2_logits;

// A loaded model, shared by any number of threads. Streams, sessions and tokenizers made from it
// keep what they need: it may be freed before them.
typedef struct qwen2_model qwen2_model;

// Settings of a generation. What is not set is as the checkpoint's `generation_config.json` says,
// then as the setter says. Values are checked when a generation starts; the error names the field.
// They work in this order: logit_bias, repetition_penalty, presence_penalty and frequency_penalty,
// bad words, min_new_tokens, the logits processor; then, unless greedy, temperature, top_k, top_p, min_p,
// typical_p.
typedef struct qwen2_options qwen2_options;

// A prompt: text, tokens or chat messages. A new one is empty, and can be used again and again.
typedef struct qwen2_prompt qwen2_prompt;

// A request to an engine. It keeps what it needs: engine, prompt and options may be freed before it.
typedef struct qwen2_request qwen2_request;

// One conversation: what was said so far, and the cache of it. While a stream of it runs, it is the
// stream's: other functions that read or change the conversation fail.
typedef struct qwen2_session qwen2_session;

// A generation that runs as it is read, of a model or in a session. It keeps what it needs: model,
// session, prompt and options may be freed before it.
typedef struct qwen2_stream qwen2_stream;

// A text that a function returned. Owned by the caller that received it; never changes.
typedef struct qwen2_text qwen2_text;

// Turns text into tokens and back; needs no weights. Never changes, and is shared by any number of
// threads.
typedef struct qwen2_tokenizer qwen2_tokenizer;

// Token ids that a function returned. Owned by the caller that received it; never changes.
typedef struct qwen2_tokens qwen2_tokens;

// `QWEN2_OK`, `QWEN2_DONE`, `QWEN2_PENDING` or one of `QWEN2_ERROR_*`. Values only get added.
typedef int32_t qwen2_status;

// Called while a model loads, with the bytes done and in all, on the thread that loads, and never
// after `qwen2_model_load` has returned. Returns 0 to go on; anything else stops the loading, which
// then fails with `QWEN2_ERROR_CANCELLED`. A download counts first, then the weights count anew.
// It must return: no `longjmp`, no C++ exception.
typedef int32_t (*qwen2_progress_fn)(uint64_t bytes_done, uint64_t bytes_total, void *user_data);

// Called while a prompt is read, after every layer of every chunk, with the tokens done, those that were
// in the cache included, and in all; the last time both are equal. It is called on the thread that is
// in `qwen2_generate`, `qwen2_stream_next` or the like, and only then. Returns 0 to go on; anything else
// ends the generation, which then has the finish reason CANCELLED. It must return: no `longjmp`, no C++
// exception.
typedef int32_t (*qwen2_prefill_fn)(uint64_t tokens_done, uint64_t tokens_total, void *user_data);

// Called before each choice, behind penalties and bans and before temperature and filters, on the thread
// that generates: `tokens` are those of the prompt and of the output so far, `logits` one number for each
// id of the vocabulary, to be changed in place; `-INFINITY` forbids a token. Both are valid during the
// call only. Returns 0 to go on; anything else ends the generation, which then fails with
// `QWEN2_ERROR_CANCELLED`. It must not use the stream or the session that calls it, which fails; on an
// engine's thread it must neither wait for a request of the engine nor free the engine. It must return: no
// `longjmp`, no C++ exception.
typedef int32_t (*qwen2_logits_processor_fn)(const uint32_t *tokens,
                                             size_t n_tokens,
                                             float *logits,
                                             size_t n_logits,
                                             void *user_data);

// Hears a request. `status` is `QWEN2_OK` with the next piece in `text`, whole UTF-8, NUL-terminated,
// perhaps empty, `len` bytes, valid during the call; then, once, with an empty text, `QWEN2_DONE`, or the
// status that the request failed with. `qwen2_request_finish` gives the result from then on, and
// `qwen2_request_free` may be called, in the callback too.
//
// Returns 0 to go on; anything else ends the request, which then has the finish reason CANCELLED, gets no
// more pieces, and hears its end still. It is called on a thread of the engine's, the same for all callbacks
// of that engine and never on two at once, so it holds up the others. It may call every function of the
// library: it may submit, where a full queue refuses it whatever the engine's settings; only what would
// wait for another request that has a callback fails. It must return: no `longjmp`, no C++ exception.
typedef int32_t (*qwen2_request_fn)(qwen2_request *request,
                                    qwen2_status status,
                                    const char *text,
                                    size_t len,
                                    void *user_data);

// Called with one event: `level` is one of `QWEN2_LOG_*`, `message` one line of UTF-8,
// NUL-terminated, valid during the call. It is called on threads that are inside a function of this
// library, on several at once perhaps, and must return without calling the library.
typedef void (*qwen2_log_fn)(int32_t level, const char *message, size_t len, void *user_data);

// Success.
#define QWEN2_OK 0

// A stream or a request has ended; not an error.
#define QWEN2_DONE (-1)

// A request has no piece yet; not an error.
#define QWEN2_PENDING (-2)

// An argument is out of its range or contradicts another one; NULL and freed handles; text that is
// not UTF-8.
#define QWEN2_ERROR_INVALID_ARGUMENT 1

// A file, directory or model id does not exist.
#define QWEN2_ERROR_NOT_FOUND 2

// The operating system refuses access.
#define QWEN2_ERROR_PERMISSION_DENIED 3

// Reading or writing failed.
#define QWEN2_ERROR_IO 4

// A file is there but does not hold what it must.
#define QWEN2_ERROR_INVALID_FILE 5

// Well-formed, but something this build or this library does not do.
#define QWEN2_ERROR_UNSUPPORTED 6

// Prompt and new tokens do not fit the context.
#define QWEN2_ERROR_CONTEXT_OVERFLOW 7

// Memory of the host or of the device is exhausted.
#define QWEN2_ERROR_OUT_OF_MEMORY 8

// The device was not compiled in or is not there.
#define QWEN2_ERROR_DEVICE_UNAVAILABLE 9

// The device failed while it worked.
#define QWEN2_ERROR_DEVICE_FAILED 10

// A model could not be fetched.
#define QWEN2_ERROR_NETWORK 11

// The chat template cannot be parsed or rendered.
#define QWEN2_ERROR_INVALID_TEMPLATE 12

// A schema or grammar cannot be compiled.
#define QWEN2_ERROR_INVALID_CONSTRAINT 13

// The caller stopped it: a callback the loading or the generation, the end of an engine its requests.
#define QWEN2_ERROR_CANCELLED 14

// A bug of this library.
#define QWEN2_ERROR_INTERNAL 99

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The ABI version of the library at run time; compare it with `QWEN2_ABI_VERSION`.
uint32_t qwen2_abi_version(void);

// The version of the library, for example "0.1.0"; never freed.
const char *qwen2_version(void);

// The devices that this build of the library can use, separated by commas, for example
// "cpu,vulkan"; never freed. Whether one is there, shows when a model is loaded on it.
const char *qwen2_devices(void);

// The status that the failed function returned; `QWEN2_OK` for NULL.
qwen2_status qwen2_error_code(const qwen2_error *error);

// One line, `what: where: why`; never NULL. Valid until the error is freed.
const char *qwen2_error_message(const qwen2_error *error);

// The way out, a sentence for a person, or NULL. Valid until the error is freed.
const char *qwen2_error_help(const qwen2_error *error);

// The file or directory concerned, or NULL. Valid until the error is freed.
const char *qwen2_error_path(const qwen2_error *error);

// The tensor, config key, option or argument concerned, or NULL. Valid until the error is freed.
const char *qwen2_error_key(const qwen2_error *error);

// Frees an error; NULL is allowed.
void qwen2_error_free(qwen2_error *error);

// The name of a status, for example "invalid_argument"; "unknown" for a number that is none. Never
// freed.
const char *qwen2_status_name(qwen2_status status);

// New settings, nothing set. Freed with `qwen2_load_options_free`.
qwen2_load_options *qwen2_load_options_new(void);

// Frees the settings; NULL is allowed. Models loaded with them are not affected.
void qwen2_load_options_free(qwen2_load_options *options);

// Where to compute: "auto" (the default), "cpu", "cuda", "vulkan", "metal", "wgpu", "webgpu" or
// "ndarray"; GPUs take an index, as in "cuda:1". `qwen2_devices` says which of them this build has.
qwen2_status qwen2_load_options_set_device(qwen2_load_options *options,
                                           const char *device,
                                           size_t len,
                                           qwen2_error **error);

// The precision to keep the weights in: "f32", "f16" or "bf16"; default: as stored.
qwen2_status qwen2_load_options_set_dtype(qwen2_load_options *options,
                                          const char *dtype,
                                          size_t len,
                                          qwen2_error **error);

// A directory with a LoRA adapter of PEFT's, which is added to the weights while they are loaded.
qwen2_status qwen2_load_options_set_adapter(qwen2_load_options *options,
                                            const char *directory,
                                            size_t len,
                                            qwen2_error **error);

// Packs the weights into fewer bits while loading: "q8" or "q4"; default: as stored.
qwen2_status qwen2_load_options_set_quantize(qwen2_load_options *options,
                                             const char *quantize,
                                             size_t len,
                                             qwen2_error **error);

// What keys and values are kept in: "f32", "f16", "bf16", "q8" or "q4"; default: f32 for f32
// weights, else f16.
qwen2_status qwen2_load_options_set_kv_cache(qwen2_load_options *options,
                                             const char *kv_cache,
                                             size_t len,
                                             qwen2_error **error);

// The precision that prefill multiplies bf16 weights in: "f32", the default, or "bf16", which is
// faster on processors with bf16 dot products and rounds the activations.
qwen2_status qwen2_load_options_set_activations(qwen2_load_options *options,
                                                const char *activations,
                                                size_t len,
                                                qwen2_error **error);

// Whether to copy the weights into memory of this process instead of using them from the file, which
// may then change or lie on a slow disk; 0 or 1, default 0.
void qwen2_load_options_set_preload(qwen2_load_options *options, int32_t preload);

// Whether a copy of the packed head in four bits ranks the tokens, so that only the best are computed
// by the head itself, for greedy choice and top_k up to 64; 0 or 1, default 0. Checked when a model is
// loaded: it is for packed weights on the CPU.
void qwen2_load_options_set_screened_head(qwen2_load_options *options, int32_t screened_head);

// Tokens that prompt and answer may have together; more than the model was made for stretches it, see
// `qwen2_load_options_set_long_context`; default: all of it. Checked when a model is loaded.
void qwen2_load_options_set_context_length(qwen2_load_options *options, size_t n_tokens);

// What a context beyond the trained length is reached by: "yarn", the default; "yarn_when_needed", which
// leaves sequences up to the trained length as they are; or "dual_chunk", attention in chunks.
qwen2_status qwen2_load_options_set_long_context(qwen2_load_options *options,
                                                 const char *long_context,
                                                 size_t len,
                                                 qwen2_error **error);

// Threads on the processor, 1 to 1024; default: as many as affinity and cgroup allow. Checked when a
// model is loaded.
void qwen2_load_options_set_threads(qwen2_load_options *options, size_t n_threads);

// Who hears how far loading is; NULL: nobody, the default. `user_data` is borrowed until every
// `qwen2_model_load` with these settings has returned.
void qwen2_load_options_set_progress(qwen2_load_options *options,
                                     qwen2_progress_fn progress,
                                     void *user_data);

// Packs the checkpoint `source`, a directory or an id, into the new directory `destination`, which
// loads at once and takes less room, or into a GGUF file if its name ends in .gguf; `quantize` is "q8"
// or "q4". `destination` must not exist, and is
// there whole or not at all. `progress` may be NULL; it is called on this thread, and never after
// the return.
qwen2_status qwen2_quantize(const char *source,
                            size_t source_len,
                            const char *destination,
                            size_t destination_len,
                            const char *quantize,
                            size_t quantize_len,
                            qwen2_progress_fn progress,
                            void *user_data,
                            qwen2_error **error);

// Converts the checkpoint `source`, a directory, a GGUF file or an id, into `destination`: a GGUF file
// if its name ends in .gguf, else a directory of safetensors. `dtype` is "f32", "f16" or "bf16"; NULL:
// as stored, and blocks of a GGUF file as bf16. `destination` must not exist, and is there whole or not
// at all. `progress` may be NULL; it is called on this thread, and never after
// the return.
qwen2_status qwen2_convert(const char *source,
                           size_t source_len,
                           const char *destination,
                           size_t destination_len,
                           const char *dtype,
                           size_t dtype_len,
                           qwen2_progress_fn progress,
                           void *user_data,
                           qwen2_error **error);

// As `qwen2_convert`, with the LoRA adapter in the directory `adapter`, as PEFT saves it, added to the
// weights.
qwen2_status qwen2_merge_lora(const char *source,
                              size_t source_len,
                              const char *adapter,
                              size_t adapter_len,
                              const char *destination,
                              size_t destination_len,
                              const char *dtype,
                              size_t dtype_len,
                              qwen2_progress_fn progress,
                              void *user_data,
                              qwen2_error **error);

// Loads a checkpoint: a directory with `config.json`, `tokenizer.json` and safetensors, or, where
// the library was built with `hub`, an id such as "Qwen/Qwen2-0.5B-Instruct". `options` may be NULL
// for the defaults. `*out` is freed with `qwen2_model_free`.
qwen2_status qwen2_model_load(const char *path,
                              size_t len,
                              const qwen2_load_options *options,
                              qwen2_model **out,
                              qwen2_error **error);

// Frees the handle; NULL is allowed. The weights go with the last handle, stream and session.
void qwen2_model_free(qwen2_model *model);

// Another handle to the same weights, freed with `qwen2_model_free`; NULL for a handle that is none.
qwen2_model *qwen2_model_clone(const qwen2_model *model);

// A handle to `model` with `draft`, a smaller model of the same vocabulary, which proposes tokens; several
// are checked in one step, and the tokens stay those of `model` alone. Both handles stay usable, and are
// freed on their own. `*out` is freed with `qwen2_model_free`.
qwen2_status qwen2_model_with_draft(const qwen2_model *model,
                                    const qwen2_model *draft,
                                    qwen2_model **out,
                                    qwen2_error **error);

// Answers a prompt. `options` may be NULL: as the checkpoint says. `*out` is freed with
// `qwen2_generation_free`.
qwen2_status qwen2_generate(const qwen2_model *model,
                            const qwen2_prompt *prompt,
                            const qwen2_options *options,
                            qwen2_generation **out,
                            qwen2_error **error);

// The logits of every token of a sequence, for measurements. `*out` is freed with
// `qwen2_logits_free`.
qwen2_status qwen2_model_logits(const qwen2_model *model,
                                const uint32_t *tokens,
                                size_t n_tokens,
                                qwen2_logits **out,
                                qwen2_error **error);

// Natural log-probability of each token given those before it. The first has none: `scores` is the
// caller's array of `n_tokens - 1` numbers.
qwen2_status qwen2_model_score(const qwen2_model *model,
                               const uint32_t *tokens,
                               size_t n_tokens,
                               float *scores,
                               qwen2_error **error);

// As `qwen2_model_logits`, until `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
qwen2_status qwen2_model_logits_with(const qwen2_model *model,
                                     const uint32_t *tokens,
                                     size_t n_tokens,
                                     const qwen2_cancel *cancel,
                                     qwen2_logits **out,
                                     qwen2_error **error);

// As `qwen2_model_score`, until `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
qwen2_status qwen2_model_score_with(const qwen2_model *model,
                                    const uint32_t *tokens,
                                    size_t n_tokens,
                                    const qwen2_cancel *cancel,
                                    float *scores,
                                    qwen2_error **error);

// Readies the device for the first request: reads every weight once, or of a layer's experts those that a
// few tokens visit, and has a GPU's driver compile the kernels for prompts of all lengths. Nothing of it
// stays in a cache, and no answer changes. `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
qwen2_status qwen2_model_warmup(const qwen2_model *model, const qwen2_cancel *cancel, qwen2_error **error);

// The logits, row-major: one row for each token, one column for each id of the vocabulary; the
// sizes go to `n_tokens` and `vocab_size` (may be NULL). Valid until the logits are freed. NULL,
// and 0 in both, for a handle that is none.
const float *qwen2_logits_data(const qwen2_logits *logits, size_t *n_tokens, size_t *vocab_size);

// Frees logits; NULL is allowed.
void qwen2_logits_free(qwen2_logits *logits);

// The directory's or repository's name. Valid until the handle is freed; NULL for one that is none.
const char *qwen2_model_name(const qwen2_model *model);

// Where it computes, for example "cpu". Valid until the handle is freed; NULL for one that is none.
const char *qwen2_model_device(const qwen2_model *model);

// The precision of its matrices, "f32", "f16" or "bf16". Valid until the handle is freed; NULL for
// one that is none.
const char *qwen2_model_dtype(const qwen2_model *model);

// Tokens that prompt and answer may have together. This and the numbers below are 0 for a handle
// that is none.
uint64_t qwen2_model_context_length(const qwen2_model *model);

// Threads that compute on the processor.
uint64_t qwen2_model_threads(const qwen2_model *model);

// Columns of the logits; the tokenizer may have fewer ids.
uint64_t qwen2_model_vocab_size(const qwen2_model *model);

// Layers.
uint64_t qwen2_model_num_hidden_layers(const qwen2_model *model);

// Width of the residual stream.
uint64_t qwen2_model_hidden_size(const qwen2_model *model);

// Weights, a tied table counted once.
uint64_t qwen2_model_parameter_count(const qwen2_model *model);

// Bytes of the weights, once for all sessions.
uint64_t qwen2_model_weight_bytes(const qwen2_model *model);

// Bytes of keys and values that one token of one session takes.
uint64_t qwen2_model_cache_bytes_per_token(const qwen2_model *model);

// The ids that end a generation, the union over the checkpoint's files; `n_tokens` (may be NULL)
// gets their number. Valid until the handle is freed. NULL, and 0 in `n_tokens`, for one that is
// none.
const uint32_t *qwen2_model_eos_token_ids(const qwen2_model *model, size_t *n_tokens);

// The architecture as JSON: every number of `config.json` under its own name, defaults filled in.
// Valid until the handle is freed; NULL for one that is none.
const char *qwen2_model_config_json(const qwen2_model *model);

// The checkpoint's own settings for generation as JSON, null where it has none. Valid until the
// handle is freed; NULL for one that is none.
const char *qwen2_model_generation_config_json(const qwen2_model *model);

// A handle to `model` with the LoRA adapter in `directory`, as PEFT saves it, beside its weights, which both
// share: what the adapter adds is computed next to them. On top of an adapter a second one adds up with it.
// Requests of an engine may each name a handle of their own. Both handles stay usable, and are freed on
// their own. `*out` is freed with `qwen2_model_free`. To have an adapter's cost once instead, see
// `qwen2_load_options_set_adapter` and `qwen2_merge_lora`.
qwen2_status qwen2_model_with_adapter(const qwen2_model *model,
                                      const char *directory,
                                      size_t len,
                                      qwen2_model **out,
                                      qwen2_error **error);

// How many adapters are beside its weights; 0 for a handle that is none.
size_t qwen2_model_n_adapters(const qwen2_model *model);

// The directory of an adapter beside its weights; 0 is the one that was added first. Valid until the handle
// is freed; NULL where there is none and for a handle that is none.
const char *qwen2_model_adapter(const qwen2_model *model, size_t index);

// What the checkpoint `source` is, a directory, a GGUF file or an id, which is downloaded first: a JSON object
// with the keys of `qwen2 info --json` that depend on its files alone, besides `container`, "safetensors" or
// "gguf", and `generation_config`. The headers of the weights are read and checked, the weights are not. `*out`
// is freed with `qwen2_text_free`.
qwen2_status qwen2_inspect(const char *source,
                           size_t len,
                           qwen2_text **out,
                           qwen2_error **error);

// What the LoRA adapter in `directory` is, as PEFT saves it: a JSON object with `base_model`, `modules`,
// `matrices`, `ranks`, `scales`, `parameters` and `memory_bytes`, those beside the weights. `*out` is freed
// with `qwen2_text_free`.
qwen2_status qwen2_inspect_adapter(const char *directory, size_t len, qwen2_text **out, qwen2_error **error);

// The embedding of a prompt: the hidden states behind the final norm, pooled as `pooling` says, one of
// `QWEN2_POOLING_*`, with squares that sum to 1. `embedding` is the caller's array of
// `qwen2_model_hidden_size` numbers.
qwen2_status qwen2_model_embed(const qwen2_model *model,
                               const qwen2_prompt *prompt,
                               int32_t pooling,
                               float *embedding,
                               qwen2_error **error);

// As `qwen2_model_embed`, until `cancel` (may be NULL) ends it with `QWEN2_ERROR_CANCELLED`.
qwen2_status qwen2_model_embed_with(const qwen2_model *model,
                                    const qwen2_prompt *prompt,
                                    int32_t pooling,
                                    const qwen2_cancel *cancel,
                                    float *embedding,
                                    qwen2_error **error);

// An empty prompt. Freed with `qwen2_prompt_free`.
qwen2_prompt *qwen2_prompt_new(void);

// Frees a prompt; NULL is allowed.
void qwen2_prompt_free(qwen2_prompt *prompt);

// Empties the prompt.
void qwen2_prompt_clear(qwen2_prompt *prompt);

// Makes it plain text, replacing what was there; special tokens in it are ordinary text. The text is
// copied.
qwen2_status qwen2_prompt_set_text(qwen2_prompt *prompt, const char *text, size_t len, qwen2_error **error);

// Makes it token ids, special ones included, replacing what was there. The ids are copied.
qwen2_status qwen2_prompt_set_tokens(qwen2_prompt *prompt,
                                     const uint32_t *tokens,
                                     size_t n_tokens,
                                     qwen2_error **error);

// Adds a message to an empty prompt or behind its messages. `role` is "system", "user", "assistant",
// "tool" or what the chat template knows besides; `content` is plain text, also where it spells
// control tokens. Both are copied.
qwen2_status qwen2_prompt_add_message(qwen2_prompt *prompt,
                                      const char *role,
                                      size_t role_len,
                                      const char *content,
                                      size_t content_len,
                                      qwen2_error **error);

// New settings, nothing set: everything as the checkpoint says. Freed with `qwen2_options_free`.
qwen2_options *qwen2_options_new(void);

// New settings that take the likeliest token every time, without a penalty: the same text on every
// run. Freed with `qwen2_options_free`.
qwen2_options *qwen2_options_new_greedy(void);

// A copy of the settings, freed with `qwen2_options_free`; NULL for a handle that is none.
qwen2_options *qwen2_options_clone(const qwen2_options *options);

// Frees the settings; NULL is allowed. Streams that were made with them go on.
void qwen2_options_free(qwen2_options *options);

// Most tokens to produce, at least 1. Default: to the end of the context.
void qwen2_options_set_max_new_tokens(qwen2_options *options, size_t max_new_tokens);

// Divides the logits, 0 to 100; 0 takes the likeliest token every time. Default: 1.
void qwen2_options_set_temperature(qwen2_options *options, float temperature);

// Keeps the k likeliest tokens, at least 1. Default: all.
void qwen2_options_set_top_k(qwen2_options *options, size_t top_k);

// Keeps the likeliest tokens that together have this probability, above 0 to 1. Default: 1.
void qwen2_options_set_top_p(qwen2_options *options, float top_p);

// Drops tokens less likely than this share of the likeliest one, 0 to 1. Default: 0.
void qwen2_options_set_min_p(qwen2_options *options, float min_p);

// Makes tokens of the prompt and of the output less likely (above 1) or likelier (below 1); above 0.
// Default: 1.
void qwen2_options_set_repetition_penalty(qwen2_options *options, float penalty);

// Keeps the tokens whose information content is nearest to the expected one, until together they have
// this probability; above 0 to 1. Default: 1, which keeps all.
void qwen2_options_set_typical_p(qwen2_options *options, float typical_p);

// Taken from the logit of every token that is in the output, -2 to 2. Default: 0.
void qwen2_options_set_presence_penalty(qwen2_options *options, float penalty);

// Taken from the logit of a token for each time that it is in the output, -2 to 2. Default: 0.
void qwen2_options_set_frequency_penalty(qwen2_options *options, float penalty);

// Added to the logit of the token, -100 to 100; once for each token, the last call counts.
void qwen2_options_set_logit_bias(qwen2_options *options, uint32_t token, float bias);

// One more text that is never produced, in whichever tokens and not in a longer word either: at most
// 1024 of at most 256 bytes. The text is copied.
qwen2_status qwen2_options_add_bad_word(qwen2_options *options,
                                        const char *text,
                                        size_t len,
                                        qwen2_error **error);

// One more sequence of 1 to 256 tokens that is never completed. The tokens are copied.
qwen2_status qwen2_options_add_bad_tokens(qwen2_options *options,
                                          const uint32_t *tokens,
                                          size_t n_tokens,
                                          qwen2_error **error);

// As many tokens come at least before an end token or a stop token; a stop string still ends the
// generation. Default: 0.
void qwen2_options_set_min_new_tokens(qwen2_options *options, size_t min_new_tokens);

// Says of each token how likely it was, and of the `top` likeliest ones, 0 to 1024: natural logarithms
// of the softmax of the model's own logits, before all these settings. Default: does not.
void qwen2_options_set_logprobs(qwen2_options *options, size_t top);

// The same for the tokens of the prompt; a session then reads all of it anew. Default: does not.
void qwen2_options_set_prompt_logprobs(qwen2_options *options, size_t top);

// Same seed, same logits, same tokens. Default: from the operating system.
void qwen2_options_set_seed(qwen2_options *options, uint64_t seed);

// Not 0: goes on after the checkpoint's end tokens; stop strings and stop tokens still end it.
// Default: 0.
void qwen2_options_set_ignore_eos(qwen2_options *options, int32_t ignore_eos);

// One more string that ends the generation and is not part of its text: at most 64 of at most 4096
// bytes. The text is copied.
qwen2_status qwen2_options_add_stop(qwen2_options *options,
                                    const char *text,
                                    size_t len,
                                    qwen2_error **error);

// One more token that ends the generation, besides the checkpoint's own.
void qwen2_options_add_stop_token_id(qwen2_options *options, uint32_t token);

// Proposes `n_tokens` tokens at a time, 1 to 64, by looking up what followed the last ones where they
// stood before, in place of a draft model: several are checked in one step. The tokens stay the same;
// answers that repeat their prompt come faster. Default: off.
void qwen2_options_set_prompt_lookup(qwen2_options *options, size_t n_tokens);

// How many tokens the draft model of `qwen2_model_with_draft` proposes at a time, 1 to 64. Default: 4;
// only for a model that has one.
void qwen2_options_set_draft_tokens(qwen2_options *options, size_t n_tokens);

// Most seconds that a generation takes, from the call that starts it, above 0; it then has the finish
// reason TIMEOUT and keeps its text. Default: no limit.
void qwen2_options_set_timeout(qwen2_options *options, double seconds);

// Who hears how far the reading of a prompt is; NULL: nobody, the default. `user_data` is borrowed until
// every generation with these settings has ended.
void qwen2_options_set_on_prefill(qwen2_options *options, qwen2_prefill_fn on_prefill, void *user_data);

// The switch of the generations made with these settings; shared, not moved: both handles are freed
// on their own. NULL takes it away.
void qwen2_options_set_cancel(qwen2_options *options, const qwen2_cancel *cancel);

// A switch that is off. Freed with `qwen2_cancel_free`.
qwen2_cancel *qwen2_cancel_new(void);

// Ends every generation that has this switch, in the middle of a prompt too; it then has the finish
// reason CANCELLED and keeps its text. From any thread, and from a signal handler: it is one
// atomic store, and therefore the one function that does not check its handle beyond NULL.
void qwen2_cancel_now(const qwen2_cancel *cancel);

// 1 if `qwen2_cancel_now` was called, else 0.
int32_t qwen2_cancel_is_cancelled(const qwen2_cancel *cancel);

// Frees the handle; NULL is allowed. Generations that have the switch go on.
void qwen2_cancel_free(qwen2_cancel *cancel);

// Who changes the logits before each choice; NULL: nobody, the default. `user_data` is borrowed until
// every generation with these settings has ended and every stream and request with them was freed.
void qwen2_options_set_logits_processor(qwen2_options *options,
                                        qwen2_logits_processor_fn processor,
                                        void *user_data);

// The text, without the stop string, special tokens and calls of tools, NUL-terminated; `len` (may be NULL)
// gets its length in bytes. Valid until the generation is freed. NULL, and 0 in `len`, for a handle
// that is none.
const char *qwen2_generation_text(const qwen2_generation *generation, size_t *len);

// The new tokens, an end token included; `n_tokens` (may be NULL) gets their number. Valid until the
// generation is freed. NULL, and 0 in `n_tokens`, for a handle that is none.
const uint32_t *qwen2_generation_tokens(const qwen2_generation *generation, size_t *n_tokens);

// Why it ended, one of `QWEN2_FINISH_*`; 0 for a handle that is none.
int32_t qwen2_generation_finish_reason(const qwen2_generation *generation);

// What it ended at, one of `QWEN2_STOP_MATCH_*`.
int32_t qwen2_generation_stop_match(const qwen2_generation *generation);

// The token that it ended at, or -1.
int64_t qwen2_generation_stop_token(const qwen2_generation *generation);

// The stop string that it ended at, NUL-terminated, or NULL; `len` (may be NULL) gets its length in
// bytes. Valid until the generation is freed.
const char *qwen2_generation_stop_text(const qwen2_generation *generation, size_t *len);

// Tokens of the prompt, cached ones included. This and the numbers below are 0 for a handle that is
// none.
uint64_t qwen2_generation_prompt_tokens(const qwen2_generation *generation);

// Prompt tokens that were in a session's cache already.
uint64_t qwen2_generation_cached_tokens(const qwen2_generation *generation);

// New tokens.
uint64_t qwen2_generation_completion_tokens(const qwen2_generation *generation);

// Tokens that were proposed by the draft model or by prompt lookup.
uint64_t qwen2_generation_draft_tokens(const qwen2_generation *generation);

// Those of them that the model chose, too; over the number of all this is the acceptance rate.
uint64_t qwen2_generation_accepted_tokens(const qwen2_generation *generation);

// Seconds that reading the prompt took, the first new token included.
double qwen2_generation_prefill_s(const qwen2_generation *generation);

// Seconds that all new tokens but the first took.
double qwen2_generation_decode_s(const qwen2_generation *generation);

// Prompt tokens, without cached ones, per second.
double qwen2_generation_prefill_tokens_per_s(const qwen2_generation *generation);

// New tokens per second after the first.
double qwen2_generation_decode_tokens_per_s(const qwen2_generation *generation);

// 1, and the seed of the sampler in `*seed` (may be NULL); 0, and `*seed` untouched, for a greedy
// generation, which has none.
int32_t qwen2_generation_seed(const qwen2_generation *generation, uint64_t *seed);

// Frees a generation; NULL is allowed.
void qwen2_generation_free(qwen2_generation *generation);

// Starts a generation; nothing is computed before the first piece is asked for. `options` may be
// NULL: as the checkpoint says. `*out` is freed with `qwen2_stream_free`.
qwen2_status qwen2_stream_new(const qwen2_model *model,
                              const qwen2_prompt *prompt,
                              const qwen2_options *options,
                              qwen2_stream **out,
                              qwen2_error **error);

// `QWEN2_OK`: `*text` is the next piece, whole UTF-8, NUL-terminated, perhaps empty, and `*len` (may
// be NULL) its length in bytes; valid until the next call on this stream. `QWEN2_DONE`: it has
// ended, and the outputs are untouched. After an error a stream has ended.
qwen2_status qwen2_stream_next(qwen2_stream *stream, const char **text, size_t *len, qwen2_error **error);

// The id of the last piece's token; `UINT32_MAX` before the first.
uint32_t qwen2_stream_token(const qwen2_stream *stream);

// The stream's switch, freed with `qwen2_cancel_free`: the one of its options if they have one. NULL
// for a handle that is none.
qwen2_cancel *qwen2_stream_cancel(const qwen2_stream *stream);

// Runs the stream to its end and gives the whole result, pieces that were read included. The stream
// is still to be freed; a second call is an error. After an error of the stream this gives what
// there was before it, with the finish reason CANCELLED. `*out` is freed with
// `qwen2_generation_free`.
qwen2_status qwen2_stream_finish(qwen2_stream *stream, qwen2_generation **out, qwen2_error **error);

// Frees a stream and stops it if it still runs; NULL is allowed. What was generated in a session is
// part of the conversation.
void qwen2_stream_free(qwen2_stream *stream);

// New settings, nothing set. Freed with `qwen2_engine_options_free`.
qwen2_engine_options *qwen2_engine_options_new(void);

// Frees the settings; NULL is allowed. Engines that were made with them go on.
void qwen2_engine_options_free(qwen2_engine_options *options);

// Sequences that are computed together, at least 1. Default: 64.
void qwen2_engine_options_set_max_sequences(qwen2_engine_options *options, size_t n);

// Bytes that the caches of all sequences and the shared prefixes may take together, at least 1; where they
// do not do, shared prefixes are forgotten, then the last requests wait and are computed again. Default:
// those of four sequences that fill the context.
void qwen2_engine_options_set_cache_bytes(qwen2_engine_options *options, uint64_t bytes);

// Tokens of prompts that one step reads between the tokens of the others, at least 1. Default: 64.
void qwen2_engine_options_set_prefill_chunk(qwen2_engine_options *options, size_t n_tokens);

// Requests that may wait, at least 1. Default: 1024.
void qwen2_engine_options_set_queue_limit(qwen2_engine_options *options, size_t n);

// What becomes of a request when so many wait, one of `QWEN2_WHEN_FULL_*`. Default: REFUSE.
qwen2_status qwen2_engine_options_set_when_full(qwen2_engine_options *options,
                                                int32_t when_full,
                                                qwen2_error **error);

// Milliseconds that the reader of an answer may leave 256 pieces unread before the request ends as
// cancelled. Default: 60000.
void qwen2_engine_options_set_reader_patience(qwen2_engine_options *options, uint64_t milliseconds);

// Whether the beginning that a prompt shares with earlier ones is computed once; 0 or 1, default 1.
void qwen2_engine_options_set_prefix_cache(qwen2_engine_options *options, int32_t prefix_cache);

// Whether a request gets the same tokens alone and among others, to the last bit of its logits; sequences
// are then computed one by one. 0 or 1, default 0.
void qwen2_engine_options_set_deterministic(qwen2_engine_options *options, int32_t deterministic);

// Starts an engine on the model, which may be freed before it. `options` may be NULL for the defaults.
// `*out` is freed with `qwen2_engine_free`.
qwen2_status qwen2_engine_new(const qwen2_model *model,
                              const qwen2_engine_options *options,
                              qwen2_engine **out,
                              qwen2_error **error);

// Ends the engine and its thread; NULL is allowed. Requests that run fail with `QWEN2_ERROR_CANCELLED`;
// their handles stay, with what came before, and are freed on their own. When this returns, every callback
// has heard the end of its request and none is called any more; inside a callback it does not wait for
// that: they hear it later, on their thread.
void qwen2_engine_free(qwen2_engine *engine);

// A prompt into the queue; it is answered whether it is read or not, but a request that leaves 256 pieces
// unread pauses, and ends as CANCELLED after a minute of that. `options` may be NULL: as the checkpoint
// says; an engine has no draft model, no prompt lookup and no `on_prefill`, and calls a logits processor on
// its own thread. A step of `priority`, -128 to 127, goes before the 32 requests that came before. `model`
// may be NULL, or a handle that was made of the engine's model by `qwen2_model_with_adapter`. `*out` is
// freed with `qwen2_request_free`.
qwen2_status qwen2_engine_submit(const qwen2_engine *engine,
                                 const qwen2_prompt *prompt,
                                 const qwen2_options *options,
                                 int32_t priority,
                                 const qwen2_model *model,
                                 qwen2_request **out,
                                 qwen2_error **error);

// As `qwen2_engine_submit`, and `callback` hears the pieces and the end. `user_data` is borrowed until then,
// or until `qwen2_request_free`. `out` may be NULL: the request then goes on by itself, and its handle is
// the library's, valid inside the callback. The callback may be called before this returns.
qwen2_status qwen2_engine_submit_callback(const qwen2_engine *engine,
                                          const qwen2_prompt *prompt,
                                          const qwen2_options *options,
                                          int32_t priority,
                                          const qwen2_model *model,
                                          qwen2_request_fn callback,
                                          void *user_data,
                                          qwen2_request **out,
                                          qwen2_error **error);

// What the engine is doing: writes as many of its numbers, which `QWEN2_STATS_*` are the places of, as `stats`
// has room for, and returns how many there are; a newer library may have more. `stats` may be NULL where
// `n_stats` is 0. Returns 0, and writes nothing, for a handle that is none.
size_t qwen2_engine_stats(const qwen2_engine *engine,
                          uint64_t *stats,
                          size_t n_stats);

// Never waits. `QWEN2_OK`: `*text` is the next piece, whole UTF-8, NUL-terminated, perhaps empty, and `*len`
// (may be NULL) its length in bytes; valid until the next call on this request. `QWEN2_PENDING`: there is
// none yet. `QWEN2_DONE`: it has ended. The outputs are untouched by both. After an error a request has ended.
qwen2_status qwen2_request_poll(qwen2_request *request,
                                const char **text,
                                size_t *len,
                                qwen2_error **error);

// As `qwen2_request_poll`, but waits for the next piece and is never pending.
qwen2_status qwen2_request_next(qwen2_request *request, const char **text, size_t *len, qwen2_error **error);

// The id of the last piece's token; `UINT32_MAX` before the first.
uint32_t qwen2_request_token(const qwen2_request *request);

// The request's switch, freed with `qwen2_cancel_free`: the one of its options if they have one. It works
// from any thread, also while another one waits for the request. NULL for a handle that is none.
qwen2_cancel *qwen2_request_cancel(const qwen2_request *request);

// Waits for the end and gives the whole result, pieces that were read included. The request is still to be
// freed. A second call is an error; after an error of the request every call fails with that. `*out` is freed
// with `qwen2_generation_free`.
qwen2_status qwen2_request_finish(qwen2_request *request, qwen2_generation **out, qwen2_error **error);

// Frees a request and stops it if it still runs; NULL is allowed. When this returns, its callback is not
// called any more, not with the end either; inside a callback it does not wait for one that runs.
void qwen2_request_free(qwen2_request *request);

// Natural log-probability of each new token, if `qwen2_options_set_logprobs` asked for it;
// `n_logprobs` (may be NULL) gets their number, 0 if not. Valid until the generation is freed. NULL, and 0
// in `n_logprobs`, for a handle that is none.
const float *qwen2_generation_logprobs(const qwen2_generation *generation, size_t *n_logprobs);

// The likeliest tokens where new token `position` stands, the likeliest first: returns their number;
// `*tokens` and `*logprobs` (both may be NULL) get arrays as long, valid until the generation is freed.
// 0, and both untouched, where there are none and for a handle that is none.
size_t qwen2_generation_top_logprobs(const qwen2_generation *generation,
                                     size_t position,
                                     const uint32_t **tokens,
                                     const float **logprobs);

// As `qwen2_generation_logprobs`, of the prompt's tokens but the first, which has none, if
// `qwen2_options_set_prompt_logprobs` asked for it.
const float *qwen2_generation_prompt_logprobs(const qwen2_generation *generation, size_t *n_logprobs);

// As `qwen2_generation_top_logprobs`, of the prompt; position 0 is its second token.
size_t qwen2_generation_prompt_top_logprobs(const qwen2_generation *generation,
                                            size_t position,
                                            const uint32_t **tokens,
                                            const float **logprobs);

// Natural log-probability of the last piece's token; NaN before the first, and where
// `qwen2_options_set_logprobs` did not ask for it.
float qwen2_stream_logprob(const qwen2_stream *stream);

// As `qwen2_generation_top_logprobs`, where the last piece's token stands; valid until the next call on
// this stream.
size_t qwen2_stream_top_logprobs(const qwen2_stream *stream, const uint32_t **tokens, const float **logprobs);

// As `qwen2_stream_logprob`, of a request to an engine.
float qwen2_request_logprob(const qwen2_request *request);

// As `qwen2_stream_top_logprobs`, of a request to an engine; inside its callback valid during the call.
size_t qwen2_request_top_logprobs(const qwen2_request *request,
                                  const uint32_t **tokens,
                                  const float **logprobs);

// A conversation in which nothing was said yet. `*out` is freed with `qwen2_session_free`.
qwen2_status qwen2_session_new(const qwen2_model *model, qwen2_session **out, qwen2_error **error);

// Frees the handle; NULL is allowed. A stream of the session goes on.
void qwen2_session_free(qwen2_session *session);

// Adds to the conversation; the model reads it at the next generation. Messages go through the chat
// template together with those before them; text and tokens go behind what is there.
qwen2_status qwen2_session_append(qwen2_session *session, const qwen2_prompt *prompt, qwen2_error **error);

// Answers what was appended; the answer becomes part of the conversation. `options` may be NULL: as
// the checkpoint says. `*out` is freed with `qwen2_generation_free`.
qwen2_status qwen2_session_generate(qwen2_session *session,
                                    const qwen2_options *options,
                                    qwen2_generation **out,
                                    qwen2_error **error);

// As `qwen2_session_generate`, piece by piece. What was generated becomes part of the conversation
// when the stream ends, is finished or is freed; the session is the stream's until then. `*out` is
// freed with `qwen2_stream_free`.
qwen2_status qwen2_session_stream(qwen2_session *session,
                                  const qwen2_options *options,
                                  qwen2_stream **out,
                                  qwen2_error **error);

// A second conversation with the same past; both go on independently. `*out` is freed with
// `qwen2_session_free`.
qwen2_status qwen2_session_fork(const qwen2_session *session, qwen2_session **out, qwen2_error **error);

// Forgets all but the first `n_tokens` tokens. Messages can no longer be appended then, unless
// everything was forgotten.
qwen2_status qwen2_session_truncate(qwen2_session *session, size_t n_tokens, qwen2_error **error);

// Takes back the last `n_messages` messages, answers of the model included; after one of them the model may
// answer anew. Fails, and changes nothing, if there are fewer.
qwen2_status qwen2_session_rollback(qwen2_session *session, size_t n_messages, qwen2_error **error);

// Makes room in a session of text: forgets `n_tokens` tokens behind the first `keep_first`. What stands
// behind them is read again at the next generation. Fails, and changes nothing, if there are fewer, and in
// a session of messages. Nothing is ever forgotten unless it is asked for.
qwen2_status qwen2_session_shift(qwen2_session *session,
                                 size_t keep_first,
                                 size_t n_tokens,
                                 qwen2_error **error);

// Makes room in a conversation: forgets `n_messages` messages behind the first `keep_first`, such as 1 for
// a system prompt. Fails, and changes nothing, if there are fewer.
qwen2_status qwen2_session_shift_messages(qwen2_session *session,
                                          size_t keep_first,
                                          size_t n_messages,
                                          qwen2_error **error);

// Writes the conversation and its cache to a file, which replaces one of this name; the file is complete
// or not there.
qwen2_status qwen2_session_save(const qwen2_session *session,
                                const char *path,
                                size_t len,
                                qwen2_error **error);

// A session that `qwen2_session_save` wrote, with its cache. A file that is damaged, or of another model or
// of other settings, is refused. `*out` is freed with `qwen2_session_free`.
qwen2_status qwen2_session_open(const qwen2_model *model,
                                const char *path,
                                size_t len,
                                qwen2_session **out,
                                qwen2_error **error);

// Everything said so far, as tokens: a copy, freed with `qwen2_tokens_free`.
qwen2_status qwen2_session_tokens(const qwen2_session *session, qwen2_tokens **out, qwen2_error **error);

// Bytes of its cache; 0 for a handle that is none.
uint64_t qwen2_session_memory(const qwen2_session *session);

// Reads a tokenizer without weights: `path` is a directory with `tokenizer.json`, or that file.
// `*out` is freed with `qwen2_tokenizer_free`.
qwen2_status qwen2_tokenizer_load(const char *path, size_t len, qwen2_tokenizer **out, qwen2_error **error);

// The model's tokenizer, a handle of its own: freed with `qwen2_tokenizer_free`, also after the
// model. NULL for a handle that is none.
qwen2_tokenizer *qwen2_model_tokenizer(const qwen2_model *model);

// Frees a tokenizer; NULL is allowed.
void qwen2_tokenizer_free(qwen2_tokenizer *tokenizer);

// The tokens of a text, all of it ordinary text: "<|im_end|>" becomes the tokens of these ten
// characters. `*out` is freed with `qwen2_tokens_free`.
qwen2_status qwen2_tokenizer_encode(const qwen2_tokenizer *tokenizer,
                                    const char *text,
                                    size_t len,
                                    qwen2_tokens **out,
                                    qwen2_error **error);

// As `qwen2_tokenizer_encode`, with special tokens recognised. Never for untrusted text: whoever
// writes "<|im_end|>" ends the turn.
qwen2_status qwen2_tokenizer_encode_with_special_tokens(const qwen2_tokenizer *tokenizer,
                                                        const char *text,
                                                        size_t len,
                                                        qwen2_tokens **out,
                                                        qwen2_error **error);

// The tokens of a conversation through the chat template: what the template prints becomes control
// tokens, what the messages hold never does. Not 0 in `add_generation_prompt`: with the beginning of
// an answer behind it. `*out` is freed with `qwen2_tokens_free`.
qwen2_status qwen2_tokenizer_encode_chat(const qwen2_tokenizer *tokenizer,
                                         const qwen2_prompt *messages,
                                         int32_t add_generation_prompt,
                                         qwen2_tokens **out,
                                         qwen2_error **error);

// The text that the chat template makes of the messages, for showing: to feed a model use
// `qwen2_tokenizer_encode_chat`. `*out` is freed with `qwen2_text_free`.
qwen2_status qwen2_tokenizer_apply_chat_template(const qwen2_tokenizer *tokenizer,
                                                 const qwen2_prompt *messages,
                                                 int32_t add_generation_prompt,
                                                 qwen2_text **out,
                                                 qwen2_error **error);

// The text of tokens; bytes that are not UTF-8 become U+FFFD. Not 0 in `skip_special_tokens`: leaves
// out tokens like "<|im_end|>". `*out` is freed with `qwen2_text_free`.
qwen2_status qwen2_tokenizer_decode(const qwen2_tokenizer *tokenizer,
                                    const uint32_t *tokens,
                                    size_t n_tokens,
                                    int32_t skip_special_tokens,
                                    qwen2_text **out,
                                    qwen2_error **error);

// The highest id plus one; 0 for a handle that is none.
uint64_t qwen2_tokenizer_vocab_size(const qwen2_tokenizer *tokenizer);

// The id of a token by its name in the vocabulary, for example "<|im_end|>"; -1 if there is none.
int64_t qwen2_tokenizer_token_to_id(const qwen2_tokenizer *tokenizer, const char *token, size_t len);

// The token that ends a turn, from `tokenizer_config.json`; -1 if there is none.
int64_t qwen2_tokenizer_eos_token_id(const qwen2_tokenizer *tokenizer);

// 1 for a control token, which decoding can leave out, else 0.
int32_t qwen2_tokenizer_is_special(const qwen2_tokenizer *tokenizer, uint32_t token);

// The Jinja source of the chat template, or NULL: base models may have none. Valid until the
// tokenizer is freed.
const char *qwen2_tokenizer_chat_template(const qwen2_tokenizer *tokenizer);

// The text must be JSON that this JSON schema allows, replacing any other constraint; `schema` is its
// text, "{}" allows any JSON. Checked when a generation starts. The text is copied.
qwen2_status qwen2_options_set_json_schema(qwen2_options *options,
                                           const char *schema,
                                           size_t len,
                                           qwen2_error **error);

// The whole text must match this regular expression, replacing any other constraint. The syntax is that
// of Rust's regex crate, without anchors and look-around. The text is copied.
qwen2_status qwen2_options_set_regex(qwen2_options *options,
                                     const char *regex,
                                     size_t len,
                                     qwen2_error **error);

// The text must be what this grammar allows, replacing any other constraint; it is written in
// llguidance's variant of Lark, and its first rule is `start`. The text is copied.
qwen2_status qwen2_options_set_grammar(qwen2_options *options,
                                       const char *lark,
                                       size_t len,
                                       qwen2_error **error);

// The text must be one of these, replacing any other constraint. `lens` holds their lengths in bytes;
// NULL: all of them end with NUL. The texts are copied.
qwen2_status qwen2_options_set_choice(qwen2_options *options,
                                      const char *const *texts,
                                      const size_t *lens,
                                      size_t n_texts,
                                      qwen2_error **error);

// One more tool that the model may ask for, as OpenAI's interface describes it in JSON:
// {"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}. With
// "strict": true in the function, the arguments of its calls are forced to keep to the parameters. The
// prompt is to be messages. The text is copied.
qwen2_status qwen2_options_add_tool(qwen2_options *options,
                                    const char *json,
                                    size_t len,
                                    qwen2_error **error);

// Whether the model calls tools, one of `QWEN2_TOOL_CHOICE_*`. Default: AUTO.
qwen2_status qwen2_options_set_tool_choice(qwen2_options *options, int32_t choice, qwen2_error **error);

// Makes the model call the tool of this name. The text is copied.
qwen2_status qwen2_options_set_tool_choice_name(qwen2_options *options,
                                                const char *name,
                                                size_t len,
                                                qwen2_error **error);

// How calls of tools are written, one of `QWEN2_TOOL_FORMAT_*`. Default: DEFAULT.
qwen2_status qwen2_options_set_tool_format(qwen2_options *options, int32_t format, qwen2_error **error);

// Adds a call of a tool to the last message of the prompt, which repeats what the assistant asked for;
// `arguments` is the text of a JSON object. The results follow as messages of the role "tool". Both
// texts are copied.
qwen2_status qwen2_prompt_add_tool_call(qwen2_prompt *prompt,
                                        const char *name,
                                        size_t name_len,
                                        const char *arguments,
                                        size_t arguments_len,
                                        qwen2_error **error);

// The number of tools that the model asks for; 0 for a handle that is none.
size_t qwen2_generation_n_tool_calls(const qwen2_generation *generation);

// The name in the call at `index`, NUL-terminated, or NULL; `len` (may be NULL) gets its length in
// bytes. Valid until the generation is freed.
const char *qwen2_generation_tool_call_name(const qwen2_generation *generation, size_t index, size_t *len);

// The arguments in the call at `index`: the text of a JSON object, NUL-terminated, or NULL; `len` (may
// be NULL) gets its length in bytes. Valid until the generation is freed.
const char *qwen2_generation_tool_call_arguments(const qwen2_generation *generation,
                                                 size_t index,
                                                 size_t *len);

// The number of calls of tools that became whole with the last piece, whose text is in no piece; 0 before
// the first piece, behind the end, and for a handle that is none.
size_t qwen2_stream_n_tool_calls(const qwen2_stream *stream);

// As `qwen2_generation_tool_call_name`, of the last piece; valid until the next call on this stream.
const char *qwen2_stream_tool_call_name(const qwen2_stream *stream, size_t index, size_t *len);

// As `qwen2_generation_tool_call_arguments`, of the last piece; valid until the next call on this stream.
const char *qwen2_stream_tool_call_arguments(const qwen2_stream *stream, size_t index, size_t *len);

// As `qwen2_stream_n_tool_calls`, of a request to an engine.
size_t qwen2_request_n_tool_calls(const qwen2_request *request);

// As `qwen2_stream_tool_call_name`, of a request to an engine; inside its callback valid during the call.
const char *qwen2_request_tool_call_name(const qwen2_request *request, size_t index, size_t *len);

// As `qwen2_stream_tool_call_arguments`, of a request to an engine; inside its callback valid during the
// call.
const char *qwen2_request_tool_call_arguments(const qwen2_request *request, size_t index, size_t *len);

// The text, NUL-terminated; `len` (may be NULL) gets its length in bytes. Valid until the text is
// freed. NULL, and 0 in `len`, for a handle that is none.
const char *qwen2_text_data(const qwen2_text *text, size_t *len);

// Frees a text; NULL is allowed.
void qwen2_text_free(qwen2_text *text);

// The ids; `n_tokens` (may be NULL) gets their number. Valid until the tokens are freed. NULL, and
// 0 in `n_tokens`, for a handle that is none.
const uint32_t *qwen2_tokens_data(const qwen2_tokens *tokens, size_t *n_tokens);

// Frees tokens; NULL is allowed.
void qwen2_tokens_free(qwen2_tokens *tokens);

// Who hears what the library does; NULL: nobody, the default. When this returns, the function that
// was set before is not called any more. Has no effect inside a log function.
void qwen2_set_log(qwen2_log_fn log, void *user_data);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* QWEN2_H */
