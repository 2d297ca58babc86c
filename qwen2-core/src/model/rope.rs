//! Rotary tables: cosines and sines of the positions of one forward, in f32; plain or YaRN.

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{ModelConfig, RopeScaling};
use crate::ops::RopeTables;

/// The frequencies of a model.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    /// `[head_dim / 2]`, f32: bf16 cannot hold positions above 256.
    inv_freq: Vec<f32>,
    /// What YaRN multiplies cosine and sine with (arXiv:2309.00071, section 3.4); else 1.
    attention_factor: f32,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let half = config.head_dim / 2;
        let plain = |j: usize| config.rope_theta.powf(-(j as f64) / half as f64);
        match &config.rope_scaling {
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                ..
            }) => {
                let length = *original_max_position_embeddings as f64;
                let (low, high) = ramp_ends(config, length, *beta_fast, *beta_slow);
                let blend = |j: usize| {
                    let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    (plain(j) / factor * ramp + plain(j) * (1.0 - ramp)) as f32
                };
                let attention =
                    attention_factor.unwrap_or_else(|| default_attention_factor(*factor));
                Self {
                    inv_freq: (0..half).map(blend).collect(),
                    attention_factor: attention as f32,
                }
            }
            None => Self {
                inv_freq: (0..half).map(|j| plain(j) as f32).collect(),
                attention_factor: 1.0,
            },
        }
    }

    /// Cosines and sines of the positions `start..start + n`.
    pub(crate) fn tables(&self, start: usize, n: usize, device: &Device) -> RopeTables {
        let shape = [n, self.inv_freq.len()];
        let mut cos = Vec::with_capacity(n * self.inv_freq.len());
        let mut sin = Vec::with_capacity(n * self.inv_freq.len());
        for position in start..start + n {
            for inv_freq in &self.inv_freq {
                let (s, c) = (position as f32 * inv_freq).sin_cos();
                cos.push(c * self.attention_factor);
                sin.push(s * self.attention_factor);
            }
        }
        let upload = |values| Tensor::from_data(TensorData::new(values, shape), device);
        RopeTables {
            cos: upload(cos),
            sin: upload(sin),
        }
    }
}

/// `0.1 ln(factor) + 1`, as transformers and vLLM take it when the config is silent.
fn default_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * factor.ln() + 1.0
    }
}

/// The dimensions between which YaRN goes over from extrapolation to interpolation.
fn ramp_ends(config: &ModelConfig, length: f64, beta_fast: f64, beta_slow: f64) -> (f64, f64) {
    let d = config.head_dim as f64;
    let dimension = |rotations: f64| {
        d * (length / (rotations * 2.0 * std::f64::consts::PI)).ln()
            / (2.0 * config.rope_theta.ln())
    };
    let low = dimension(beta_fast).floor().max(0.0);
    let high = dimension(beta_slow).ceil().min(d - 1.0);
    // transformers: a ramp of no width would divide by zero.
    (low, if low == high { high + 0.001 } else { high })
}
