//! The facts about a model as lines and as JSON.

use qwen2_core::{
    DType, Device, DeviceReport, GroupMethod, GroupQuantization, KvCacheType, instruction_set,
};
use serde_json::{Map, Value, json};

use super::Facts;
use crate::output::{human_bytes, human_count};

const KV_CACHES: [KvCacheType; 5] = [
    KvCacheType::F32,
    KvCacheType::F16,
    KvCacheType::BF16,
    KvCacheType::Q8,
    KvCacheType::Q4,
];

impl Facts {
    pub(super) fn json(&self) -> Value {
        let kv_cache = self.kv_cache();
        let bytes = |kv_cache: KvCacheType| {
            let bytes = self.cache_bytes(kv_cache).into();
            (kv_cache.name().to_owned(), bytes)
        };
        let caches: Map<String, Value> = KV_CACHES.into_iter().map(bytes).collect();
        let stored = self.stored.as_ref();
        json!({
            "name": self.name,
            "model_type": self.config.model_type,
            "file_format": self.file_format(),
            "parameters": self.config.parameter_count(),
            "stored_bytes": stored.map(|stored| stored.bytes),
            "dtype": self.dtype.map(DType::name),
            "formats": stored.map(|stored| &stored.formats),
            "bits_per_weight": self.bits_per_weight(),
            "trained_context_length": self.trained.trained_length(),
            "longest_context_length": self.trained.longest_context(self.long_context),
            "context_length": self.context_length,
            "weight_bytes": self.weight_bytes(),
            "kv_cache": kv_cache.name(),
            "cache_bytes_per_token": self.config.kv_bytes_per_token(kv_cache),
            "cache_bytes": self.cache_bytes(kv_cache),
            "cache_bytes_by_type": caches,
            "memory_bytes": self.memory_bytes(),
            "device": self.device,
            "devices": Device::compiled(),
            "survey": survey(),
            "instruction_set": instruction_set(),
            "threads": threads(),
            "config": self.config,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    pub(super) fn lines(&self) -> String {
        let kv_cache = self.kv_cache();
        let cache = |kv_cache| human_bytes(self.cache_bytes(kv_cache));
        let known = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), human_bytes);
        let per_token = human_bytes(self.config.kv_bytes_per_token(kv_cache));
        let mut rows = vec![
            ("model", self.name.clone()),
            ("architecture", self.architecture()),
            ("parameters", human_count(self.config.parameter_count())),
            ("format", self.format_line()),
            ("context", self.context_line()),
            ("weights", known(self.weight_bytes())),
            (
                "cache",
                format!(
                    "{} in {kv_cache}, {per_token} a token; in f16 {}, q8 {}, q4 {}",
                    cache(kv_cache),
                    cache(KvCacheType::F16),
                    cache(KvCacheType::Q8),
                    cache(KvCacheType::Q4),
                ),
            ),
            (
                "memory",
                format!(
                    "{} on {} for one context of {} tokens",
                    known(self.memory_bytes()),
                    self.device,
                    self.context_length
                ),
            ),
            (
                "processor",
                format!("{}, {} threads", instruction_set(), threads()),
            ),
        ];
        let survey = Device::survey();
        let compiled = survey.iter().filter(|report| report.compiled);
        rows.extend(compiled.map(|report| ("device", device_line(report))));
        let others = survey.iter().filter(|report| !report.compiled);
        let others: Vec<&str> = others.map(|report| report.name).collect();
        if !others.is_empty() {
            let names = others.join(", ");
            rows.push((
                "no device",
                format!("{names}: not compiled in, each is a cargo feature"),
            ));
        }
        table(&rows)
    }

    fn architecture(&self) -> String {
        let config = &self.config;
        let layers = format!(
            "{}, {} layers of width {}, {} heads over {} of keys and values",
            config.model_type,
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        );
        match &config.moe {
            Some(moe) => format!(
                "{layers}, {} of {} experts a token",
                moe.num_experts_per_tok, moe.num_experts
            ),
            None => layers,
        }
    }

    /// What the files are, as far as they were looked at.
    fn file_format(&self) -> String {
        let container = self.stored.as_ref().map(|stored| stored.container);
        let container = container.unwrap_or("config alone");
        match (self.config.packed, &self.config.group_quantization) {
            (true, _) => format!("{container}, packed by qwen2 quantize"),
            (false, Some(groups)) => format!("{container}, {}", groups_line(groups)),
            (false, None) => container.to_owned(),
        }
    }

    fn format_line(&self) -> String {
        let mut parts = vec![self.file_format()];
        match &self.stored {
            Some(stored) => {
                let names: Vec<&str> = stored.formats.keys().map(String::as_str).collect();
                parts.push(names.join(" and "));
                parts.push(human_bytes(stored.bytes));
            }
            None => parts.extend(self.dtype.map(|dtype| dtype.name().to_owned())),
        }
        if let Some(bits) = self.bits_per_weight() {
            parts.push(format!("{bits:.2} bits a weight"));
        }
        parts.join(", ")
    }

    /// As stored; as announced where there are no weights.
    fn bits_per_weight(&self) -> Option<f64> {
        let stored = || Some(self.stored.as_ref()?.bytes);
        let bytes = stored().or_else(|| self.weight_bytes())?;
        let bits = 8.0 * bytes as f64 / self.config.parameter_count() as f64;
        Some((bits * 1000.0).round() / 1000.0)
    }

    fn context_line(&self) -> String {
        let trained = self.trained.trained_length();
        let by = self.long_context;
        let longest = self.trained.longest_context(by);
        let here = match self.context_length {
            here if here == trained => String::new(),
            here => format!(", {here} here"),
        };
        format!("{trained} tokens trained{here}, {longest} at most with {by}")
    }
}

fn groups_line(groups: &GroupQuantization) -> String {
    let method = match groups.quant_method {
        GroupMethod::Awq => "AWQ",
        _ => "GPTQ",
    };
    let size = groups.group_size;
    let size = size.map_or_else(
        || "whole columns".to_owned(),
        |size| format!("groups of {size}"),
    );
    format!("{method} with {} bits in {size}", groups.bits)
}

fn survey() -> Vec<Value> {
    let row = |report: &DeviceReport| {
        let problem = report.problem.as_ref();
        json!({
            "name": report.name,
            "compiled": report.compiled,
            "found": problem.is_none(),
            "problem": problem.map(ToString::to_string),
            "help": problem.and_then(|problem| problem.help()),
        })
    };
    Device::survey().iter().map(row).collect()
}

fn device_line(report: &DeviceReport) -> String {
    match &report.problem {
        None => format!("{}: found", report.name),
        Some(problem) => {
            // `device is not available: cuda: why`
            let text = problem.to_string();
            let why = text.rsplit_once(": ").map_or(text.as_str(), |(_, why)| why);
            let help = problem.help().unwrap_or("`cpu` works everywhere");
            format!("{}: {why}; {help}", report.name)
        }
    }
}

/// Names in a column of their own.
pub(super) fn table(rows: &[(&str, String)]) -> String {
    let row = |(name, value): &(&str, String)| format!("{name:<14}{value}\n");
    rows.iter().map(row).collect()
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
