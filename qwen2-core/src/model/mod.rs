//! The network: tokens and a cache go in, logits come out; it keeps no state of its own.
//!
//! Letters of the shapes: `n` tokens, of one sequence or of several one behind the other, `heads` = `num_attention_heads`, `kv_heads` =
//! `num_key_value_heads`, `hidden` = `hidden_size`, `intermediate` = `intermediate_size`. Everything
//! between the matrices is f32.

mod adapt;
mod attention;
pub(crate) mod cache;
mod fingerprint;
mod load;
mod mlp;
mod moe;
#[cfg(feature = "gpu")]
pub(crate) mod replay;
mod rope;

use std::ops::Range;

use burn::tensor::Tensor;

use crate::error::Result;
use crate::ops::{self, Linear, RmsNorm, RopeTables, Weight};
use crate::profile::part;
use attention::Attention;
use cache::{Cache, CacheShape, LayerCache};
use mlp::Mlp;
use moe::Moe;
use rope::Rope;

pub(crate) use adapt::Delta;
pub(crate) use load::{Kept, SCREEN, Settings, load};

/// Steps of one token in a row that a GPU is told kernel by kernel, before one is recorded and replayed.
pub(crate) const WARM_STEPS: usize = 2;

/// Qwen2 (arXiv:2407.10671), dense or with experts.
#[derive(Clone, Debug)]
pub(crate) struct Qwen2 {
    embed_tokens: Weight,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    /// Shares the embedding table's memory where they are tied.
    lm_head: Linear,
    /// A copy of the head in few bits; see [`ops::screened_head`].
    screen: Option<Weight>,
    rope: Rope,
    cache_shape: CacheShape,
    /// Whether decode steps are recorded and replayed.
    #[cfg(feature = "gpu")]
    is_replayed: bool,
}

#[derive(Clone, Debug)]
struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

/// The second half of a layer.
#[derive(Clone, Debug)]
enum FeedForward {
    Dense(Box<Mlp>),
    Sparse(Box<Moe>),
}

/// The rows whose logits a forward returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// None: the tokens only fill the cache.
    None,
    /// The last token's.
    Last,
    /// As many of the last tokens'.
    Tail(usize),
    /// The last token's, exact where they are highest and near elsewhere, if the head is screened.
    Screened,
    /// Every token's.
    All,
    /// Every token's hidden state behind the final norm in place of its logits, of a batch of one.
    Hidden,
}

/// New tokens of one sequence of a batch, at least one.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub(crate) tokens: &'a [u32],
    /// What the sequence has gone through; the tokens go behind it.
    pub(crate) cache: &'a mut Cache,
    pub(crate) rows: Rows,
}

impl Rows {
    /// How many of a sequence's `n` new tokens leave the last layer; they are its last ones.
    fn among(self, n: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last | Self::Screened => 1,
            Self::Tail(rows) => rows,
            Self::All | Self::Hidden => n,
        }
    }
}

/// One sequence of a batch on its way through the layers.
struct Lane<'a> {
    /// Its rows among those of the batch.
    rows: Range<usize>,
    /// How many of them, the last ones, go on behind the attention of the layer at hand: all, but for the last
    /// layer, whose other rows nobody reads.
    n_out: usize,
    at: At,
    layers: std::slice::IterMut<'a, LayerCache>,
}

/// Where the rows of a lane go.
enum At {
    /// Behind so many positions.
    Past { n_past: usize, tables: RopeTables },
    /// A single one, where the device says.
    #[cfg(feature = "gpu")]
    Place(ops::Place),
}

impl Qwen2 {
    /// Runs the tokens of several sequences, each behind what its cache holds, so that each weight is
    /// read once for all of them; the logits of their rows in order, `[rows, vocab_size]` f32, nothing
    /// for no rows, and where the watch ended it. A head is screened for a batch of one only, which may
    /// ask for hidden states as well, `[n, hidden]`.
    ///
    /// # Errors
    /// `ContextOverflow` if the tokens do not fit a cache, before any computation.
    ///
    /// # Panics
    /// Where burn fails (it reports by panic); the caller clears the caches then.
    pub(crate) fn forward_batch(&self, batch: &mut [Part<'_>]) -> Result<Option<Tensor<2>>> {
        #[cfg(feature = "gpu")]
        if let [part] = &mut *batch
            && let ([token], Rows::Last | Rows::Screened) = (part.tokens, part.rows)
            && let Some(step) = self.replay(*token, part.cache)?
        {
            return Ok(Some(step.logits()));
        }
        for part in &mut *batch {
            part.cache.reserve(part.tokens.len())?;
        }
        let device = &self.cache_shape.device;
        let tokens: Vec<u32> = batch.iter().flat_map(|part| part.tokens).copied().collect();
        let wanted: Vec<Rows> = batch.iter().map(|part| part.rows).collect();
        let mut end = 0;
        let lanes = batch.iter_mut().map(|part| {
            let (n, long) = (part.tokens.len(), part.cache.is_long());
            let (layers, n_past) = part.cache.parts();
            end += n;
            Lane {
                rows: end - n..end,
                n_out: n,
                at: At::Past {
                    n_past,
                    tables: self.rope.tables(n_past, n, long, device),
                },
                layers: layers.iter_mut(),
            }
        });
        let mut lanes: Vec<_> = part("rope tables", || lanes.collect());
        let h = part("embed", || ops::embed(&self.embed_tokens, &tokens)); // [n, hidden]
        let mut h = Some(h);
        let n_layers = self.layers.len();
        for (index, layer) in self.layers.iter().enumerate() {
            if index + 1 == n_layers {
                for (lane, rows) in lanes.iter_mut().zip(&wanted) {
                    lane.n_out = rows.among(lane.rows.len());
                }
            }
            h = h.and_then(|h| layer.forward(h, &mut lanes));
            if ops::layer_done(index + 1, n_layers).is_break() {
                return Ok(None);
            }
        }
        drop(lanes);
        for part in &mut *batch {
            part.cache.advance(part.tokens.len());
        }
        Ok(h.map(|h| match wanted[..] {
            [Rows::Screened] => self.screened_head(h),
            [Rows::Hidden] => ops::norm(h, &self.norm),
            _ => self.head(h),
        }))
    }

    /// `h` `[rows, hidden]` → logits `[rows, vocab_size]`.
    fn head(&self, h: Tensor<2>) -> Tensor<2> {
        part("norm, head", || {
            ops::project(&h, &self.norm, [&self.lm_head])
        })
    }

    /// As [`Self::head`], for one row.
    fn screened_head(&self, h: Tensor<2>) -> Tensor<2> {
        let Some(screen) = &self.screen else {
            return self.head(h);
        };
        part("norm, head", || {
            ops::screened_head(&h, &self.norm, &self.lm_head, screen)
        })
    }

    /// Readies a cache for a sequence that has `n_tokens` tokens by now: forgets what it holds if that
    /// was computed with other frequencies than so long a sequence takes.
    pub(crate) fn ready(&self, cache: &mut Cache, n_tokens: usize) {
        cache.set_long(self.rope.is_long(n_tokens));
        cache.expect(n_tokens);
    }

    /// Whether sequences of both lengths have the same frequencies.
    pub(crate) fn are_alike(&self, n_tokens: usize, other: usize) -> bool {
        self.rope.is_long(n_tokens) == self.rope.is_long(other)
    }

    /// Positions of a cache that a sequence of `n_tokens` tokens can build on.
    pub(crate) fn keeps(&self, cache: &Cache, n_tokens: usize) -> usize {
        match self.rope.is_long(n_tokens) == cache.is_long() {
            true => cache.n_tokens(),
            false => 0,
        }
    }

    /// An empty cache for one sequence.
    pub(crate) fn new_cache(&self, context_length: usize) -> Cache {
        Cache::new(self.cache_shape.clone(), context_length)
    }
}

/// Rows of several tensors as one.
fn joined(mut parts: Vec<Tensor<2>>) -> Tensor<2> {
    match parts.len() {
        1 => parts.swap_remove(0),
        _ => Tensor::cat(parts, 0),
    }
}

impl DecoderLayer {
    /// `h` `[n, hidden]`, the rows of all lanes → those that go on; nothing for none.
    fn forward(&self, h: Tensor<2>, lanes: &mut [Lane<'_>]) -> Option<Tensor<2>> {
        let h = self.self_attn.forward(h, &self.input_layernorm, lanes)?;
        let norm = &self.post_attention_layernorm;
        Some(match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(h, norm),
            FeedForward::Sparse(moe) => moe.forward(h, norm),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use crate::{Device, Model};

    fn tokens(n: usize, seed: u32) -> Vec<u32> {
        (0..n as u32).map(|i| 5 + (i * 7 + seed) % 90).collect()
    }

    /// The logits of the rows of one sequence behind 9 tokens, and the next token's.
    fn ask(model: &Model, n: usize, seed: u32, rows: Rows) -> (Vec<f32>, Vec<f32>) {
        let mut caches = [model.new_cache(), model.new_cache()];
        let lists = [tokens(n, seed), tokens(7, seed + 3)];
        let network = &model.inner.host.network;
        let mut run = |lists: [&[u32]; 2], rows: [Rows; 2]| {
            let parts = caches.iter_mut().zip(lists).zip(rows);
            let mut batch: Vec<_> = parts
                .map(|((cache, tokens), rows)| Part {
                    tokens,
                    cache,
                    rows,
                })
                .collect();
            network.forward_batch(&mut batch).unwrap()
        };
        run([&tokens(9, seed), &[1]], [Rows::None; 2]);
        let logits = run([&lists[0], &lists[1]], [rows, Rows::None]);
        (logits, run([&[3], &[4]], [Rows::Last; 2]))
    }

    fn near(got: &[f32], want: &[f32], what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (got, want) in got.iter().zip(want) {
            // One row is summed in another order than many.
            assert!((got - want).abs() < 2e-5, "{what}: {got} {want}");
        }
    }

    #[test]
    fn rows_that_nobody_reads_change_nothing() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/models/");
        for name in ["tied", "gqa7", "sliding", "moe", "dual_chunk"] {
            let model = Model::builder(format!("{root}{name}")).device(Device::cpu());
            let model = model.load().unwrap();
            let vocab_size = model.config().vocab_size;
            for n in [1, 6, 40] {
                let (all, next) = ask(&model, n, 1, Rows::All);
                assert_eq!(all.len(), n * vocab_size);
                let tail = n.min(3);
                for (rows, count) in [(Rows::None, 0), (Rows::Last, 1), (Rows::Tail(tail), tail)] {
                    let (some, after) = ask(&model, n, 1, rows);
                    let what = format!("{name}, {n}, {rows:?}");
                    near(&some, &all[(n - count) * vocab_size..], &what);
                    near(&after, &next, &what);
                }
            }
        }
    }
}
