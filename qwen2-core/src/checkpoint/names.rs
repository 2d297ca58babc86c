//! The tensors a config calls for, by their stored names, and whether a checkpoint has them.

use std::collections::BTreeMap;
use std::path::Path;

use super::shards::listed;
use super::{Checkpoint, Encoding};
use crate::config::{ModelConfig, one_line};
use crate::error::{Error, ErrorKind, Result};

const LM_HEAD: &str = "lm_head.weight";

/// Names and shapes of the tensors of `config`; `tied`: without a head of its own.
pub(crate) fn expected(config: &ModelConfig, tied: bool) -> Vec<(String, Vec<usize>)> {
    let sizes = |dims: Vec<Dim>| dims.into_iter().map(|dim| dim.size).collect();
    slots(config, tied)
        .into_iter()
        .map(|(name, dims)| (name, sizes(dims)))
        .collect()
}

/// Checks that `checkpoint` has every tensor its config calls for, in the right shape, and no
/// others; returns whether the embedding table is the head as well: the tensors that are there
/// decide, then the flag.
///
/// Rotary frequencies (`*.rotary_emb.inv_freq`), which old versions of transformers stored, are
/// passed over: they follow from the config.
///
/// # Errors
/// `InvalidFile` that lists the missing and unexpected tensors, or names the first of wrong shape.
pub(crate) fn audit(checkpoint: &Checkpoint) -> Result<bool> {
    let config = &checkpoint.config;
    let stored: BTreeMap<&str, (Encoding, &[usize], &Path)> = checkpoint
        .weights
        .iter()
        .map(|(name, encoding, shape, path)| (name, (encoding, shape, path)))
        .collect();
    let tied = config.tie_word_embeddings && !stored.contains_key(LM_HEAD);
    let slots: BTreeMap<String, Vec<Dim>> = slots(config, tied).into_iter().collect();
    let missing: Vec<&str> = slots
        .keys()
        .map(String::as_str)
        .filter(|name| !stored.contains_key(name))
        .collect();
    let unexpected: Vec<&str> = stored
        .keys()
        .copied()
        .filter(|name| !slots.contains_key(*name) && !name.ends_with(".rotary_emb.inv_freq"))
        .collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(wrong_set(checkpoint.path(), &missing, &unexpected));
    }
    for (name, dims) in &slots {
        let (encoding, shape, path) = stored[name.as_str()];
        if encoding == Encoding::Packed && dims.len() == 2 {
            continue; // how panels are made is for the kernels to say, who check it
        }
        if dims.iter().map(|dim| dim.size).ne(shape.iter().copied()) {
            return Err(wrong_shape(name, dims, shape, path));
        }
    }
    Ok(tied)
}

/// One dimension, and the config key it follows from.
#[derive(Clone, Copy)]
struct Dim {
    size: usize,
    key: &'static str,
}

fn dim(size: usize, key: &'static str) -> Dim {
    Dim { size, key }
}

type Slots = Vec<(String, Vec<Dim>)>;

fn slots(config: &ModelConfig, tied: bool) -> Slots {
    let hidden = dim(config.hidden_size, "hidden_size");
    let vocab = dim(config.vocab_size, "vocab_size");
    let mut slots = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..config.num_hidden_layers {
        let prefix = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            slots.push((format!("{prefix}.{norm}.weight"), vec![hidden]));
        }
        attention(config, &prefix, hidden, &mut slots);
        feed_forward(config, layer, &prefix, hidden, &mut slots);
    }
    slots.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !tied {
        slots.push((LM_HEAD.to_owned(), vec![vocab, hidden]));
    }
    slots
}

fn attention(config: &ModelConfig, prefix: &str, hidden: Dim, slots: &mut Slots) {
    let width = |heads: usize, key| dim(heads * config.head_dim, key);
    let q = width(config.num_attention_heads, "num_attention_heads x head_dim");
    let kv = width(config.num_key_value_heads, "num_key_value_heads x head_dim");
    for (name, out) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
        slots.push((
            format!("{prefix}.self_attn.{name}.weight"),
            vec![out, hidden],
        ));
        slots.push((format!("{prefix}.self_attn.{name}.bias"), vec![out]));
    }
    slots.push((format!("{prefix}.self_attn.o_proj.weight"), vec![hidden, q]));
}

fn feed_forward(config: &ModelConfig, layer: usize, prefix: &str, hidden: Dim, slots: &mut Slots) {
    let Some(moe) = config.moe.as_ref().filter(|moe| moe.is_sparse(layer)) else {
        let width = dim(config.intermediate_size, "intermediate_size");
        return swiglu(&format!("{prefix}.mlp"), width, hidden, slots);
    };
    let experts = dim(moe.num_experts, "num_experts");
    slots.push((format!("{prefix}.mlp.gate.weight"), vec![experts, hidden]));
    let width = dim(moe.moe_intermediate_size, "moe_intermediate_size");
    for expert in 0..moe.num_experts {
        swiglu(
            &format!("{prefix}.mlp.experts.{expert}"),
            width,
            hidden,
            slots,
        );
    }
    let width = dim(
        moe.shared_expert_intermediate_size,
        "shared_expert_intermediate_size",
    );
    swiglu(&format!("{prefix}.mlp.shared_expert"), width, hidden, slots);
    let one = dim(1, "hidden_size");
    slots.push((
        format!("{prefix}.mlp.shared_expert_gate.weight"),
        vec![one, hidden],
    ));
}

fn swiglu(prefix: &str, width: Dim, hidden: Dim, slots: &mut Slots) {
    slots.push((format!("{prefix}.gate_proj.weight"), vec![width, hidden]));
    slots.push((format!("{prefix}.up_proj.weight"), vec![width, hidden]));
    slots.push((format!("{prefix}.down_proj.weight"), vec![hidden, width]));
}

fn wrong_set(directory: &Path, missing: &[&str], unexpected: &[&str]) -> Error {
    let part = |what: &str, names: &[&str]| match names.len() {
        0 => None,
        n => Some(format!("{n} {what}: {}", listed(names))),
    };
    let parts = [part("missing", missing), part("unexpected", unexpected)];
    let why: Vec<String> = parts.into_iter().flatten().collect();
    Error::new(ErrorKind::InvalidFile, "tensors do not match config.json")
        .with_path(directory)
        .with_why(why.join("; "))
        .with_help("do config.json and the weights belong to one checkpoint? download both again")
}

fn wrong_shape(name: &str, dims: &[Dim], found: &[usize], path: &Path) -> Error {
    let expected: Vec<usize> = dims.iter().map(|dim| dim.size).collect();
    let differs = dims
        .iter()
        .zip(found)
        .find(|(dim, found)| dim.size != **found);
    let Dim { size, key } = differs.map_or(dims[dims.len() - 1], |(dim, _)| *dim);
    Error::new(ErrorKind::InvalidFile, "tensor has the wrong shape")
        .with_path(path)
        .with_key(one_line(name))
        .with_why(format!("expected {expected:?}, found {found:?}"))
        .with_help(format!(
            "config.json says {key} {size}; is this file from another checkpoint?"
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers, experts (0: dense), tied, and the number of tensors of the published model.
    #[test]
    fn the_published_models_have_the_published_number_of_tensors() {
        let sizes = [
            (24, 0, true, 290),
            (28, 0, true, 338),
            (28, 0, false, 339),
            (28, 64, false, 5771),
            (80, 0, false, 963),
        ];
        for (layers, experts, tied, count) in sizes {
            let json = serde_json::json!({
                "model_type": if experts == 0 { "qwen2" } else { "qwen2_moe" },
                "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": layers,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16,
                "num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": 4,
                "shared_expert_intermediate_size": 4, "tie_word_embeddings": tied
            });
            let config = ModelConfig::from_json(json.to_string().as_bytes(), Path::new("c"));
            let config = config.expect("config");
            let tensors = expected(&config, tied);
            assert_eq!(tensors.len(), count);
            let parameters: usize = tensors
                .iter()
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum();
            assert_eq!(parameters as u64, config.parameter_count());
        }
    }

    #[test]
    fn a_wrong_shape_names_the_config_key_that_differs() {
        let dims = [dim(18_944, "intermediate_size"), dim(3584, "hidden_size")];
        let path = Path::new("/m/model-00002-of-00004.safetensors");
        let error = wrong_shape(
            "model.layers.3.mlp.up_proj.weight",
            &dims,
            &[18_944, 3072],
            path,
        );
        assert_eq!(
            error.to_string(),
            "tensor has the wrong shape: /m/model-00002-of-00004.safetensors: \
             model.layers.3.mlp.up_proj.weight: expected [18944, 3584], found [18944, 3072]"
        );
        assert_eq!(
            error.help(),
            Some("config.json says hidden_size 3584; is this file from another checkpoint?")
        );
    }
}
