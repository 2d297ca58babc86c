//! What tells one network from another without reading all of it.

use burn::tensor::Tensor;

use super::{FeedForward, Qwen2};
use crate::ops::{Linear, Weight};

/// Places at which a matrix is looked at.
const PLACES: usize = 8;
/// Numbers, or bytes of a packed matrix, that are read at each.
const WIDTH: usize = 32;

impl Qwen2 {
    /// Calls `feed` with what its caches depend on: their kind, all norms and biases, and some numbers of
    /// every matrix. Networks that were trained apart differ in nearly all of them.
    pub(crate) fn sample(&self, feed: &mut dyn FnMut(&[u8])) {
        let shape = &self.cache_shape;
        let on_cpu = cfg!(feature = "cpu") && shape.device == burn::tensor::Device::flex();
        // The order of positions is the device's.
        feed(format!("{:?} {on_cpu}", shape.format).as_bytes());
        sample_weight(&self.embed_tokens, feed);
        let norms = self
            .layers
            .iter()
            .flat_map(|layer| [&layer.input_layernorm, &layer.post_attention_layernorm]);
        for norm in norms.chain([&self.norm]) {
            feed(norm.weight.to_data().as_bytes());
        }
        // The walk wants to change what it visits; handles are cheap to copy.
        self.clone().each_linear(&mut |name, linear| {
            feed(name.as_bytes());
            sample_linear(linear, feed);
        });
        for layer in &self.layers {
            if let FeedForward::Sparse(moe) = &layer.mlp {
                feed(format!("{} {}", moe.num_experts_per_tok, moe.norm_topk_prob).as_bytes());
            }
        }
    }
}

fn sample_linear(linear: &Linear, feed: &mut dyn FnMut(&[u8])) {
    sample_weight(&linear.weight, feed);
    if let Some(bias) = &linear.bias {
        feed(bias.to_data().as_bytes());
    }
    for adapter in &linear.adapters {
        sample_linear(&adapter.down, feed);
        sample_linear(&adapter.up, feed);
    }
}

fn sample_weight(weight: &Weight, feed: &mut dyn FnMut(&[u8])) {
    match weight {
        Weight::Dense(matrix) => sample_dense(matrix, feed),
        Weight::Packed { shape, bytes } => {
            feed(format!("{shape:?}").as_bytes());
            let n = WIDTH.min(shape.bytes());
            for place in 0..PLACES {
                let start = spread(place, shape.bytes() - n);
                feed(bytes.clone().narrow(0, start, n).into_data().as_bytes());
            }
        }
    }
}

fn sample_dense(matrix: &Tensor<2>, feed: &mut dyn FnMut(&[u8])) {
    let [rows, cols] = matrix.dims();
    feed(format!("{rows} {cols} {:?}", matrix.dtype()).as_bytes());
    let n = WIDTH.min(cols);
    for place in 0..PLACES {
        let row = matrix.clone().narrow(0, spread(place, rows - 1), 1);
        let piece = row.narrow(1, spread(place, cols - n), n);
        feed(piece.into_data().as_bytes());
    }
}

/// The places from 0 to `last`.
fn spread(place: usize, last: usize) -> usize {
    last * place / (PLACES - 1)
}
