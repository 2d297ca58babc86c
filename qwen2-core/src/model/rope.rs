//! Rotary tables: cosines and sines of the positions of one forward, in f32; plain, YaRN, or in chunks.

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{ModelConfig, RopeScaling};
use crate::ops::{Angles, RopeTables, settled};

/// The rotations of a model.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    usual: Frequencies,
    /// Those of sequences that are longer than so many tokens.
    beyond: Option<(usize, Frequencies)>,
    chunks: Option<Chunks>,
}

#[derive(Debug, Clone)]
struct Frequencies {
    /// `[head_dim / 2]`, f32: bf16 cannot hold positions above 256.
    inv_freq: Vec<f32>,
    /// What YaRN multiplies cosine and sine with (arXiv:2309.00071, section 3.4); else 1.
    attention_factor: f32,
}

/// Dual chunk attention (arXiv:2402.17463), as vLLM computes its rotations.
#[derive(Debug, Clone, Copy)]
struct Chunks {
    /// Positions of a chunk.
    length: usize,
    /// No query is further from a key.
    chunk_size: usize,
    original_max_position_embeddings: Option<usize>,
}

impl Rope {
    /// `when_needed`: YaRN is for sequences beyond the trained length only.
    pub(crate) fn new(config: &ModelConfig, when_needed: bool) -> Self {
        let plain = || Frequencies::new(config, None);
        let scaling = config.rope_scaling.as_ref();
        let trained = scaling.map(
            |RopeScaling::Yarn {
                 original_max_position_embeddings,
                 ..
             }| *original_max_position_embeddings,
        );
        if let Some(dual) = config.dual_chunk_attention {
            return Self {
                usual: plain(),
                beyond: None,
                chunks: Some(Chunks {
                    length: dual.chunk_length(),
                    chunk_size: dual.chunk_size,
                    original_max_position_embeddings: dual
                        .original_max_position_embeddings
                        .or(trained),
                }),
            };
        }
        let stretched = || Frequencies::new(config, scaling);
        let (usual, beyond) = match trained.filter(|_| when_needed) {
            None => (stretched(), None),
            Some(trained) => (plain(), Some((trained, stretched()))),
        };
        Self {
            usual,
            beyond,
            chunks: None,
        }
    }

    /// Whether a sequence of so many tokens takes the frequencies of long ones.
    pub(crate) fn is_long(&self, n_tokens: usize) -> bool {
        self.beyond
            .as_ref()
            .is_some_and(|(trained, _)| n_tokens > *trained)
    }

    /// Whether queries are rotated in several ways.
    #[cfg(feature = "gpu")]
    pub(crate) fn is_chunked(&self) -> bool {
        self.chunks.is_some()
    }

    /// Cosines and sines of the first `n` positions, where queries are rotated as keys are.
    #[cfg(feature = "gpu")]
    pub(crate) fn whole(&self, n: usize, long: bool, device: &Device) -> Angles {
        let positions = (0..n).map(|p| (p, 1.0));
        self.frequencies(long).angles(positions, device)
    }

    fn frequencies(&self, long: bool) -> &Frequencies {
        match &self.beyond {
            Some((_, frequencies)) if long => frequencies,
            _ => &self.usual,
        }
    }

    /// Cosines and sines of the positions `start..start + n`; `long` as [`Self::is_long`] tells.
    pub(crate) fn tables(&self, start: usize, n: usize, long: bool, device: &Device) -> RopeTables {
        let frequencies = self.frequencies(long);
        let positions = start..start + n;
        let Some(chunks) = self.chunks else {
            let angles = frequencies.angles(positions.map(|p| (p, 1.0)), device);
            return RopeTables {
                keys: angles.clone(),
                queries: angles,
                chunk: None,
            };
        };
        let Chunks {
            length, chunk_size, ..
        } = chunks;
        let all = |place: &dyn Fn(usize) -> usize| -> Vec<(usize, f32)> {
            let of = |p| (place(p), chunks.query_factor(p));
            positions.clone().map(of).collect()
        };
        let queries = [
            all(&|p| p % length),
            all(&|p| (p % length + length).min(chunk_size)),
            all(&|_| (2 * length - 1).min(chunk_size)),
        ];
        RopeTables {
            keys: frequencies.angles(positions.clone().map(|p| (p % length, 1.0)), device),
            queries: frequencies.angles(queries.concat().into_iter(), device),
            chunk: Some(length),
        }
    }
}

impl Chunks {
    /// What the query at a position is multiplied by, in f64 as its source has f32 of few digits.
    fn query_factor(self, position: usize) -> f32 {
        let Some(original) = self.original_max_position_embeddings else {
            return 1.0;
        };
        let stretch = (position + 1) as f64 / original as f64;
        (0.1 * stretch.ln() + 1.0).max(1.0) as f32
    }
}

impl Frequencies {
    fn new(config: &ModelConfig, scaling: Option<&RopeScaling>) -> Self {
        let half = config.head_dim / 2;
        let plain = |j: usize| config.rope_theta.powf(-(j as f64) / half as f64);
        match scaling {
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                extrapolation_factor,
                truncate,
            }) => {
                let length = *original_max_position_embeddings as f64;
                let ends = [*beta_fast, *beta_slow];
                let (low, high) = ramp_ends(config, length, ends, *truncate);
                let blend = |j: usize| {
                    let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    let kept = (1.0 - ramp) * extrapolation_factor;
                    (plain(j) / factor * (1.0 - kept) + plain(j) * kept) as f32
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

    /// Of positions with what each is multiplied by.
    fn angles(
        &self,
        positions: impl ExactSizeIterator<Item = (usize, f32)>,
        device: &Device,
    ) -> Angles {
        let shape = [positions.len(), self.inv_freq.len()];
        let mut cos = Vec::with_capacity(shape[0] * shape[1]);
        let mut sin = Vec::with_capacity(shape[0] * shape[1]);
        for (position, factor) in positions {
            let factor = factor * self.attention_factor;
            for inv_freq in &self.inv_freq {
                let (s, c) = (position as f32 * inv_freq).sin_cos();
                cos.push(c * factor);
                sin.push(s * factor);
            }
        }
        let upload = |values| settled(Tensor::from_data(TensorData::new(values, shape), device));
        Angles {
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

/// The dimensions between which YaRN goes over from extrapolation to interpolation: those that make as
/// many `rotations` over the trained length, whole ones with `truncate`.
fn ramp_ends(config: &ModelConfig, length: f64, rotations: [f64; 2], truncate: bool) -> (f64, f64) {
    let d = config.head_dim as f64;
    let [low, high] = rotations.map(|rotations| {
        d * (length / (rotations * 2.0 * std::f64::consts::PI)).ln()
            / (2.0 * config.rope_theta.ln())
    });
    let (low, high) = match truncate {
        true => (low.floor(), high.ceil()),
        false => (low, high),
    };
    let (low, high) = (low.max(0.0), high.min(d - 1.0));
    // transformers: a ramp of no width would divide by zero.
    (low, if low == high { high + 0.001 } else { high })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    /// Their powers are of f32, each off by a few units in the last place; ours are of f64.
    #[test]
    fn yarn_equals_transformers_and_vllm_for_every_key() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/yarn.json");
        let text = std::fs::read_to_string(path).expect("vectors");
        let vectors: Value = serde_json::from_str(&text).expect("json");
        let cases = vectors["cases"].as_array().expect("cases");
        assert_eq!(cases.len(), 17);
        for case in cases {
            let name = &case["name"];
            let mut config = json!(ModelConfig::default());
            for key in ["rope_theta", "head_dim", "rope_scaling"] {
                config[key] = case[key].clone();
            }
            let config = ModelConfig::from_json(config.to_string().as_bytes(), Path::new("c"))
                .expect("config");
            let got = Frequencies::new(&config, config.rope_scaling.as_ref());
            let want = case["inv_freq"].as_array().expect("numbers");
            assert_eq!(got.inv_freq.len(), want.len(), "{name}");
            for (got, want) in got.inv_freq.iter().zip(want) {
                let want = want.as_f64().expect("number") as f32;
                assert!((got - want).abs() <= 1e-6 * want, "{name}: {got} {want}");
            }
            let want = case["attention_factor"].as_f64().expect("number") as f32;
            assert_eq!(got.attention_factor, want, "{name}");
        }
    }
}
