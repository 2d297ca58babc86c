//! What a LoRA adapter is.

use std::path::Path;

use qwen2_core::inspect_adapter;
use serde_json::json;

use crate::failure::Failure;
use crate::output::{self, human_bytes, human_count};

/// The file that makes a directory one of an adapter.
pub(super) const CONFIG: &str = "adapter_config.json";

pub(super) fn run(directory: &Path, as_json: bool) -> Result<(), Failure> {
    let info = inspect_adapter(directory)?;
    let name = std::fs::canonicalize(directory).ok();
    let name = name.as_deref().and_then(Path::file_name);
    let name = name.unwrap_or(directory.as_os_str()).to_string_lossy();
    if as_json {
        return output::print_json(&json!({
            "name": name,
            "file_format": "adapter",
            "base_model": info.base_model,
            "modules": info.modules,
            "matrices": info.matrices,
            "ranks": info.ranks,
            "scales": info.scales,
            "parameters": info.parameters,
            "memory_bytes": info.bytes,
            "version": env!("CARGO_PKG_VERSION"),
        }));
    }
    let modules: Vec<&str> = info.modules.iter().map(String::as_str).collect();
    let ranks: Vec<String> = info.ranks.iter().map(usize::to_string).collect();
    let scales = match info.scales {
        [least, most] if least == most => format!("{most}"),
        [least, most] => format!("{least} to {most}"),
    };
    let rows = [
        ("adapter", name.into_owned()),
        ("format", "LoRA, as PEFT saves it".to_owned()),
        (
            "of model",
            info.base_model.unwrap_or_else(|| "unknown".to_owned()),
        ),
        (
            "changes",
            format!("{} of {} matrices", modules.join(", "), info.matrices),
        ),
        ("rank", format!("{}, scale {scales}", ranks.join(", "))),
        ("parameters", human_count(info.parameters)),
        (
            "memory",
            format!("{} beside the weights", human_bytes(info.bytes)),
        ),
    ];
    output::print(&super::report::table(&rows))
}
