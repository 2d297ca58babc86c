//! Grouped-query self-attention (arXiv:2305.13245) with biases on q, k and v.

use burn::tensor::Tensor;

use super::{Lane, joined};
use crate::ops::{self, Linear, RmsNorm, Visible};
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
    /// `h + attention(norm(h))`, `[n, hidden]`; the new keys and values go to the caches of the lanes.
    pub(super) fn forward(
        &self,
        h: Tensor<2>,
        norm: &RmsNorm,
        lanes: &mut [Lane<'_>],
    ) -> Tensor<2> {
        let matrices = [&self.q_proj, &self.k_proj, &self.v_proj];
        let qkv = part("norm, q k v", || ops::project(&h, norm, matrices));
        let attended = match lanes {
            [lane] => vec![self.attend(qkv, lane)],
            lanes => lanes
                .iter_mut()
                .map(|lane| {
                    let rows = lane.rows.clone();
                    self.attend(qkv.clone().narrow(0, rows.start, rows.len()), lane)
                })
                .collect(),
        };
        // [n, heads · head_dim]
        let out = joined(attended);
        part("o, add", || ops::add_project(h, out, &self.o_proj))
    }

    /// The rows of one lane, `[n, heads · head_dim]`.
    fn attend(&self, qkv: Tensor<2>, lane: &mut Lane<'_>) -> Tensor<2> {
        let (n_past, chunk) = (lane.n_past, lane.tables.chunk);
        let Some(cache) = lane.layers.next() else {
            unreachable!("a cache has every layer");
        };
        // [rotations · n, heads, head_dim]
        let q = part("rope, cache", || cache.append(qkv, &lane.tables, n_past));
        let visible = Visible {
            n_past,
            window: self.sliding_window,
            chunk,
        };
        part("attention", || ops::attention(q, cache.pages(), visible))
    }
}
