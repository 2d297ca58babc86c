//! A conversation that keeps its cache between turns.

mod forget;
mod store;

use super::model::{Model, Prompt};
use crate::error::{Error, ErrorKind, Result};
use crate::generate::{
    CancelToken, Draft, GenerateOptions, Generation, LogitsProcessor, Piece, Run,
};
use crate::model::cache::Cache;
use crate::text::{Message, Tool, ToolFormat};

/// One conversation: what was said so far, and the cache of it.
pub struct Session {
    model: Model,
    cache: Cache,
    tokens: Vec<u32>,
    /// What was said as messages, with the tokens that it stands for; empty for a session of text.
    messages: Vec<Message>,
    /// The tools that the last generation had: they are part of what the tokens say.
    tools: (Vec<Tool>, Option<ToolFormat>),
    /// The draft model with what it has read, between two generations that use it.
    draft: Option<Box<Draft>>,
}

impl Session {
    pub(crate) fn new(model: Model) -> Self {
        let cache = model.new_cache();
        Self {
            model,
            cache,
            tokens: Vec::new(),
            messages: Vec::new(),
            tools: (Vec::new(), None),
            draft: None,
        }
    }

    /// Adds to the conversation; the model reads it at the next generation.
    ///
    /// Messages go through the chat template together with those before them, so that a session
    /// is one conversation; text and tokens go behind what is there.
    ///
    /// # Errors
    /// As [`Model::generate`]; the session is unchanged then.
    pub fn append(&mut self, prompt: impl Into<Prompt>) -> Result<()> {
        match prompt.into() {
            Prompt::Chat(new) => self.append_messages(new),
            prompt => {
                let new = self.model.encode(&prompt)?;
                self.check_room(self.tokens.len() + new.len())?;
                self.tokens.extend(new);
                Ok(())
            }
        }
    }

    fn append_messages(&mut self, new: Vec<Message>) -> Result<()> {
        if self.messages.is_empty() && !self.tokens.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "session holds text, not messages",
            )
            .with_key("prompt")
            .with_help("keep to text and tokens in this session, or start one with messages"));
        }
        let mut messages = self.messages.clone();
        messages.extend(new);
        let tokens = self.encode(&messages)?;
        self.check_room(tokens.len())?;
        self.adopt(tokens);
        self.messages = messages;
        Ok(())
    }

    fn encode(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let (tools, format) = &self.tools;
        let tokenizer = self.model.tokenizer();
        tokenizer.encode_chat_with_tools(messages, tools, *format)
    }

    /// Writes the conversation again when a generation has other tools than the last one.
    fn use_tools(&mut self, tools: &[Tool], format: Option<ToolFormat>) -> Result<()> {
        if self.tools.0 == tools && (tools.is_empty() || self.tools.1 == format) {
            return Ok(());
        }
        if self.messages.is_empty() && !self.tokens.is_empty() {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "tools need messages")
                    .with_key("tools")
                    .with_why("the session holds text"),
            );
        }
        let before = std::mem::replace(&mut self.tools, (tools.to_vec(), format));
        let tokens = match self.messages.is_empty() {
            true => Ok(Vec::new()),
            false => self.encode(&self.messages),
        };
        let tokens = tokens.and_then(|tokens| self.check_room(tokens.len()).map(|()| tokens));
        match tokens {
            Ok(tokens) => self.adopt(tokens),
            Err(error) => {
                self.tools = before;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes over `tokens`, keeping the cache of what both have at the start.
    fn adopt(&mut self, tokens: Vec<u32>) {
        let common = self
            .tokens
            .iter()
            .zip(&tokens)
            .take_while(|(old, new)| old == new)
            .count();
        self.cache.truncate(common);
        self.tokens = tokens;
    }

    fn check_room(&self, n_tokens: usize) -> Result<()> {
        let context_length = self.cache.context_length();
        if n_tokens <= context_length {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::ContextOverflow,
            "conversation exceeds the context",
        )
        .with_key("prompt")
        .with_why(format!(
            "{n_tokens} tokens, the context holds {context_length}"
        ))
        .with_help("truncate the session or start a new one"))
    }

    /// Answers what was appended; the answer becomes part of the conversation.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn generate(&mut self, options: &GenerateOptions) -> Result<Generation> {
        self.stream(options)?.finish()
    }

    /// As [`Session::generate`], piece by piece. What was generated when the stream is dropped
    /// becomes part of the conversation.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn stream(&mut self, options: &GenerateOptions) -> Result<SessionStream<'_>> {
        let run = self.start(options)?;
        Ok(SessionStream {
            session: self,
            run: Some(run),
        })
    }

    /// As [`Session::stream`], with a processor that changes the logits before each choice.
    ///
    /// # Errors
    /// As [`Model::generate`], and what the processor returns.
    pub fn stream_with(
        &mut self,
        options: &GenerateOptions,
        processor: impl LogitsProcessor + 'static,
    ) -> Result<SessionStream<'_>> {
        let run = self.start_with(options, Some(Box::new(processor)))?;
        Ok(SessionStream {
            session: self,
            run: Some(run),
        })
    }

    /// As [`Session::stream`], for holders that cannot borrow the session while the run lives: the
    /// bindings. The session is lent to the run at every step.
    ///
    /// # Errors
    /// As [`Model::generate`].
    #[doc(hidden)]
    pub fn start(&mut self, options: &GenerateOptions) -> Result<SessionRun> {
        self.start_with(options, None)
    }

    /// As [`Session::start`], with a processor.
    ///
    /// # Errors
    /// As [`Session::stream_with`].
    #[doc(hidden)]
    pub fn start_with(
        &mut self,
        options: &GenerateOptions,
        processor: Option<Box<dyn LogitsProcessor>>,
    ) -> Result<SessionRun> {
        let resolved = options.resolve(&self.model.inner.defaults)?;
        self.use_tools(&resolved.tools, resolved.tool_format)?;
        let host = self.model.inner.host.clone();
        let draft = match resolved.prompt_lookup {
            None => self.draft.take(),
            Some(_) => None,
        };
        Ok(SessionRun(Run::new(
            host,
            self.tokens.clone(),
            &self.cache,
            resolved,
            processor,
            draft,
        )?))
    }

    /// Takes over what a run has added.
    fn commit(&mut self, run: &mut Run) {
        run.settle(&mut self.cache);
        self.draft = run.take_draft().or_else(|| self.draft.take());
        if run.tokens().len() == self.tokens.len() {
            return;
        }
        self.tokens = run.tokens().to_vec();
        if !self.messages.is_empty() {
            self.messages.push(Message::assistant(run.text()));
        }
    }

    /// A second conversation with the same past; both go on independently.
    ///
    /// # Errors
    /// `OutOfMemory` on a device that cannot hold the copy.
    pub fn fork(&self) -> Result<Self> {
        Ok(Self {
            model: self.model.clone(),
            cache: self.cache.clone(),
            tokens: self.tokens.clone(),
            messages: self.messages.clone(),
            tools: self.tools.clone(),
            draft: self.draft.clone(),
        })
    }

    /// Forgets all but the first `n_tokens` tokens; messages can no longer be appended then,
    /// unless everything was forgotten.
    ///
    /// # Errors
    /// `InvalidArgument` if there are fewer.
    pub fn truncate(&mut self, n_tokens: usize) -> Result<()> {
        if n_tokens > self.tokens.len() {
            return Err(Error::new(ErrorKind::InvalidArgument, "session is shorter")
                .with_key("n_tokens")
                .with_why(format!("{n_tokens}, the session has {}", self.tokens.len())));
        }
        if n_tokens < self.tokens.len() {
            self.messages.clear();
        }
        self.tokens.truncate(n_tokens);
        self.cache.truncate(n_tokens);
        Ok(())
    }

    /// Everything said so far, as tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Everything said so far, as messages; empty in a session of text.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The model it belongs to.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Bytes of its cache.
    pub fn memory(&self) -> u64 {
        self.cache.bytes()
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("tokens", &self.tokens.len())
            .field("cached", &self.cache.n_tokens())
            .finish_non_exhaustive()
    }
}

/// A generation in a session, which it borrows at every step only.
#[doc(hidden)]
pub struct SessionRun(Run);

impl SessionRun {
    /// Stops the generation from any thread.
    pub fn cancel_token(&self) -> CancelToken {
        self.0.cancel_token()
    }

    /// The next piece; `session` is the one that started the run.
    pub fn next(&mut self, session: &mut Session) -> Option<Result<Piece>> {
        self.0.next(&mut session.cache)
    }

    /// Makes what was generated part of the conversation and returns the result.
    pub fn finish(mut self, session: &mut Session) -> Generation {
        session.commit(&mut self.0);
        self.0.into_generation()
    }
}

impl std::fmt::Debug for SessionRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionRun")
            .field("tokens", &self.0.tokens().len())
            .finish_non_exhaustive()
    }
}

/// A generation in a session that runs as it is read.
pub struct SessionStream<'a> {
    session: &'a mut Session,
    run: Option<SessionRun>,
}

impl SessionStream<'_> {
    /// Stops the generation from any thread.
    pub fn cancel_token(&self) -> CancelToken {
        self.run
            .as_ref()
            .map(SessionRun::cancel_token)
            .unwrap_or_default()
    }

    /// Runs to the end and returns the whole result.
    ///
    /// # Errors
    /// The error that ended the generation; what came before it is part of the conversation.
    pub fn finish(mut self) -> Result<Generation> {
        for piece in self.by_ref() {
            piece?;
        }
        match self.run.take() {
            Some(run) => Ok(run.finish(self.session)),
            None => Err(Error::new(ErrorKind::Internal, "stream was finished twice")),
        }
    }
}

impl Iterator for SessionStream<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.run.as_mut()?.next(self.session)
    }
}

impl Drop for SessionStream<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            run.finish(self.session);
        }
    }
}

impl std::fmt::Debug for SessionStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionStream")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}
