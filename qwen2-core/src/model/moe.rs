//! A mixture of experts (Qwen2 technical report, 2.2.1): a router chooses some of many small MLPs for
//! each token, and one that all tokens visit has a gate of its own.

use std::cmp::Reverse;

use burn::tensor::{DType, Tensor};

use super::mlp::Mlp;
use crate::ops::{self, Linear, RmsNorm, Route, Visit};
use crate::profile::part;

#[derive(Debug, Clone)]
pub(crate) struct Moe {
    /// `mlp.gate`, `[num_experts, hidden]`.
    pub(crate) router: Linear,
    pub(crate) experts: Vec<Mlp>,
    /// The same matrices in one piece, where kernels choose the experts.
    #[cfg(feature = "gpu")]
    pub(crate) stack: Option<ops::Stack>,
    pub(crate) shared_expert: Mlp,
    /// `[1, hidden]`; its sigmoid is what the shared expert counts.
    pub(crate) shared_expert_gate: Linear,
    pub(crate) num_experts_per_tok: usize,
    /// Whether the weights of a token's experts are scaled to sum to 1.
    pub(crate) norm_topk_prob: bool,
}

impl Moe {
    /// `h + moe(norm(h))`, `[n, hidden]`.
    pub(crate) fn forward(&self, h: Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
        #[cfg(feature = "gpu")]
        if let Some(mixture) = self.mixture()
            && ops::takes_mixture(&h, &mixture)
        {
            return part("experts, add", || ops::mixture(h, norm, &mixture));
        }
        let visits = part("norm, router", || {
            let scores = ops::project(&h, norm, [&self.router, &self.shared_expert_gate]);
            self.visits(scores)
        });
        part("experts, add", || ops::experts(h, norm, visits))
    }

    /// The layer as kernels take it that choose experts themselves; adapters are beside the matrices.
    #[cfg(feature = "gpu")]
    fn mixture(&self) -> Option<ops::Mixture<'_>> {
        let stack = self.stack.as_ref()?;
        let mlp = |mlp: &Mlp| mlp.linears().into_iter().all(is_plain);
        let is_plain = [&self.router, &self.shared_expert_gate]
            .into_iter()
            .all(is_plain)
            && mlp(&self.shared_expert)
            && self.experts.iter().all(mlp);
        is_plain.then(|| ops::Mixture {
            router: &self.router,
            shared_gate: &self.shared_expert_gate,
            stack,
            shared: self.shared_expert.linears(),
            num_experts_per_tok: self.num_experts_per_tok,
            norm_topk_prob: self.norm_topk_prob,
        })
    }

    /// Who visits whom, by the scores of the router and the shared gate, `[n, num_experts + 1]`.
    fn visits(&self, scores: Tensor<2>) -> Vec<Visit<'_>> {
        let [n, width] = scores.dims();
        let scores = scores.into_data().convert_dtype(DType::F32);
        let scores: Vec<f32> = scores.iter::<f32>().collect();
        let mut routes: Vec<_> = self.experts.iter().map(|_| Route::new()).collect();
        let mut shared = Route::new();
        for (token, scores) in scores.chunks_exact(width).enumerate() {
            let (scores, gate) = scores.split_at(width - 1);
            for (expert, weight) in self.choose(scores) {
                routes[expert].push(token, weight);
            }
            shared.push(token, 1.0 / (1.0 + (-gate[0]).exp()));
        }
        debug_assert_eq!(shared.tokens.len(), n);
        let routed = self.experts.iter().zip(routes);
        routed
            .filter(|(_, route)| !route.tokens.is_empty())
            .chain([(&self.shared_expert, shared)])
            .map(|(expert, route)| Visit {
                gate: &expert.gate_proj,
                up: &expert.up_proj,
                down: &expert.down_proj,
                route,
            })
            .collect()
    }

    /// The experts of one token with their weights: a softmax over all, of which the highest are kept;
    /// of equals the first. A NaN is above all numbers.
    fn choose(&self, scores: &[f32]) -> Vec<(usize, f32)> {
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f32> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f32 = exps.iter().sum();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        // Positive numbers and NaN are ordered like their bits.
        order.sort_by_key(|expert| Reverse(exps[*expert].to_bits() & 0x7FFF_FFFF));
        order.truncate(self.num_experts_per_tok);
        let kept: f32 = order.iter().map(|expert| exps[*expert]).sum();
        let divisor = if self.norm_topk_prob { kept } else { sum };
        let weighed = order
            .into_iter()
            .map(|expert| (expert, exps[expert] / divisor));
        weighed.collect()
    }
}

#[cfg(feature = "gpu")]
fn is_plain(linear: &Linear) -> bool {
    linear.adapters.is_empty()
}

impl Route {
    fn new() -> Self {
        Self {
            tokens: Vec::new(),
            weights: Vec::new(),
        }
    }

    fn push(&mut self, token: usize, weight: f32) {
        self.tokens.push(token as u32); // below 2^31: config.rs bounds the context
        self.weights.push(weight);
    }
}
