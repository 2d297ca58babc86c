//! Grouped-query self-attention (arXiv:2305.13245) with biases on q, k and v.

use burn::tensor::Tensor;

use super::cache::LayerCache;
use super::linear::Linear;
use crate::ops::{self, Visible};

#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    pub(crate) head_dim: usize,
    /// How far this layer looks back; `None`: to the start.
    pub(crate) sliding_window: Option<usize>,
}

impl Attention {
    /// `x` `[n, hidden]` → `[n, hidden]`; the new keys and values go to the cache behind `n_past`.
    pub(crate) fn forward(
        &self,
        x: Tensor<2>,
        (cos, sin): &(Tensor<2>, Tensor<2>),
        cache: &mut LayerCache,
        n_past: usize,
    ) -> Tensor<2> {
        let q = self.heads(self.q_proj.forward(x.clone())); // [n, heads, head_dim]
        let k = self.heads(self.k_proj.forward(x.clone())); // [n, kv_heads, head_dim]
        let v = self.heads(self.v_proj.forward(x)); // [n, kv_heads, head_dim]
        let q = ops::rope(q, cos, sin);
        // The cache holds rotated keys.
        cache.write(ops::rope(k, cos, sin), v, n_past);
        let visible = Visible {
            n_past,
            window: self.sliding_window,
        };
        let out = ops::attention(q, cache.keys(), cache.values(), visible); // [n, heads · head_dim]
        self.o_proj.forward(out)
    }

    fn heads(&self, x: Tensor<2>) -> Tensor<3> {
        let [n, width] = x.dims();
        x.reshape([n, width / self.head_dim, self.head_dim])
    }
}
