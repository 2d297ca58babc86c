//! The tensors a config calls for, by their stored names, and whether a checkpoint has them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::shards::{MAX_LISTED, listed_of};
use super::{Checkpoint, Encoding};
use crate::config::{ModelConfig, one_line};
use crate::error::{Error, ErrorKind, Result};

const LM_HEAD: &str = "lm_head.weight";

/// Names and shapes of the tensors of `config`; `tied`: without a head of its own.
pub(crate) fn expected(config: &ModelConfig, tied: bool) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    slots(config, tied, &mut |name, dims| {
        all.push((name, sizes(dims)))
    });
    all
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
    let mut unmatched: BTreeMap<&str, (Encoding, &[usize], &Path)> = checkpoint
        .weights
        .iter()
        .map(|(name, encoding, shape, path)| (name, (encoding, shape, path)))
        .collect();
    let tied = config.tie_word_embeddings && !unmatched.contains_key(LM_HEAD);
    let mut missing = Missing::default();
    let mut misshapen: Option<(String, Error)> = None;
    // One after the other: a config of a few bytes may call for more tensors than there is memory.
    slots(config, tied, &mut |name, dims| {
        let Some((encoding, shape, path)) = unmatched.remove(name.as_str()) else {
            return missing.add(name);
        };
        // How panels are made is for the kernels to say, who check it.
        let is_panels = encoding == Encoding::Packed && dims.len() == 2;
        let is_first = misshapen.as_ref().is_none_or(|(first, _)| name < *first);
        if is_first && !is_panels && sizes(dims) != shape {
            let error = wrong_shape(&name, dims, shape, path);
            misshapen = Some((name, error));
        }
    });
    unmatched.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
    let unexpected: Vec<&str> = unmatched.into_keys().collect();
    if missing.count > 0 || !unexpected.is_empty() {
        return Err(wrong_set(checkpoint.path(), &missing, &unexpected));
    }
    match misshapen {
        Some((_, error)) => Err(error),
        None => Ok(tied),
    }
}

/// Names that are not there: how many, and the first of them.
#[derive(Default)]
struct Missing {
    count: usize,
    first: BTreeSet<String>,
}

impl Missing {
    fn add(&mut self, name: String) {
        self.count += 1;
        self.first.insert(name);
        if self.first.len() > MAX_LISTED {
            self.first.pop_last();
        }
    }
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

fn sizes(dims: &[Dim]) -> Vec<usize> {
    dims.iter().map(|dim| dim.size).collect()
}

/// What takes the tensors one by one.
type Visit<'a> = &'a mut dyn FnMut(String, &[Dim]);

fn slots(config: &ModelConfig, tied: bool, visit: Visit<'_>) {
    let hidden = dim(config.hidden_size, "hidden_size");
    let vocab = dim(config.vocab_size, "vocab_size");
    visit("model.embed_tokens.weight".to_owned(), &[vocab, hidden]);
    for layer in 0..config.num_hidden_layers {
        let prefix = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            visit(format!("{prefix}.{norm}.weight"), &[hidden]);
        }
        attention(config, &prefix, hidden, visit);
        feed_forward(config, layer, &prefix, hidden, visit);
    }
    visit("model.norm.weight".to_owned(), &[hidden]);
    if !tied {
        visit(LM_HEAD.to_owned(), &[vocab, hidden]);
    }
}

fn attention(config: &ModelConfig, prefix: &str, hidden: Dim, visit: Visit<'_>) {
    let width = |heads: usize, key| dim(heads * config.head_dim, key);
    let q = width(config.num_attention_heads, "num_attention_heads x head_dim");
    let kv = width(config.num_key_value_heads, "num_key_value_heads x head_dim");
    for (name, out) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
        visit(format!("{prefix}.self_attn.{name}.weight"), &[out, hidden]);
        visit(format!("{prefix}.self_attn.{name}.bias"), &[out]);
    }
    visit(format!("{prefix}.self_attn.o_proj.weight"), &[hidden, q]);
}

fn feed_forward(config: &ModelConfig, layer: usize, prefix: &str, hidden: Dim, visit: Visit<'_>) {
    let Some(moe) = config.moe.as_ref().filter(|moe| moe.is_sparse(layer)) else {
        let width = dim(config.intermediate_size, "intermediate_size");
        return swiglu(&format!("{prefix}.mlp"), width, hidden, visit);
    };
    let experts = dim(moe.num_experts, "num_experts");
    visit(format!("{prefix}.mlp.gate.weight"), &[experts, hidden]);
    let width = dim(moe.moe_intermediate_size, "moe_intermediate_size");
    for expert in 0..moe.num_experts {
        swiglu(
            &format!("{prefix}.mlp.experts.{expert}"),
            width,
            hidden,
            visit,
        );
    }
    let width = dim(
        moe.shared_expert_intermediate_size,
        "shared_expert_intermediate_size",
    );
    swiglu(&format!("{prefix}.mlp.shared_expert"), width, hidden, visit);
    let one = dim(1, "hidden_size");
    visit(
        format!("{prefix}.mlp.shared_expert_gate.weight"),
        &[one, hidden],
    );
}

fn swiglu(prefix: &str, width: Dim, hidden: Dim, visit: Visit<'_>) {
    visit(format!("{prefix}.gate_proj.weight"), &[width, hidden]);
    visit(format!("{prefix}.up_proj.weight"), &[width, hidden]);
    visit(format!("{prefix}.down_proj.weight"), &[hidden, width]);
}

fn wrong_set(directory: &Path, missing: &Missing, unexpected: &[&str]) -> Error {
    let part = |what: &str, names: &[&str], count: usize| match count {
        0 => None,
        n => Some(format!("{n} {what}: {}", listed_of(names, n))),
    };
    let first: Vec<&str> = missing.first.iter().map(String::as_str).collect();
    let parts = [
        part("missing", &first, missing.count),
        part("unexpected", unexpected, unexpected.len()),
    ];
    let why: Vec<String> = parts.into_iter().flatten().collect();
    Error::new(ErrorKind::InvalidFile, "tensors do not match config.json")
        .with_path(directory)
        .with_why(why.join("; "))
        .with_help("do config.json and the weights belong to one checkpoint? download both again")
}

fn wrong_shape(name: &str, dims: &[Dim], found: &[usize], path: &Path) -> Error {
    let expected = sizes(dims);
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
