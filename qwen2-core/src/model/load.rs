//! Named weights → the network.

use burn::tensor::{Bytes, DType, Device, Tensor, TensorData};

use super::attention::Attention;
use super::cache::CacheShape;
use super::mlp::Mlp;
use super::moe::Moe;
use super::rope::Rope;
use super::{DecoderLayer, FeedForward, Qwen2};
use crate::config::{ModelConfig, MoeConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{self, CacheFormat, Lease, Linear, RmsNorm, Weight, packed};

/// The head in few bits, made of the head when that was loaded.
pub(crate) const SCREEN: &str = "lm_head.screen";

/// The longest buffer that every GPU binds.
const LONGEST: usize = i32::MAX as usize;

/// What the config does not say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// The embedding table is the head as well.
    pub(crate) tied: bool,
    /// A copy of the head in few bits is to be had by the name [`SCREEN`].
    pub(crate) screened: bool,
    /// What keys and values are kept in.
    pub(crate) cache_format: CacheFormat,
    /// YaRN is for sequences beyond the trained length only.
    pub(crate) yarn_when_needed: bool,
}

/// Builds the network of `config` on `device`.
///
/// `get` gives a tensor by its checkpoint name, in its checked shape and as it is to be kept.
///
/// # Errors
/// What `get` returns.
pub(crate) fn load(
    config: &ModelConfig,
    device: &Device,
    settings: Settings,
    get: &mut dyn FnMut(&str) -> Result<Kept>,
) -> Result<Qwen2> {
    let Settings {
        tied,
        screened,
        cache_format,
        yarn_when_needed,
    } = settings;
    let mut source = Source { device, get };
    let embed_tokens = source.matrix("model.embed_tokens.weight")?;
    #[cfg(feature = "gpu")]
    let stacks = ops::on_gpu(&embed_tokens);
    #[cfg(not(feature = "gpu"))]
    let stacks = false;
    let layers = (0..config.num_hidden_layers)
        .map(|index| layer(config, &mut source, index, stacks))
        .collect::<Result<_>>()?;
    let norm = source.norm("model.norm", config.rms_norm_eps)?;
    let lm_head = if tied {
        Linear {
            weight: embed_tokens.clone(), // a handle, not a copy
            bias: None,
            adapters: Vec::new(),
        }
    } else {
        source.linear("lm_head", false)?
    };
    let screen = screened.then(|| source.matrix(SCREEN)).transpose()?;
    let qwen2 = Qwen2 {
        embed_tokens,
        layers,
        norm,
        lm_head,
        screen,
        rope: Rope::new(config, yarn_when_needed),
        cache_shape: CacheShape {
            num_hidden_layers: config.num_hidden_layers,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            format: cache_format,
            device: device.clone(),
            lease: Lease::of(device),
        },
        #[cfg(feature = "gpu")]
        is_replayed: false,
    };
    #[cfg(feature = "gpu")]
    let qwen2 = Qwen2 {
        is_replayed: qwen2.is_replayable(),
        ..qwen2
    };
    Ok(qwen2)
}

/// `stacks`: the experts go into one piece.
fn layer(
    config: &ModelConfig,
    source: &mut Source<'_>,
    index: usize,
    stacks: bool,
) -> Result<DecoderLayer> {
    let at = |name: &str| format!("model.layers.{index}.{name}");
    Ok(DecoderLayer {
        input_layernorm: source.norm(&at("input_layernorm"), config.rms_norm_eps)?,
        self_attn: Attention {
            q_proj: source.linear(&at("self_attn.q_proj"), true)?,
            k_proj: source.linear(&at("self_attn.k_proj"), true)?,
            v_proj: source.linear(&at("self_attn.v_proj"), true)?,
            o_proj: source.linear(&at("self_attn.o_proj"), false)?,
            sliding_window: config.layer_sliding_windows[index],
        },
        post_attention_layernorm: source
            .norm(&at("post_attention_layernorm"), config.rms_norm_eps)?,
        mlp: match config.moe.as_ref().filter(|moe| moe.is_sparse(index)) {
            None => FeedForward::Dense(Box::new(source.mlp(&at("mlp"))?)),
            Some(moe) => FeedForward::Sparse(Box::new(experts(moe, source, &at("mlp"), stacks)?)),
        },
    })
}

fn experts(config: &MoeConfig, source: &mut Source<'_>, prefix: &str, stacks: bool) -> Result<Moe> {
    let router = source.linear(&format!("{prefix}.gate"), false)?;
    let names = (0..config.num_experts).map(|expert| format!("{prefix}.experts.{expert}"));
    let names: Vec<String> = names.collect();
    let mut stack = None;
    let experts = match stacks {
        true => {
            let each = ["gate_proj", "up_proj", "down_proj"];
            let [gates, ups, downs] = each.map(|name| source.stack(&names, name));
            let (gates, ups, downs) = (gates?, ups?, downs?);
            if let (Some(gate), Some(up), Some(down)) = (gates.all, ups.all, downs.all) {
                stack = Some((gate, up, down));
            }
            let triples = gates.each.into_iter().zip(ups.each).zip(downs.each);
            triples
                .map(|((gate, up), down)| Mlp {
                    gate_proj: plain(gate),
                    up_proj: plain(up),
                    down_proj: plain(down),
                })
                .collect()
        }
        false => {
            let each = names.iter().map(|name| source.mlp(name));
            each.collect::<Result<_>>()?
        }
    };
    #[cfg(not(feature = "gpu"))]
    let _ = stack;
    Ok(Moe {
        router,
        experts,
        #[cfg(feature = "gpu")]
        stack: stack.map(|(gate, up, down)| ops::Stack {
            count: config.num_experts,
            gate,
            up,
            down,
        }),
        shared_expert: source.mlp(&format!("{prefix}.shared_expert"))?,
        shared_expert_gate: source.linear(&format!("{prefix}.shared_expert_gate"), false)?,
        num_experts_per_tok: config.num_experts_per_tok,
        norm_topk_prob: config.norm_topk_prob,
    })
}

fn plain(weight: Weight) -> Linear {
    Linear {
        weight,
        bias: None,
        adapters: Vec::new(),
    }
}

/// Matrices behind each other, if they are alike, and each of them: views of it then.
struct Stacked {
    all: Option<Weight>,
    each: Vec<Weight>,
}

/// A tensor as it is to be kept.
pub(crate) enum Kept {
    /// Numbers of one of the float types.
    Dense(TensorData),
    /// A matrix as blocks of few bits.
    Packed(packed::Shape, Bytes),
}

impl Kept {
    /// Whether both are of one shape and kept alike.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dense(a), Self::Dense(b)) => a.dtype() == b.dtype() && a.shape() == b.shape(),
            (Self::Packed(a, _), Self::Packed(b, _)) => a == b,
            _ => false,
        }
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Dense(data) => data.as_bytes(),
            Self::Packed(_, bytes) => bytes,
        }
    }
}

struct Source<'a> {
    device: &'a Device,
    get: &'a mut dyn FnMut(&str) -> Result<Kept>,
}

impl Source<'_> {
    fn matrix(&mut self, name: &str) -> Result<Weight> {
        let kept = (self.get)(name)?;
        Ok(self.put(kept))
    }

    /// The weights `name` of all `prefixes`.
    fn stack(&mut self, prefixes: &[String], name: &str) -> Result<Stacked> {
        let get = |prefix| (self.get)(&format!("{prefix}.{name}.weight"));
        let kept = prefixes.iter().map(get).collect::<Result<Vec<_>>>()?;
        let n = kept.len();
        let alike = kept.windows(2).all(|pair| pair[0].is_like(&pair[1]));
        if !alike || n * kept[0].bytes().len() > LONGEST {
            return Ok(Stacked {
                all: None,
                each: kept.into_iter().map(|kept| self.put(kept)).collect(),
            });
        }
        let mut bytes = Vec::with_capacity(n * kept[0].bytes().len());
        kept.iter()
            .for_each(|kept| bytes.extend_from_slice(kept.bytes()));
        let bytes = Bytes::from_bytes_vec(bytes);
        let all = self.put(match &kept[0] {
            Kept::Dense(data) => {
                let shape = [n * data.shape()[0], data.shape()[1]];
                Kept::Dense(TensorData::from_bytes(bytes, shape, data.dtype()))
            }
            Kept::Packed(shape, _) => Kept::Packed(*shape, bytes),
        });
        Ok(Stacked {
            each: (0..n).map(|index| all.part(index, n)).collect(),
            all: Some(all),
        })
    }

    /// A matrix on the device; a packed one may be several of its shape.
    fn put(&self, kept: Kept) -> Weight {
        match kept {
            Kept::Dense(data) => {
                let dtype = data.dtype();
                Weight::Dense(ops::settled(Tensor::from_data(data, (self.device, dtype))))
            }
            Kept::Packed(shape, bytes) => {
                // Not every GPU knows bytes.
                let (dtype, size) = match *self.device == Device::flex() {
                    true => (DType::U8, 1),
                    false => (DType::U32, 4),
                };
                let n = bytes.len() / size;
                let data = TensorData::from_bytes(bytes, [n], dtype);
                Weight::Packed {
                    shape,
                    bytes: Tensor::from_data(data, (self.device, dtype)),
                }
            }
        }
    }

    fn linear(&mut self, name: &str, bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{name}.weight"))?;
        let bias = if bias {
            Some(self.vector(&format!("{name}.bias"))?)
        } else {
            None
        };
        Ok(Linear {
            weight,
            bias,
            adapters: Vec::new(),
        })
    }

    fn mlp(&mut self, name: &str) -> Result<Mlp> {
        Ok(Mlp {
            gate_proj: self.linear(&format!("{name}.gate_proj"), false)?,
            up_proj: self.linear(&format!("{name}.up_proj"), false)?,
            down_proj: self.linear(&format!("{name}.down_proj"), false)?,
        })
    }

    fn norm(&mut self, name: &str, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm {
            weight: self.vector(&format!("{name}.weight"))?,
            eps,
        })
    }

    /// Norm weights and biases: a few kilobytes, kept in f32, where they are used.
    fn vector(&mut self, name: &str) -> Result<Tensor<1>> {
        match (self.get)(name)? {
            Kept::Dense(data) => Ok(Tensor::from_data(
                data.convert_dtype(DType::F32),
                (self.device, DType::F32),
            )),
            Kept::Packed(..) => {
                Err(Error::new(ErrorKind::Internal, "a vector was packed").with_key(name))
            }
        }
    }
}
