//! What a generation gives back.

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// One token and the text that became whole with it.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct Piece {
    /// Whole characters; empty while one is incomplete or a stop string may be under way.
    text: String,
    /// The token's id.
    token: u32,
    /// How likely it was, if logprobs asked for it.
    logprobs: Option<Py<Logprobs>>,
    /// Calls of tools that became whole with it.
    tool_calls: Vec<ToolCall>,
}

#[pymethods]
impl Piece {
    fn __str__(&self) -> &str {
        &self.text
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "Piece(text={}, token={})",
            quoted(py, &self.text)?,
            self.token
        ))
    }
}

impl Piece {
    pub(crate) fn new(py: Python<'_>, piece: qwen2_core::Piece) -> PyResult<Self> {
        let logprobs = piece.logprobs.map(|found| Logprobs::new(py, found));
        Ok(Self {
            text: piece.text,
            token: piece.token,
            logprobs: logprobs.transpose()?,
            tool_calls: piece.tool_calls.into_iter().map(ToolCall::from).collect(),
        })
    }
}

/// How likely the token at one position was, and which ones were the likeliest there: natural logarithms
/// of the softmax of the model's own logits, before all options.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct Logprobs {
    /// The token that is there.
    token: u32,
    /// Its log-probability.
    logprob: f32,
    /// The likeliest tokens, the likeliest first.
    top: Vec<Py<TokenLogprob>>,
}

#[pymethods]
impl Logprobs {
    fn __repr__(&self) -> String {
        let (token, logprob, n) = (self.token, self.logprob, self.top.len());
        format!("Logprobs(token={token}, logprob={logprob:.4}, top={n})")
    }
}

impl Logprobs {
    fn new(py: Python<'_>, found: qwen2_core::Logprobs) -> PyResult<Py<Self>> {
        let top = found.top.into_iter().map(|top| {
            let (token, logprob) = (top.token, top.logprob);
            Py::new(py, TokenLogprob { token, logprob })
        });
        let made = Self {
            token: found.token,
            logprob: found.logprob,
            top: top.collect::<PyResult<_>>()?,
        };
        Py::new(py, made)
    }
}

/// A token and its log-probability.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct TokenLogprob {
    /// The token's id.
    token: u32,
    /// Natural logarithm of its probability.
    logprob: f32,
}

#[pymethods]
impl TokenLogprob {
    fn __repr__(&self) -> String {
        format!(
            "TokenLogprob(token={}, logprob={:.4})",
            self.token, self.logprob
        )
    }
}

/// A finished generation.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct Generation {
    /// The text, without the stop string, special tokens and calls of tools.
    text: String,
    /// The new tokens, an end token included.
    tokens: Vec<u32>,
    /// Calls of tools that the model asks for.
    tool_calls: Vec<ToolCall>,
    /// Why it ended: stop, length, tool_calls, cancelled or timeout.
    finish_reason: &'static str,
    /// What it ended at, if finish_reason is stop.
    stop_match: Option<Py<StopMatch>>,
    /// Token counts.
    usage: Py<Usage>,
    /// How long it took.
    timings: Py<Timings>,
    /// The seed that the sampler used; None for greedy decoding.
    seed: Option<u64>,
    /// How likely each new token was, if logprobs asked for it; else empty.
    logprobs: Vec<Py<Logprobs>>,
    /// How likely each token of the prompt but the first was, if prompt_logprobs asked for it; else empty.
    prompt_logprobs: Vec<Py<Logprobs>>,
}

#[pymethods]
impl Generation {
    fn __str__(&self) -> &str {
        &self.text
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let text = quoted(py, &self.text)?;
        Ok(format!(
            "Generation(text={text}, finish_reason='{}', tokens={})",
            self.finish_reason,
            self.tokens.len()
        ))
    }
}

impl Generation {
    pub(crate) fn new(py: Python<'_>, generation: qwen2_core::Generation) -> PyResult<Self> {
        let stop_match = generation
            .stop_match
            .map(|found| Py::new(py, StopMatch::from(found)));
        let logprobs = |all: Vec<qwen2_core::Logprobs>| {
            let all = all.into_iter().map(|found| Logprobs::new(py, found));
            all.collect::<PyResult<Vec<_>>>()
        };
        Ok(Self {
            text: generation.text,
            tokens: generation.tokens,
            tool_calls: generation
                .tool_calls
                .into_iter()
                .map(ToolCall::from)
                .collect(),
            finish_reason: generation.finish_reason.name(),
            stop_match: stop_match.transpose()?,
            usage: Py::new(py, Usage::from(generation.usage))?,
            timings: Py::new(py, Timings::from(generation.timings))?,
            seed: generation.seed,
            logprobs: logprobs(generation.logprobs)?,
            prompt_logprobs: logprobs(generation.prompt_logprobs)?,
        })
    }
}

/// A call that the model asks for.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
#[derive(Clone)]
pub(crate) struct ToolCall {
    /// The name that the model wrote, which need not be one of the tools.
    name: String,
    /// The text of a JSON object.
    arguments: String,
}

#[pymethods]
impl ToolCall {
    /// The dict of OpenAI's interface, for the tool_calls of a message.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let call = qwen2_core::ToolCall::new(&*self.name, &*self.arguments);
        crate::constraint::to_dict(py, &call)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (name, arguments) = (quoted(py, &self.name)?, quoted(py, &self.arguments)?);
        Ok(format!("ToolCall(name={name}, arguments={arguments})"))
    }
}

impl From<qwen2_core::ToolCall> for ToolCall {
    fn from(call: qwen2_core::ToolCall) -> Self {
        Self {
            name: call.name,
            arguments: call.arguments,
        }
    }
}

/// What ended a generation.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct StopMatch {
    /// eos (an end token of the checkpoint), token (one of stop_token_ids), text (one of stop) or
    /// constraint, which allows nothing more.
    kind: &'static str,
    /// The token, for eos and token.
    token: Option<u32>,
    /// The string, for text.
    text: Option<String>,
}

#[pymethods]
impl StopMatch {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        match (&self.text, self.token) {
            (Some(text), _) => Ok(format!(
                "StopMatch(kind='{}', text={})",
                self.kind,
                quoted(py, text)?
            )),
            (None, Some(token)) => Ok(format!("StopMatch(kind='{}', token={token})", self.kind)),
            (None, None) => Ok(format!("StopMatch(kind='{}')", self.kind)),
        }
    }
}

impl From<qwen2_core::StopMatch> for StopMatch {
    fn from(found: qwen2_core::StopMatch) -> Self {
        let (kind, token, text) = match found {
            qwen2_core::StopMatch::Eos(token) => ("eos", Some(token), None),
            qwen2_core::StopMatch::Token(token) => ("token", Some(token), None),
            qwen2_core::StopMatch::Text(text) => ("text", None, Some(text)),
            qwen2_core::StopMatch::Constraint => ("constraint", None, None),
            _ => ("other", None, None), // the enum may grow
        };
        Self { kind, token, text }
    }
}

/// Token counts of one generation.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct Usage {
    /// Tokens of the prompt, cached ones included.
    prompt_tokens: usize,
    /// Prompt tokens that were in the cache already.
    cached_tokens: usize,
    /// New tokens.
    completion_tokens: usize,
    /// Tokens that were proposed by the draft model or by prompt lookup.
    draft_tokens: usize,
    /// Those of them that the model chose, too; over draft_tokens this is the acceptance rate.
    accepted_tokens: usize,
}

#[pymethods]
impl Usage {
    fn __repr__(&self) -> String {
        format!(
            "Usage(prompt_tokens={}, cached_tokens={}, completion_tokens={}, draft_tokens={}, accepted_tokens={})",
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.draft_tokens,
            self.accepted_tokens
        )
    }
}

impl From<qwen2_core::Usage> for Usage {
    fn from(usage: qwen2_core::Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
            draft_tokens: usage.draft_tokens,
            accepted_tokens: usage.accepted_tokens,
        }
    }
}

/// Wall-clock times of one generation.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct Timings {
    /// Seconds that reading the prompt took, the first new token included.
    prefill_s: f64,
    /// Seconds that all new tokens but the first took.
    decode_s: f64,
    /// Prompt tokens (without cached ones) per second; 0 if nothing was read.
    prefill_tokens_per_s: f64,
    /// New tokens per second after the first; 0 if there were none.
    decode_tokens_per_s: f64,
}

#[pymethods]
impl Timings {
    fn __repr__(&self) -> String {
        format!(
            "Timings(prefill_s={:.3}, decode_s={:.3}, prefill_tokens_per_s={:.1}, decode_tokens_per_s={:.1})",
            self.prefill_s, self.decode_s, self.prefill_tokens_per_s, self.decode_tokens_per_s
        )
    }
}

impl From<qwen2_core::Timings> for Timings {
    fn from(timings: qwen2_core::Timings) -> Self {
        Self {
            prefill_s: timings.prefill.as_secs_f64(),
            decode_s: timings.decode.as_secs_f64(),
            prefill_tokens_per_s: timings.prefill_tokens_per_s,
            decode_tokens_per_s: timings.decode_tokens_per_s,
        }
    }
}

/// Bytes that a model takes.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct Memory {
    /// Weights, once for all sessions.
    weights: u64,
    /// What a decode step reads of them: all but the embedding table, where that is not the head too.
    weights_per_token: u64,
    /// Keys and values of one token of one session.
    cache_per_token: u64,
    /// Keys and values of one session that fills the context.
    cache_full: u64,
}

#[pymethods]
impl Memory {
    fn __repr__(&self) -> String {
        format!(
            "Memory(weights={}, weights_per_token={}, cache_per_token={}, cache_full={})",
            self.weights, self.weights_per_token, self.cache_per_token, self.cache_full
        )
    }
}

impl From<qwen2_core::Memory> for Memory {
    fn from(memory: qwen2_core::Memory) -> Self {
        Self {
            weights: memory.weights,
            weights_per_token: memory.weights_per_token,
            cache_per_token: memory.cache_per_token,
            cache_full: memory.cache_full,
        }
    }
}

/// What an engine does; counted since its start where nothing else is said.
#[pyclass(module = "qwen2_rs", frozen, get_all)]
pub(crate) struct EngineStats {
    /// Requests that wait to be started, now.
    waiting: usize,
    /// Requests that are computed, now.
    running: usize,
    /// Requests that were submitted.
    submitted: u64,
    /// Requests that ended, cancelled and failed ones included.
    finished: u64,
    /// Requests that ended with an error.
    failed: u64,
    /// Requests whose cache was dropped for lack of memory, to be computed again.
    preempted: u64,
    /// Steps of the network.
    steps: u64,
    /// Tokens of prompts that were computed.
    prompt_tokens: u64,
    /// Tokens of prompts that were shared with earlier requests.
    cached_tokens: u64,
    /// Tokens that were generated.
    completion_tokens: u64,
    /// Bytes of caches and shared prefixes, now.
    cache_bytes: u64,
    /// Bytes that they may take.
    cache_limit: u64,
}

#[pymethods]
impl EngineStats {
    fn __repr__(&self) -> String {
        format!(
            "EngineStats(waiting={}, running={}, submitted={}, finished={}, failed={}, steps={}, cache_bytes={})",
            self.waiting,
            self.running,
            self.submitted,
            self.finished,
            self.failed,
            self.steps,
            self.cache_bytes
        )
    }
}

impl From<qwen2_core::EngineStats> for EngineStats {
    fn from(stats: qwen2_core::EngineStats) -> Self {
        Self {
            waiting: stats.waiting,
            running: stats.running,
            submitted: stats.submitted,
            finished: stats.finished,
            failed: stats.failed,
            preempted: stats.preempted,
            steps: stats.steps,
            prompt_tokens: stats.prompt_tokens,
            cached_tokens: stats.cached_tokens,
            completion_tokens: stats.completion_tokens,
            cache_bytes: stats.cache_bytes,
            cache_limit: stats.cache_limit,
        }
    }
}

/// Text as Python writes it.
fn quoted(py: Python<'_>, text: &str) -> PyResult<String> {
    pyo3::types::PyString::new(py, text).repr()?.extract()
}
