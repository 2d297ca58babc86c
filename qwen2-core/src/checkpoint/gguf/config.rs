//! The metadata of a GGUF file as the `config.json` that the checkpoint had.

use serde_json::{Value, json};

use super::metadata::Metadata;
use crate::config::MAX_LAYERS;
use crate::error::{Error, ErrorKind, Result};

/// The keys of llama.cpp (`gguf-py/gguf/constants.py`) by those of transformers.
pub(super) fn config(metadata: &Metadata<'_>, experts: &[usize]) -> Result<Value> {
    const ARCHITECTURE: &str = "general.architecture";
    let architecture = metadata.text(ARCHITECTURE)?.unwrap_or_default();
    let model_type = match architecture {
        "qwen2" => "qwen2",
        "qwen2moe" => "qwen2_moe",
        other => {
            return Err(
                Error::new(ErrorKind::Unsupported, "model type is not supported")
                    .with_path(metadata.path)
                    .with_key(ARCHITECTURE)
                    .with_why(format!("`{}`", other.escape_debug()))
                    .with_help("this library knows qwen2 and qwen2moe"),
            );
        }
    };
    let key = |name: &str| format!("{architecture}.{name}");
    let number = |name: &str| metadata.required(&key(name));
    let layers = number("block_count")?;
    if layers > MAX_LAYERS as u64 {
        let why = format!("{layers}, at most {MAX_LAYERS} are read");
        return Err(metadata.invalid(&key("block_count"), why));
    }
    let heads = number("attention.head_count")?;
    let Some(vocab_size) = metadata.rows("token_embd.weight") else {
        return Err(metadata.invalid("token_embd.weight", "the tensor is missing"));
    };
    let epsilon = key("attention.layer_norm_rms_epsilon");
    let mut config = json!({
        "model_type": model_type,
        "architectures": [if model_type == "qwen2" { "Qwen2ForCausalLM" } else { "Qwen2MoeForCausalLM" }],
        "hidden_act": "silu",
        "hidden_size": number("embedding_length")?,
        "intermediate_size": number("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(&key("attention.head_count_kv"))?.unwrap_or(heads),
        "max_position_embeddings": number("context_length")?,
        "rms_norm_eps": metadata.float(&epsilon)?.map(shortest)
            .ok_or_else(|| metadata.invalid(&epsilon, "missing"))?,
        "rope_theta": metadata.float(&key("rope.freq_base"))?.map_or(10_000.0, shortest),
        "tie_word_embeddings": metadata.tensor("output.weight").is_none(),
        "vocab_size": vocab_size,
    });
    if let Some(head_dim) = metadata.integer(&key("attention.key_length"))? {
        config["head_dim"] = json!(head_dim);
    }
    if let Some(eos) = metadata.integer("tokenizer.ggml.eos_token_id")? {
        config["eos_token_id"] = json!(eos);
    }
    if let Some(scaling) = rope_scaling(metadata, &key)? {
        config["rope_scaling"] = scaling;
    }
    if model_type == "qwen2_moe" {
        // Old files do not say the widths; the tensors do.
        let width = |name: &str, tensor: &str, dim: usize| -> Result<Value> {
            if let Some(width) = metadata.integer(&key(name))?.filter(|width| *width > 0) {
                return Ok(json!(width));
            }
            let first = experts.first().copied().unwrap_or_default();
            let tensor = metadata.tensor(&format!("blk.{first}.{tensor}.weight"));
            tensor
                .and_then(|tensor| tensor.shape.get(dim))
                .map(|width| json!(width))
                .ok_or_else(|| metadata.invalid(&key(name), "missing"))
        };
        config["num_experts"] = json!(number("expert_count")?);
        config["num_experts_per_tok"] = json!(number("expert_used_count")?);
        config["moe_intermediate_size"] = width("expert_feed_forward_length", "ffn_gate_exps", 1)?;
        config["shared_expert_intermediate_size"] =
            width("expert_shared_feed_forward_length", "ffn_gate_shexp", 0)?;
        config["decoder_sparse_step"] = json!(1);
        config["norm_topk_prob"] = json!(false);
        let is_dense = |layer: &u64| !experts.contains(&(*layer as usize));
        config["mlp_only_layers"] = (0..layers).filter(is_dense).collect();
    }
    Ok(config)
}

pub(super) fn rope_scaling(
    metadata: &Metadata<'_>,
    key: &dyn Fn(&str) -> String,
) -> Result<Option<Value>> {
    // Of other architectures, and of files that are older than the keys below.
    for (name, neutral) in [
        ("rope.scale_linear", 1.0),
        ("rope.scaling.yarn_attn_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
    ] {
        if let Some(number) = metadata.float(&key(name))?.filter(|n| *n != neutral) {
            return Err(metadata.unsupported(&key(name), number.to_string()));
        }
    }
    let kind = metadata.text(&key("rope.scaling.type"))?;
    let Some(kind) = kind.filter(|kind| *kind != "none") else {
        return Ok(None);
    };
    let factor = metadata.float(&key("rope.scaling.factor"))?;
    let mut scaling = json!({ "type": kind, "factor": factor });
    if let Some(length) = metadata.integer(&key("rope.scaling.original_context_length"))? {
        scaling["original_max_position_embeddings"] = json!(length);
    }
    for (from, to) in [
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
        ("rope.scaling.yarn_ext_factor", "extrapolation_factor"),
    ] {
        if let Some(number) = metadata.float(&key(from))? {
            scaling[to] = json!(shortest(number));
        }
    }
    if let (Some(relative), Some(factor)) =
        (metadata.float(&key("rope.scaling.attn_factor"))?, factor)
    {
        let whole = relative * yarn_attention_factor(factor);
        scaling["attention_factor"] = json!(shortest(f64::from(whole as f32)));
    }
    Ok(Some(scaling))
}

/// What YaRN multiplies cosine and sine by unless a config says another number (arXiv:2309.00071); a file
/// says its number in relation to this one, as llama.cpp multiplies it.
pub(super) fn yarn_attention_factor(factor: f64) -> f64 {
    0.1 * factor.ln() + 1.0
}

/// A number that was written as f32, in the decimal digits that it was meant as: 1e-6, not
/// 9.999999974752427e-7.
fn shortest(number: f64) -> f64 {
    let text = (number as f32).to_string();
    match f64::from(number as f32) == number {
        true => text.parse().unwrap_or(number),
        false => number,
    }
}
