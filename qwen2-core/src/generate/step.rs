//! One forward of the network behind the panic fence: tokens in, logits on the host out.

use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
use crate::model::cache::Cache;
#[cfg(feature = "gpu")]
use crate::model::replay::{Found, Step};
use crate::model::{Part, Qwen2, Rows};
use crate::ops::{self, Threads, Watch, watched};
use crate::profile::part;

/// A network with the threads that compute it.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) qwen2: Qwen2,
    pub(crate) threads: Threads,
}

impl Network {
    /// # Errors
    /// `Unsupported` in a fork of the process that loaded the model: its threads are not there.
    pub(crate) fn check_process(&self) -> Result<()> {
        if !self.threads.are_foreign() {
            return Ok(());
        }
        Err(
            Error::new(ErrorKind::Unsupported, "model does not survive a fork")
                .with_why("this process is a fork of the one that loaded the model")
                .with_help("load the model in the process that uses it"),
        )
    }

    /// Runs `tokens` behind the cache, until `watch` is over; logits of `rows`, row-major.
    ///
    /// # Errors
    /// `ContextOverflow`; `Cancelled` when the watch is over, and then the cache is as it was, or empty;
    /// `DeviceFailed` if the backend failed, and then the cache is empty.
    pub(crate) fn forward(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        rows: Rows,
        watch: &Watch,
    ) -> Result<Vec<f32>> {
        let n_past = cache.n_tokens();
        let part = Part {
            tokens,
            cache: &mut *cache,
            rows,
        };
        let outcome = watched(watch, || self.forward_batch(&mut [part]));
        // Operations that were left out show in no result, so there is none.
        if watch.is_over() {
            cache.truncate(n_past);
            return Err(cancelled());
        }
        outcome
    }

    /// As [`Self::forward`] for several sequences at once, which nothing ends; the logits of their rows in
    /// order.
    ///
    /// # Errors
    /// As [`Self::forward`], with all caches empty where the backend failed.
    pub(crate) fn forward_batch(&self, batch: &mut [Part<'_>]) -> Result<Vec<f32>> {
        self.check_process()?;
        // burn reports failures by panic; what the panic leaves behind are the caches, emptied below.
        let outcome = fenced(|| {
            self.threads.install(|| {
                let Some(logits) = self.qwen2.forward_batch(batch)? else {
                    return Ok(Vec::new());
                };
                part("logits to host", || {
                    ops::numbers(logits).map_err(|why| failed(&why))
                })
            })
        });
        let logits = outcome.unwrap_or_else(|panic| Err(failed(&panic)));
        if let Err(error) = &logits
            && error.kind() == ErrorKind::DeviceFailed
        {
            batch.iter_mut().for_each(|part| part.cache.clear());
        }
        logits
    }

    /// The token with the highest logit behind `token`, which goes behind the cache, where the device itself
    /// finds it; otherwise nothing has happened. It is so as well where there is no such token, for
    /// [`Self::forward`] to show.
    ///
    /// # Errors
    /// As [`Self::forward`].
    #[cfg(feature = "gpu")]
    pub(crate) fn best(&self, token: u32, cache: &mut Cache) -> Result<Option<u32>> {
        let n_past = cache.n_tokens();
        let best = self.replay(token, cache, |step| {
            let best = ops::integers(step.best())
                .map_err(|why| failed(&why))?
                .first()
                .copied();
            let best = best.and_then(|best| u32::try_from(best).ok());
            if let Some(best) = best {
                step.follow(best, n_past + 1);
            }
            Ok(best)
        })?;
        let best = best.flatten();
        if best.is_none() {
            cache.truncate(n_past);
        }
        Ok(best)
    }

    /// The likeliest tokens behind `token`, which goes behind the cache, where the device itself finds them, in the order
    /// of the tokens with their logits: every other token has a lower one. All where these are too many, or no numbers.
    /// Nothing, and nothing has happened, where the device is not asked in this way.
    ///
    /// # Errors
    /// As [`Self::forward`].
    #[cfg(feature = "gpu")]
    pub(crate) fn likeliest(&self, token: u32, cache: &mut Cache) -> Result<Option<Found>> {
        self.replay(token, cache, |step| {
            let found = ops::integers(step.likeliest()).map_err(|why| failed(&why))?;
            match ops::replay::read_likeliest(&found) {
                Some(likeliest) => Ok(Found::Likeliest(likeliest)),
                None => all(step).map(Found::All),
            }
        })
    }

    /// All logits of the step that [`Self::likeliest`] was asked about, until the next one.
    ///
    /// # Errors
    /// As [`Self::forward`].
    #[cfg(feature = "gpu")]
    pub(crate) fn all_of_likeliest(&self, cache: &mut Cache) -> Result<Vec<f32>> {
        let logits = cache.replayed().map(|step| step.logits());
        let logits =
            logits.ok_or_else(|| Error::new(ErrorKind::Internal, "no step was replayed"))?;
        settle(
            fenced(|| ops::numbers(logits).map_err(|why| failed(&why))),
            cache,
        )
    }

    /// What `read` makes of a step that is replayed, or nothing, where none is.
    #[cfg(feature = "gpu")]
    fn replay<R>(
        &self,
        token: u32,
        cache: &mut Cache,
        read: impl FnOnce(&mut Step) -> Result<R>,
    ) -> Result<Option<R>> {
        self.check_process()?;
        let outcome = fenced(|| self.qwen2.replay(token, cache)?.map(read).transpose());
        settle(outcome, cache)
    }
}

/// On the host.
#[cfg(feature = "gpu")]
fn all(step: &Step) -> Result<Vec<f32>> {
    ops::numbers(step.logits()).map_err(|why| failed(&why))
}

/// A panic as an error, behind which the cache is empty.
#[cfg(feature = "gpu")]
fn settle<R>(outcome: std::result::Result<Result<R>, String>, cache: &mut Cache) -> Result<R> {
    let outcome = outcome.unwrap_or_else(|panic| Err(failed(&panic)));
    if let Err(error) = &outcome
        && error.kind() == ErrorKind::DeviceFailed
    {
        cache.clear();
    }
    outcome
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "computation was cancelled")
        .with_help("a cancel token or a timeout of the call ended it")
}

fn failed(why: &str) -> Error {
    Error::new(ErrorKind::DeviceFailed, "device failed during the forward")
        .with_why(why)
        .with_help("the conversation's cache was dropped; the model can be used again")
}
