//! One forward of the network behind the panic fence: tokens in, logits on the host out.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
use crate::model::cache::Cache;
#[cfg(feature = "gpu")]
use crate::model::replay::{Found, Step};
use crate::model::{Part, Qwen2, Rows};
use crate::ops::{self, Threads, Watch, watched};
use crate::profile::part;

/// What burn says of a device that this process cannot use any more.
const LOST: &str = "The device is poisoned";
/// What it says of one that has no room.
const FULL: &str = "can't allocate buffer";

/// A network with the threads that compute it.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) qwen2: Qwen2,
    pub(crate) threads: Threads,
    /// The device was lost: nothing is asked of it again.
    is_lost: AtomicBool,
}

impl Network {
    pub(crate) fn new(qwen2: Qwen2, threads: Threads) -> Self {
        Self {
            qwen2,
            threads,
            is_lost: AtomicBool::new(false),
        }
    }

    /// # Errors
    /// `Unsupported` in a fork of the process that loaded the model: its threads are not there. `DeviceFailed` once the
    /// device was lost.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_lost.load(Ordering::Relaxed) {
            return Err(failed(LOST));
        }
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
    /// `DeviceFailed` if the backend failed, `OutOfMemory` if it had no room, and then the cache is empty.
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
        self.check()?;
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
        self.settle(outcome, batch.iter_mut().map(|part| &mut *part.cache))
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
        let outcome = fenced(|| ops::numbers(logits).map_err(|why| failed(&why)));
        self.settle(outcome, [cache])
    }

    /// What `read` makes of a step that is replayed, or nothing, where none is.
    #[cfg(feature = "gpu")]
    fn replay<R>(
        &self,
        token: u32,
        cache: &mut Cache,
        read: impl FnOnce(&mut Step) -> Result<R>,
    ) -> Result<Option<R>> {
        self.check()?;
        let outcome = fenced(|| self.qwen2.replay(token, cache)?.map(read).transpose());
        self.settle(outcome, [cache])
    }

    /// A panic as an error, behind which the caches are empty, and after which a lost device is not asked again.
    fn settle<'a, R>(
        &self,
        outcome: std::result::Result<Result<R>, String>,
        caches: impl IntoIterator<Item = &'a mut Cache>,
    ) -> Result<R> {
        let outcome = outcome.unwrap_or_else(|panic| Err(failed(&panic)));
        if let Err(error) = &outcome
            && matches!(
                error.kind(),
                ErrorKind::DeviceFailed | ErrorKind::OutOfMemory
            )
        {
            caches.into_iter().for_each(Cache::clear);
            if error.to_string().contains(LOST) {
                self.is_lost.store(true, Ordering::Relaxed);
            }
        }
        outcome
    }
}

/// On the host.
#[cfg(feature = "gpu")]
fn all(step: &Step) -> Result<Vec<f32>> {
    ops::numbers(step.logits()).map_err(|why| failed(&why))
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "computation was cancelled")
        .with_help("a cancel token or a timeout of the call ended it")
}

fn failed(why: &str) -> Error {
    let (kind, what, help) = if why.contains(LOST) {
        (
            ErrorKind::DeviceFailed,
            "device failed during the forward",
            "the device is lost to this process, and its models with it: start the process anew",
        )
    } else if why.contains(FULL) {
        (
            ErrorKind::OutOfMemory,
            "device has no room for the forward",
            "the conversation's cache was dropped; a shorter prompt, a smaller `prefill_chunk`, fewer sequences or \
             `kv_cache` in q8 need less",
        )
    } else {
        (
            ErrorKind::DeviceFailed,
            "device failed during the forward",
            "the conversation's cache was dropped; the model can be used again",
        )
    };
    Error::new(kind, what).with_why(why).with_help(help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;

    #[test]
    fn a_lost_device_is_not_asked_again() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model");
        let model = Model::load(path).expect("the demo model");
        let network = &model.inner.host.network;
        let mut cache = model.new_cache();
        let mut run = || network.forward(&[1], &mut cache, Rows::Last, &Watch::default());
        assert!(run().is_ok());
        let help = |error: &Error| error.help().unwrap_or_default().to_owned();
        let after = |why: &str| {
            let outcome = network.settle::<()>(Err(why.to_owned()), []);
            help(&outcome.expect_err("a failure"))
        };
        assert!(after("a kernel was refused").contains("used again"));
        assert!(after(&format!("{FULL} of size: 7")).contains("prefill_chunk"));
        assert!(run().is_ok(), "a full device is not a lost one");
        assert!(after(&format!("{LOST}: an illegal address")).contains("anew"));
        let error = run().expect_err("it is not asked");
        assert_eq!(error.kind(), ErrorKind::DeviceFailed);
        assert!(help(&error).contains("start the process anew"), "{error}");
    }
}
