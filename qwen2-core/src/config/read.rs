//! The two forms of `config.json`, and `generation_config.json` → checked values.

use std::path::Path;

use serde_json::Value;

use super::fields::Fields;
use super::groups::{GroupQuantization, group_quantization};
use super::long_context::dual_chunk_attention;
use super::{
    DEFAULT_BETA_FAST, DEFAULT_BETA_SLOW, DType, GenerationConfig, ModelConfig, MoeConfig, PACKED,
    PACKED_VERSION, RopeScaling,
};
use crate::error::Result;

// Bounds far above every published Qwen2 (80 layers, 8192 wide) and low enough that no product of
// them overflows 64 bits: a hostile config is refused here, before anything is allocated for it.
pub(crate) const MAX_LAYERS: usize = 1 << 10;
const MAX_HIDDEN: usize = 1 << 18;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_VOCAB: usize = 1 << 24;
pub(super) const MAX_CONTEXT: usize = 1 << 30;
const MAX_EXPERTS: usize = 1 << 10;
/// Of all layers; the 57B model has 1792. Each is three tensors with names.
const MAX_EXPERTS_IN_ALL: usize = 1 << 12;

/// See [`ModelConfig::from_json`].
pub(super) fn model_config(bytes: &[u8], path: &Path) -> Result<ModelConfig> {
    let fields = Fields::parse(bytes, path)?;
    let model_type = model_type(&fields)?;
    let (packed, group_quantization) = quantization(&fields)?;
    refuse_what_is_not_done(&fields)?;
    let num_hidden_layers = fields.required_integer("num_hidden_layers", 1..=MAX_LAYERS)?;
    let hidden_size = fields.required_integer("hidden_size", 1..=MAX_HIDDEN)?;
    let (num_attention_heads, num_key_value_heads) = heads(&fields)?;
    let defaults = ModelConfig::default();
    let max_position_embeddings = fields
        .integer("max_position_embeddings", 1..=MAX_CONTEXT)?
        .unwrap_or(defaults.max_position_embeddings);
    let (rope_theta, rope_scaling) = rope(&fields, max_position_embeddings)?;
    let is_moe = model_type == "qwen2_moe";
    Ok(ModelConfig {
        model_type,
        hidden_size,
        intermediate_size: fields.required_integer("intermediate_size", 1..=MAX_INTERMEDIATE)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim: head_dim(&fields, hidden_size, num_attention_heads)?,
        vocab_size: fields.required_integer("vocab_size", 1..=MAX_VOCAB)?,
        max_position_embeddings,
        rms_norm_eps: fields
            .positive("rms_norm_eps")?
            .unwrap_or(defaults.rms_norm_eps),
        tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
        rope_theta,
        rope_scaling,
        dual_chunk_attention: dual_chunk_attention(&fields)?,
        layer_sliding_windows: layer_sliding_windows(&fields, num_hidden_layers, is_moe)?,
        dtype: stored_dtype(&fields)?,
        bos_token_id: fields.id("bos_token_id")?,
        eos_token_ids: fields.ids("eos_token_id")?,
        moe: if is_moe {
            Some(moe(&fields, num_hidden_layers)?)
        } else {
            None
        },
        packed,
        group_quantization,
    })
}

/// See [`GenerationConfig::from_json`].
pub(super) fn generation_config(bytes: &[u8], path: &Path) -> Result<GenerationConfig> {
    let fields = Fields::parse(bytes, path)?;
    let share = |key| fields.number(key, "0 to 1", |share| (0.0..=1.0).contains(&share));
    let most = f64::from(f32::MAX);
    let temperature = fields.number("temperature", "0 or more", |value| {
        (0.0..=most).contains(&value)
    })?;
    // What rounds to 0 or to infinity is out of range as well.
    let penalty = fields.number("repetition_penalty", "a finite number above 0", |value| {
        value as f32 > 0.0 && value <= most
    })?;
    Ok(GenerationConfig {
        do_sample: fields.boolean("do_sample")?,
        temperature: temperature.map(|value| value as f32),
        top_k: fields.integer("top_k", 0..=MAX_VOCAB)?,
        top_p: share("top_p")?.map(|value| value as f32),
        min_p: share("min_p")?.map(|value| value as f32),
        repetition_penalty: penalty.map(|value| value as f32),
        max_new_tokens: fields.integer("max_new_tokens", 1..=MAX_CONTEXT)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        bos_token_id: fields.id("bos_token_id")?,
        pad_token_id: fields.id("pad_token_id")?,
    })
}

fn model_type(fields: &Fields<'_>) -> Result<String> {
    match fields.string("model_type")? {
        None => Err(fields.missing("model_type")),
        Some(name @ ("qwen2" | "qwen2_moe")) => Ok(name.to_owned()),
        Some(other) => Err(fields.unsupported(
            "model type is not supported",
            "model_type",
            other,
            "this library knows qwen2 and qwen2_moe",
        )),
    }
}

/// Whether the matrices are stored in our own packing, or how in groups.
fn quantization(fields: &Fields<'_>) -> Result<(bool, Option<GroupQuantization>)> {
    let Some(quantization) = fields.object("quantization_config")? else {
        return Ok((false, None));
    };
    let method = quantization
        .string("quant_method")?
        .unwrap_or("without a quant_method");
    if matches!(method, "gptq" | "awq") {
        let groups = group_quantization(&quantization, method)?;
        return Ok((false, Some(groups)));
    }
    if method != PACKED {
        return Err(fields.unsupported(
            "quantized checkpoint is not supported",
            "quantization_config",
            method,
            "gptq and awq are read; or load the checkpoint that is not quantized",
        ));
    }
    match quantization.integer("version", 0..=usize::MAX)? {
        Some(PACKED_VERSION) => Ok((true, None)),
        version => Err(fields.unsupported(
            "packing is of another version",
            "quantization_config",
            &version.map_or_else(|| "none".to_owned(), |version| version.to_string()),
            "pack the checkpoint again with this library",
        )),
    }
}

/// Keys that change the arithmetic in a way this library does not follow.
fn refuse_what_is_not_done(fields: &Fields<'_>) -> Result<()> {
    if let Some(activation) = fields.string("hidden_act")?.filter(|name| *name != "silu") {
        return Err(fields.unsupported(
            "activation is not supported",
            "hidden_act",
            activation,
            "Qwen2 uses silu",
        ));
    }
    refuse_attention_variants(fields)
}

fn refuse_attention_variants(fields: &Fields<'_>) -> Result<()> {
    for (key, refused) in [("use_mrope", true), ("qkv_bias", false)] {
        if fields.boolean(key)? == Some(refused) {
            let help = "no Qwen2 checkpoint has this; is it another model's?";
            return Err(fields.unsupported(
                "attention variant is not supported",
                key,
                &refused.to_string(),
                help,
            ));
        }
    }
    Ok(())
}

fn heads(fields: &Fields<'_>) -> Result<(usize, usize)> {
    let heads = fields.required_integer("num_attention_heads", 1..=MAX_HEADS)?;
    let key = "num_key_value_heads";
    // `null` is transformers' way to say "as many as query heads"; its class default of 32 for an
    // absent key fits no Qwen2, so an absent key is an error.
    if !fields.is_written(key) {
        return Err(fields.missing(key));
    }
    let kv_heads = fields.integer(key, 1..=MAX_HEADS)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide num_attention_heads {heads}");
        return Err(fields.contradiction(key, why));
    }
    Ok((heads, kv_heads))
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, heads: usize) -> Result<usize> {
    if let Some(head_dim) = fields.integer("head_dim", 2..=MAX_HEAD_DIM)? {
        if !head_dim.is_multiple_of(2) {
            return Err(fields.out_of_range("head_dim", "an even number"));
        }
        return Ok(head_dim);
    }
    let head_dim = hidden_size / heads;
    let why = if !hidden_size.is_multiple_of(heads) {
        format!(
            "{hidden_size} is not divisible by num_attention_heads {heads}, and there is no head_dim"
        )
    } else if !head_dim.is_multiple_of(2) {
        format!("{hidden_size} / num_attention_heads {heads} is odd: rotary positions need pairs")
    } else if head_dim > MAX_HEAD_DIM {
        format!("{hidden_size} / num_attention_heads {heads} is above {MAX_HEAD_DIM}")
    } else {
        return Ok(head_dim);
    };
    Err(fields.contradiction("hidden_size", why))
}

/// `rope_theta` and the scaling, from `rope_scaling` (which wins, as in transformers),
/// `rope_parameters`, or neither.
fn rope(fields: &Fields<'_>, max_position: usize) -> Result<(f64, Option<RopeScaling>)> {
    let table = match fields.object("rope_scaling")? {
        Some(table) => Some(table),
        None => fields.object("rope_parameters")?,
    };
    let stored = match &table {
        Some(table) => table.positive("rope_theta")?,
        None => None,
    };
    let outer = fields.positive("rope_theta")?;
    let rope_theta = stored.or(outer).unwrap_or(10_000.0);
    let Some(table) = table else {
        return Ok((rope_theta, None));
    };
    refuse_rope_variants(&table)?;
    // Synonyms; transformers prefers `rope_type`.
    let key = if table.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    match table.string(key)? {
        None | Some("default") => Ok((rope_theta, None)),
        Some("yarn") => Ok((rope_theta, Some(yarn(&table, max_position, rope_theta)?))),
        Some(other) => {
            let help = "default and yarn are supported";
            Err(table.unsupported("rope type is not supported", key, other, help))
        }
    }
}

/// Ways of turning heads that no Qwen2 uses.
fn refuse_rope_variants(table: &Fields<'_>) -> Result<()> {
    for key in ["full_attention", "sliding_attention"] {
        if table.is_written(key) {
            let help = "no Qwen2 checkpoint has this; is it another model's?";
            return Err(table.unsupported(
                "rope per layer type is not supported",
                key,
                "present",
                help,
            ));
        }
    }
    if table
        .number("partial_rotary_factor", "1", |factor| factor > 0.0)?
        .is_some_and(|factor| factor != 1.0)
    {
        let help = "Qwen2 rotates whole heads";
        return Err(table.unsupported(
            "partial rotary is not supported",
            "partial_rotary_factor",
            "not 1",
            help,
        ));
    }
    Ok(())
}

fn yarn(table: &Fields<'_>, max_position: usize, rope_theta: f64) -> Result<RopeScaling> {
    let original = table
        .integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?
        .unwrap_or(max_position);
    let factor = table
        .number("factor", "1 to 65536", |factor| {
            (1.0..=65_536.0).contains(&factor)
        })?
        .unwrap_or_else(|| (max_position as f64 / original as f64).max(1.0));
    let beta_fast = table.positive("beta_fast")?.unwrap_or(DEFAULT_BETA_FAST);
    let beta_slow = table.positive("beta_slow")?.unwrap_or(DEFAULT_BETA_SLOW);
    if beta_fast < beta_slow {
        let why = format!("{beta_fast} is below beta_slow {beta_slow}");
        return Err(table.contradiction("beta_fast", why));
    }
    if rope_theta <= 1.0 {
        let why =
            format!("yarn divides by its logarithm, so it must be above 1, found {rope_theta}");
        return Err(table.contradiction("rope_theta", why));
    }
    let extrapolation_factor = table
        .number("extrapolation_factor", "above 0, at most 1", |factor| {
            factor > 0.0 && factor <= 1.0
        })?
        .unwrap_or(1.0);
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor: attention_factor(table, factor)?,
        beta_fast,
        beta_slow,
        extrapolation_factor,
        truncate: table.boolean("truncate")?.unwrap_or(true),
    })
}

/// As transformers: the key itself, or the ratio of `mscale` to `mscale_all_dim`; else as vLLM: `attn_factor`
/// times what YaRN takes, or alone where `apply_yarn_scaling` is false.
fn attention_factor(table: &Fields<'_>, factor: f64) -> Result<Option<f64>> {
    let explicit = table.positive("attention_factor")?;
    let scale = table
        .number("mscale", "0 or more", |scale| scale >= 0.0)?
        .unwrap_or(0.0);
    let scale_all = table
        .number("mscale_all_dim", "0 or more", |scale| scale >= 0.0)?
        .unwrap_or(0.0);
    let mscale = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
    let ratio = (scale > 0.0 && scale_all > 0.0).then(|| mscale(scale) / mscale(scale_all));
    let absolute = explicit.or(ratio);
    let relative = table.positive("attn_factor")?;
    let own = match table.boolean("apply_yarn_scaling")? {
        Some(false) => 1.0,
        _ => mscale(1.0),
    };
    if own == mscale(1.0) && relative.is_none() {
        return Ok(absolute);
    }
    let of_vllm = relative.unwrap_or(1.0) * own;
    match absolute {
        Some(absolute) if (absolute - of_vllm).abs() > 1e-6 * absolute => {
            let key = if relative.is_some() {
                "attn_factor"
            } else {
                "apply_yarn_scaling"
            };
            let why = format!("it makes {of_vllm}, other keys make {absolute}");
            Err(table.contradiction(key, why))
        }
        Some(absolute) => Ok(Some(absolute)),
        None => Ok(Some(of_vllm)),
    }
}

/// The rules of transformers 5.23, `configuration_qwen2.py` and `configuration_qwen2_moe.py`.
///
/// Releases before 4.45 had the comparison with `max_window_layers` the other way round in one of
/// their attention paths; the documented meaning (the *first* `max_window_layers` layers are full)
/// is the one that all of them have by now. No published Qwen2 slides.
fn layer_sliding_windows(
    fields: &Fields<'_>,
    layers: usize,
    is_moe: bool,
) -> Result<Vec<Option<usize>>> {
    let window = sliding_window(fields)?;
    let full_layers = fields
        .integer("max_window_layers", 0..=MAX_CONTEXT)?
        .unwrap_or(28);
    let Some(types) = fields.array("layer_types")? else {
        let slides = |layer: usize| match is_moe {
            true => layer.is_multiple_of(2) && layer < full_layers,
            false => layer >= full_layers,
        };
        return Ok((0..layers)
            .map(|layer| window.filter(|_| slides(layer)))
            .collect());
    };
    if types.len() != layers {
        let why = format!("{} entries for num_hidden_layers {layers}", types.len());
        return Err(fields.contradiction("layer_types", why));
    }
    let resolve = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            let why = "sliding_attention needs use_sliding_window true and a sliding_window";
            Err(fields.contradiction("layer_types", why.to_owned()))
        }
        Some(other) => {
            let help = "full_attention and sliding_attention are supported";
            Err(fields.unsupported("layer type is not supported", "layer_types", other, help))
        }
        None => Err(fields.out_of_range("layer_types", "a list of names")),
    };
    types.iter().map(resolve).collect()
}

/// The window in use; `None` where `use_sliding_window` is false, whatever `sliding_window` says.
fn sliding_window(fields: &Fields<'_>) -> Result<Option<usize>> {
    if !fields.boolean("use_sliding_window")?.unwrap_or(false) {
        return Ok(None);
    }
    if !fields.is_written("sliding_window") {
        return Ok(Some(4096));
    }
    fields.integer("sliding_window", 1..=MAX_CONTEXT)
}

fn stored_dtype(fields: &Fields<'_>) -> Result<Option<DType>> {
    let key = if fields.get("dtype").is_some() {
        "dtype"
    } else {
        "torch_dtype"
    };
    let Some(name) = fields.string(key)? else {
        return Ok(None);
    };
    match name.strip_prefix("torch.").unwrap_or(name).parse() {
        Ok(dtype) => Ok(Some(dtype)),
        Err(_) => Err(fields.unsupported(
            "dtype is not supported",
            key,
            name,
            "float32, float16 and bfloat16 are supported",
        )),
    }
}

fn moe(fields: &Fields<'_>, layers: usize) -> Result<MoeConfig> {
    let most = MAX_EXPERTS.min(MAX_EXPERTS_IN_ALL / layers);
    let num_experts = fields.required_integer("num_experts", 1..=most)?;
    let width = |key| fields.required_integer(key, 1..=MAX_INTERMEDIATE);
    let index = |value: &Value| {
        let layer = value.as_u64().and_then(|layer| usize::try_from(layer).ok());
        layer.filter(|layer| *layer < layers)
    };
    let mlp_only_layers = match fields.array("mlp_only_layers")? {
        None => Vec::new(),
        Some(list) => Some(list)
            .filter(|list| list.len() <= layers)
            .and_then(|list| list.iter().map(index).collect::<Option<_>>())
            .ok_or_else(|| {
                fields.out_of_range(
                    "mlp_only_layers",
                    &format!("layers from 0 to {}", layers - 1),
                )
            })?,
    };
    Ok(MoeConfig {
        num_experts,
        num_experts_per_tok: fields.required_integer("num_experts_per_tok", 1..=num_experts)?,
        moe_intermediate_size: width("moe_intermediate_size")?,
        shared_expert_intermediate_size: width("shared_expert_intermediate_size")?,
        norm_topk_prob: fields.boolean("norm_topk_prob")?.unwrap_or(false),
        decoder_sparse_step: fields
            .integer("decoder_sparse_step", 1..=MAX_LAYERS)?
            .unwrap_or(1),
        mlp_only_layers,
    })
}
