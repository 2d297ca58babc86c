//! The network: tokens and a cache go in, logits come out; it keeps no state of its own.
//!
//! Letters of the shapes: `n` tokens of one sequence, `heads` = `num_attention_heads`, `kv_heads` =
//! `num_key_value_heads`, `hidden` = `hidden_size`, `intermediate` = `intermediate_size`. Everything
//! between the matrices is f32.

mod adapt;
mod attention;
pub(crate) mod cache;
mod load;
mod mlp;
mod moe;
mod rope;

use burn::tensor::Tensor;

use crate::error::Result;
use crate::ops::{self, Linear, RmsNorm, RopeTables, Weight};
use crate::profile::part;
use attention::Attention;
use cache::{Cache, CacheShape};
use mlp::Mlp;
use moe::Moe;
use rope::Rope;

pub(crate) use adapt::Delta;
pub(crate) use load::{Kept, SCREEN, Settings, load};

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
    /// The last token's, exact where they are highest and near elsewhere, if the head is screened.
    Screened,
    /// Every token's.
    All,
}

impl Qwen2 {
    /// Runs `tokens` behind what `cache` holds and returns the logits of `rows`,
    /// `[rows, vocab_size]` f32; nothing for no rows.
    ///
    /// # Errors
    /// `ContextOverflow` if the tokens do not fit the cache, before any computation.
    ///
    /// # Panics
    /// Where burn fails (it reports by panic); the caller clears the cache then.
    pub(crate) fn forward(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        rows: Rows,
    ) -> Result<Option<Tensor<2>>> {
        cache.reserve(tokens.len())?;
        let long = cache.is_long();
        let (layers, n_past) = cache.parts();
        let device = &self.cache_shape.device;
        let tables = part("rope tables", || {
            self.rope.tables(n_past, tokens.len(), long, device)
        });
        let mut h = part("embed", || ops::embed(&self.embed_tokens, tokens)); // [n, hidden]
        for (layer, cache) in self.layers.iter().zip(layers) {
            h = layer.forward(h, &tables, cache, n_past);
        }
        cache.advance(tokens.len());
        let n = tokens.len();
        Ok(match rows {
            Rows::All => Some(self.head(h)),
            Rows::Last => Some(self.head(h.narrow(0, n - 1, 1))),
            Rows::Screened => Some(self.screened_head(h.narrow(0, n - 1, 1))),
            Rows::None => None,
        })
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

impl DecoderLayer {
    /// `h` `[n, hidden]` → `[n, hidden]`.
    fn forward(
        &self,
        h: Tensor<2>,
        tables: &RopeTables,
        cache: &mut cache::LayerCache,
        n_past: usize,
    ) -> Tensor<2> {
        let h = self
            .self_attn
            .forward(h, &self.input_layernorm, tables, cache, n_past);
        let norm = &self.post_attention_layernorm;
        match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(h, norm),
            FeedForward::Sparse(moe) => moe.forward(h, norm),
        }
    }
}
