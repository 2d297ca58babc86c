//! Named weights → the network.

use std::ops::Range;

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
    let mut source = Source {
        device,
        get,
        joins: false,
    };
    let embed_tokens = source.matrix("model.embed_tokens.weight")?;
    #[cfg(feature = "gpu")]
    {
        source.joins = ops::on_gpu(&embed_tokens);
    }
    let layers = (0..config.num_hidden_layers)
        .map(|index| layer(config, &mut source, index))
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

fn layer(config: &ModelConfig, source: &mut Source<'_>, index: usize) -> Result<DecoderLayer> {
    let at = |name: &str| format!("model.layers.{index}.{name}");
    let [q_proj, k_proj, v_proj] = source.linears(
        ["q", "k", "v"].map(|name| at(&format!("self_attn.{name}_proj"))),
        true,
    )?;
    Ok(DecoderLayer {
        input_layernorm: source.norm(&at("input_layernorm"), config.rms_norm_eps)?,
        self_attn: Attention {
            q_proj,
            k_proj,
            v_proj,
            o_proj: source.linear(&at("self_attn.o_proj"), false)?,
            sliding_window: config.layer_sliding_windows[index],
        },
        post_attention_layernorm: source
            .norm(&at("post_attention_layernorm"), config.rms_norm_eps)?,
        mlp: match config.moe.as_ref().filter(|moe| moe.is_sparse(index)) {
            None => FeedForward::Dense(Box::new(source.mlp(&at("mlp"))?)),
            Some(moe) => FeedForward::Sparse(Box::new(experts(moe, source, &at("mlp"))?)),
        },
    })
}

fn experts(config: &MoeConfig, source: &mut Source<'_>, prefix: &str) -> Result<Moe> {
    let router = source.linear(&format!("{prefix}.gate"), false)?;
    let names = (0..config.num_experts).map(|expert| format!("{prefix}.experts.{expert}"));
    let names: Vec<String> = names.collect();
    let mut stack = None;
    let experts = match source.joins {
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

    /// Whether rows of the other can be read as rows of this one, behind its own.
    fn goes_before(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dense(a), Self::Dense(b)) => {
                a.dtype() == b.dtype() && a.shape()[1..] == b.shape()[1..]
            }
            (Self::Packed(a, _), Self::Packed(b, _)) => {
                a.format == b.format && a.cols == b.cols && a.rows.is_multiple_of(packed::ROWS)
            }
            _ => false,
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Dense(data) => data.shape()[0],
            Self::Packed(shape, _) => shape.rows,
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
    /// Matrices that are read together go into one piece: experts, and what one input is multiplied with.
    joins: bool,
}

/// What is kept, each behind the other; they are alike but for their rows.
fn joined(kept: &[Kept]) -> Option<Kept> {
    let len = kept.iter().map(|kept| kept.bytes().len()).sum();
    if len > LONGEST {
        return None;
    }
    let mut bytes = Vec::with_capacity(len);
    kept.iter()
        .for_each(|kept| bytes.extend_from_slice(kept.bytes()));
    let bytes = Bytes::from_bytes_vec(bytes);
    let rows = kept.iter().map(Kept::rows).sum();
    Some(match &kept[0] {
        Kept::Dense(data) => {
            let mut dims = data.shape().to_vec();
            dims[0] = rows;
            Kept::Dense(TensorData::from_bytes(bytes, dims, data.dtype()))
        }
        Kept::Packed(shape, _) => Kept::Packed(packed::Shape { rows, ..*shape }, bytes),
    })
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
        let Some(all) = alike.then(|| joined(&kept)).flatten() else {
            return Ok(Stacked {
                all: None,
                each: kept.into_iter().map(|kept| self.put(kept)).collect(),
            });
        };
        let mut all = self.put(all);
        if let Weight::Packed { shape, .. } = &mut all {
            shape.rows = kept[0].rows();
        }
        Ok(Stacked {
            each: (0..n).map(|index| all.part(index, n)).collect(),
            all: Some(all),
        })
    }

    /// Linear layers of one input; their matrices are views of one where that can be.
    fn linears<const N: usize>(&mut self, names: [String; N], bias: bool) -> Result<[Linear; N]> {
        let mut linears = Vec::with_capacity(N);
        if !self.joins {
            for name in &names {
                linears.push(self.linear(name, bias)?);
            }
        } else {
            let weights = names.each_ref().map(|name| format!("{name}.weight"));
            let weights =
                self.views(&weights, Weight::rows, |source, kept| Ok(source.put(kept)))?;
            let mut biases = vec![None; N];
            if bias {
                let names = names.each_ref().map(|name| format!("{name}.bias"));
                let narrow = |all: &Tensor<1>, rows: Range<usize>| {
                    all.clone().narrow(0, rows.start, rows.len())
                };
                let put = |source: &Self, kept| source.floats("bias", kept);
                let each = self.views(&names, narrow, put)?;
                biases = each.into_iter().map(Some).collect();
            }
            linears.extend(
                weights
                    .into_iter()
                    .zip(biases)
                    .map(|(weight, bias)| Linear {
                        weight,
                        bias,
                        adapters: Vec::new(),
                    }),
            );
        }
        Ok(linears.try_into().expect("one for each name"))
    }

    /// Tensors by their names, as rows of one if they are alike.
    fn views<T>(
        &mut self,
        names: &[String],
        part: impl Fn(&T, Range<usize>) -> T,
        put: impl Fn(&Self, Kept) -> Result<T>,
    ) -> Result<Vec<T>> {
        let get = |name: &String| (self.get)(name);
        let kept = names.iter().map(get).collect::<Result<Vec<_>>>()?;
        let joins = kept.windows(2).all(|pair| pair[0].goes_before(&pair[1]));
        let Some(all) = joins.then(|| joined(&kept)).flatten() else {
            return kept.into_iter().map(|kept| put(self, kept)).collect();
        };
        let all = put(self, all)?;
        let mut first = 0;
        let part = |kept: &Kept| {
            let rows = first..first + kept.rows();
            first = rows.end;
            part(&all, rows)
        };
        Ok(kept.iter().map(part).collect())
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
        let [gate_proj, up_proj] = self.linears(
            ["gate", "up"].map(|part| format!("{name}.{part}_proj")),
            false,
        )?;
        Ok(Mlp {
            gate_proj,
            up_proj,
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
        let kept = (self.get)(name)?;
        self.floats(name, kept)
    }

    fn floats(&self, name: &str, kept: Kept) -> Result<Tensor<1>> {
        match kept {
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
