//! Grouped-query self-attention (arXiv:2305.13245) with biases on q, k and v.

use burn::tensor::Tensor;

use super::{At, Lane, joined};
use crate::ops::{self, Linear, RmsNorm, Visible, Weight};
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
    /// Heads of queries.
    #[cfg(feature = "gpu")]
    pub(super) fn heads(&self, head_dim: usize) -> usize {
        self.q_proj.out_features() / head_dim
    }

    /// `h + attention(norm(h))`, `[n_out, hidden]`, of the rows that go on, nothing for none; the new keys
    /// and values of all go to the caches of the lanes.
    pub(super) fn forward(
        &self,
        h: Tensor<2>,
        norm: &RmsNorm,
        lanes: &mut [Lane<'_>],
    ) -> Option<Tensor<2>> {
        let matrices = [&self.q_proj, &self.k_proj, &self.v_proj];
        let qkv = part("norm, q k v", || ops::project(&h, norm, matrices));
        let attended: Vec<_> = match &mut *lanes {
            [lane] => self.attend(qkv, lane).into_iter().collect(),
            lanes => {
                let of = |lane: &mut Lane<'_>| {
                    let rows = lane.rows.clone();
                    self.attend(narrowed(qkv.clone(), rows.start, rows.len()), lane)
                };
                lanes.iter_mut().filter_map(of).collect()
            }
        };
        if attended.is_empty() {
            return None;
        }
        let all_go_on = lanes.iter().all(|lane| lane.n_out == lane.rows.len());
        let h = match all_go_on {
            true => h,
            false => {
                let going = lanes.iter().filter(|lane| lane.n_out > 0);
                let last =
                    |lane: &Lane<'_>| narrowed(h.clone(), lane.rows.end - lane.n_out, lane.n_out);
                joined(going.map(last).collect())
            }
        };
        // [n_out, heads · head_dim]
        let out = joined(attended);
        Some(part("o, add", || ops::add_project(h, out, &self.o_proj)))
    }

    /// The rows of one lane that go on, `[n_out, heads · head_dim]`; nothing for none.
    fn attend(&self, qkv: Tensor<2>, lane: &mut Lane<'_>) -> Option<Tensor<2>> {
        let (n, n_out) = (lane.rows.len(), lane.n_out);
        let Some(cache) = lane.layers.next() else {
            unreachable!("a cache has every layer");
        };
        let (n_past, tables) = match &lane.at {
            At::Past { n_past, tables } => (*n_past, tables),
            #[cfg(feature = "gpu")]
            At::Place(place) => {
                let window = self.sliding_window;
                return Some(part("attention", || cache.attend_at(qkv, place, window)));
            }
        };
        let chunk = tables.chunk;
        // [rotations · n, heads, head_dim]
        let q = part("rope, cache", || cache.append(qkv, tables, n_past));
        // Chunks take each query in several rotations, which lie one behind the other.
        let early = if chunk.is_none() { n - n_out } else { 0 };
        if n_out == 0 {
            return None;
        }
        let visible = Visible {
            n_past: n_past + early,
            window: self.sliding_window,
            chunk,
        };
        let n_queries = q.dims()[0] - early;
        let q = narrowed(q, early, n_queries);
        // Products with packed weights round what they multiply as well.
        let rounds = matches!(self.q_proj.weight, Weight::Packed { .. });
        let out = part("attention", || {
            ops::attention(q, cache.pages(), visible, rounds)
        });
        let rows = out.dims()[0];
        Some(narrowed(out, rows - n_out, n_out))
    }
}

/// `len` rows from `start` on.
fn narrowed<const D: usize>(x: Tensor<D>, start: usize, len: usize) -> Tensor<D> {
    match len == x.dims()[0] {
        true => x,
        false => x.narrow(0, start, len),
    }
}
