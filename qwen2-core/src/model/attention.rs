//! Grouped-query self-attention (arXiv:2305.13245) with biases on q, k and v.

use burn::tensor::Tensor;

use super::cache::LayerCache;
use crate::ops::{self, Linear, RmsNorm, RopeTables, Visible};
use crate::profile::part;

#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    /// How far this layer looks back; `None`: to the start.
    pub(crate) sliding_window: Option<usize>,
}

impl Attention {
    /// `h + attention(norm(h))`, `[n, hidden]`; the new keys and values go to the cache behind
    /// `n_past`.
    pub(crate) fn forward(
        &self,
        h: Tensor<2>,
        norm: &RmsNorm,
        tables: &RopeTables,
        cache: &mut LayerCache,
        n_past: usize,
    ) -> Tensor<2> {
        let matrices = [&self.q_proj, &self.k_proj, &self.v_proj];
        let qkv = part("norm, q k v", || ops::project(&h, norm, matrices));
        let q = part("rope, cache", || cache.append(qkv, tables, n_past)); // [rotations · n, heads, head_dim]
        let visible = Visible {
            n_past,
            window: self.sliding_window,
            chunk: tables.chunk,
        };
        // [n, heads · head_dim]
        let out = part("attention", || {
            ops::attention(q, cache.key_values(), visible)
        });
        part("o, add", || ops::add_project(h, out, &self.o_proj))
    }
}
