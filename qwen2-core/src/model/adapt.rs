//! A network with an adapter beside its weights, which it shares with the one it was made of.

use burn::tensor::{DType, Tensor, TensorData};

use super::mlp::Mlp;
use super::{FeedForward, Qwen2};
use crate::ops::{Linear, LowRank, Weight};

/// `scale · up · down` is added to a matrix.
pub(crate) struct Delta<'a> {
    /// `[rank, inputs]`.
    pub(crate) down: &'a [f32],
    /// `[outputs, rank]`.
    pub(crate) up: &'a [f32],
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Qwen2 {
    /// This network with what `get` has for the weight of that name added to what its matrix gives, on
    /// top of adapters it has already.
    pub(crate) fn with_adapter<'a>(&self, get: &dyn Fn(&str) -> Option<Delta<'a>>) -> Self {
        let device = &self.cache_shape.device;
        let matrix = |values: &[f32], shape: [usize; 2]| Linear {
            weight: Weight::Dense(Tensor::from_data(
                TensorData::new(values.to_vec(), shape),
                (device, DType::F32),
            )),
            bias: None,
            adapters: Vec::new(),
        };
        let mut adapted = self.clone();
        #[cfg(feature = "gpu")]
        {
            adapted.is_replayed = false; // its products are chosen by trial
        }
        adapted.each_linear(&mut |name, linear| {
            let Some(delta) = get(&format!("{name}.weight")) else {
                return;
            };
            let (down, up, rank) = (delta.down, delta.up, delta.rank);
            let scaled: Vec<f32> = up.iter().map(|x| x * delta.scale).collect();
            linear.adapters.push(LowRank {
                down: matrix(down, [rank, down.len() / rank]),
                up: matrix(&scaled, [up.len() / rank, rank]),
            });
        });
        adapted
    }

    /// Calls `body` with every matrix that is multiplied with, by its name in checkpoints.
    pub(super) fn each_linear(&mut self, body: &mut dyn FnMut(&str, &mut Linear)) {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let prefix = format!("model.layers.{index}");
            let attention = &mut layer.self_attn;
            for (name, linear) in [
                ("q_proj", &mut attention.q_proj),
                ("k_proj", &mut attention.k_proj),
                ("v_proj", &mut attention.v_proj),
                ("o_proj", &mut attention.o_proj),
            ] {
                body(&format!("{prefix}.self_attn.{name}"), linear);
            }
            let prefix = format!("{prefix}.mlp");
            let moe = match &mut layer.mlp {
                FeedForward::Dense(mlp) => {
                    mlp.each_linear(&prefix, body);
                    continue;
                }
                FeedForward::Sparse(moe) => moe,
            };
            body(&format!("{prefix}.gate"), &mut moe.router);
            for (expert, mlp) in moe.experts.iter_mut().enumerate() {
                mlp.each_linear(&format!("{prefix}.experts.{expert}"), body);
            }
            let shared = format!("{prefix}.shared_expert");
            moe.shared_expert.each_linear(&shared, body);
            body(&format!("{shared}_gate"), &mut moe.shared_expert_gate);
        }
        body("lm_head", &mut self.lm_head);
    }
}

impl Mlp {
    fn each_linear(&mut self, prefix: &str, body: &mut dyn FnMut(&str, &mut Linear)) {
        for (name, linear) in [
            ("gate_proj", &mut self.gate_proj),
            ("up_proj", &mut self.up_proj),
            ("down_proj", &mut self.down_proj),
        ] {
            body(&format!("{prefix}.{name}"), linear);
        }
    }
}
