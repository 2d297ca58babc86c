//! The tensors of a GGUF file by the names that checkpoints have.

use std::ops::Range;

use super::reader::Tensor;

/// What a config may have.
const MAX_EXPERTS: usize = 1 << 10;
/// Names of a layer's tensors: llama.cpp's, then transformers'.
const IN_LAYER: [(&str, &str); 14] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];
/// Those that hold all experts, one after the other.
const STACKED: [(&str, &str); 3] = [
    ("ffn_gate_exps", "gate_proj"),
    ("ffn_up_exps", "up_proj"),
    ("ffn_down_exps", "down_proj"),
];
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// The checkpoint's tensors that one of the file's is, with shapes and places; one that is not known
/// keeps its name.
pub(super) fn checkpoint_tensors(tensor: &Tensor) -> Vec<(String, Vec<usize>, Range<usize>)> {
    let as_is = |name: String| vec![(name, tensor.shape.clone(), tensor.range.clone())];
    if let Some((_, name)) = OUTSIDE.iter().find(|(name, _)| *name == tensor.name) {
        return as_is((*name).to_owned());
    }
    let Some((layer, part, suffix)) = in_layer(&tensor.name) else {
        return as_is(tensor.name.clone());
    };
    let prefix = format!("model.layers.{layer}");
    if let Some((name, [experts, rows, cols])) = stack(tensor) {
        let bytes = tensor.range.len() / experts;
        let expert = |expert: usize| {
            let start = tensor.range.start + expert * bytes;
            (
                format!("{prefix}.mlp.experts.{expert}.{name}.{suffix}"),
                vec![rows, cols],
                start..start + bytes,
            )
        };
        return (0..experts).map(expert).collect();
    }
    let Some((_, name)) = IN_LAYER.iter().find(|(name, _)| *name == part) else {
        return as_is(tensor.name.clone());
    };
    let name = format!("{prefix}.{name}.{suffix}");
    // A gate with one row is stored as a vector.
    let shape = match tensor.shape.as_slice() {
        [cols] if part == "ffn_gate_inp_shexp" => vec![1, *cols],
        shape => shape.to_vec(),
    };
    vec![(name, shape, tensor.range.clone())]
}

/// How many of the checkpoint's tensors one of the file's is.
pub(super) fn count(tensor: &Tensor) -> usize {
    stack(tensor).map_or(1, |(_, [experts, ..])| experts)
}

/// The matrices that a tensor stacks, by their name in a checkpoint, and its dimensions.
fn stack(tensor: &Tensor) -> Option<(&'static str, [usize; 3])> {
    let (_, part, _) = in_layer(&tensor.name)?;
    let (_, name) = STACKED.iter().find(|(name, _)| *name == part)?;
    let shape = <[usize; 3]>::try_from(tensor.shape.as_slice()).ok()?;
    (shape[0] <= MAX_EXPERTS).then_some((*name, shape))
}

/// Layer, part and suffix of `blk.N.part.suffix`.
pub(super) fn in_layer(name: &str) -> Option<(usize, &str, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, suffix) = rest.split_once('.')?;
    Some((layer.parse().ok()?, part, suffix))
}

/// The file's name for a tensor of a checkpoint, and the expert it is in a stack.
pub(super) fn gguf_name(name: &str) -> Option<(String, Option<usize>)> {
    if let Some((gguf, _)) = OUTSIDE.iter().find(|(_, outside)| *outside == name) {
        return Some(((*gguf).to_owned(), None));
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, suffix) = rest.rsplit_once('.')?;
    if let Some(expert) = part.strip_prefix("mlp.experts.") {
        let (expert, part) = expert.split_once('.')?;
        let (gguf, _) = STACKED.iter().find(|(_, stacked)| *stacked == part)?;
        return Some((format!("blk.{layer}.{gguf}.{suffix}"), expert.parse().ok()));
    }
    let (gguf, _) = IN_LAYER.iter().find(|(_, in_layer)| *in_layer == part)?;
    Some((format!("blk.{layer}.{gguf}.{suffix}"), None))
}
