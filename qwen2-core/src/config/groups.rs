//! `quantization_config` of checkpoints whose matrices GPTQ or AWQ has quantized.

use serde::Serialize;

use super::fields::Fields;
use crate::error::Result;

/// How matrices are stored in groups of integers that share a scale and a zero point.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GroupQuantization {
    /// Who made it, and so how integers are packed into words.
    pub quant_method: GroupMethod,
    /// Bits of an integer, 4 or 8.
    pub bits: u32,
    /// Input features that share a scale; `None`: all of them.
    pub group_size: Option<usize>,
}

/// The packing of [`GroupQuantization`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupMethod {
    /// GPTQ (arXiv:2210.17323) as AutoGPTQ writes it: zero points are stored less one.
    Gptq,
    /// GPTQ with zero points stored as they are (`checkpoint_format` `gptq_v2`).
    GptqV2,
    /// AWQ (arXiv:2306.00978) as AutoAWQ's GEMM version writes it.
    Awq,
}

const MAX_GROUP: usize = 1 << 20;

/// `method` is `gptq` or `awq`, `table` the whole object.
pub(super) fn group_quantization(table: &Fields<'_>, method: &str) -> Result<GroupQuantization> {
    let bits = table.required_integer(
        if table.is_written("bits") {
            "bits"
        } else {
            "w_bit"
        },
        1..=32,
    )?;
    let is_awq = method == "awq";
    if !(bits == 4 || bits == 8 && !is_awq) {
        let help = if is_awq {
            "4 bits are read"
        } else {
            "4 and 8 bits are read"
        };
        return Err(table.unsupported(
            "number of bits is not supported",
            "bits",
            &bits.to_string(),
            help,
        ));
    }
    let key = if table.is_written("group_size") {
        "group_size"
    } else {
        "q_group_size"
    };
    // -1 is both libraries' way to say "one group".
    let whole = table.get(key).and_then(serde_json::Value::as_i64) == Some(-1);
    let group_size = match whole {
        true => None,
        false => Some(table.integer(key, 1..=MAX_GROUP)?.unwrap_or(128)),
    };
    if is_awq
        && let Some(version) = table
            .string("version")?
            .filter(|name| !name.eq_ignore_ascii_case("gemm"))
    {
        let help = "the version gemm is read, which Qwen2's own checkpoints have";
        return Err(table.unsupported("AWQ of another version", "version", version, help));
    }
    let quant_method = match table.string("checkpoint_format")? {
        _ if is_awq => GroupMethod::Awq,
        None | Some("gptq") => GroupMethod::Gptq,
        Some("gptq_v2") => GroupMethod::GptqV2,
        Some(other) => {
            let help = "gptq and gptq_v2 are read";
            return Err(table.unsupported(
                "GPTQ of another format",
                "checkpoint_format",
                other,
                help,
            ));
        }
    };
    Ok(GroupQuantization {
        quant_method,
        bits: bits as u32,
        group_size,
    })
}
