//! `qwen2 bench`: loading, prefill and decode, next to what the memory allows.

use std::path::Path;
use std::time::Instant;

use qwen2_core::{DType, Device, GenerateOptions, Model, ModelConfig, Quantization, profile};
use serde_json::{Value, json};

use crate::args::{BenchArgs, LoadArgs};
use crate::bandwidth::{median, read_bytes_per_s};
use crate::failure::Failure;
use crate::load;
use crate::output::{self, human_bytes};
use crate::streams;

/// Name; hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
/// num_key_value_heads, vocab_size; tie_word_embeddings: the published config.json files.
const SHAPES: [(&str, [usize; 6], bool); 5] = [
    ("0.5b", [896, 4864, 24, 14, 2, 151_936], true),
    ("1.5b", [1536, 8960, 28, 12, 2, 151_936], true),
    ("7b", [3584, 18_944, 28, 28, 4, 152_064], false),
    ("57b-a14b", [3584, 18_944, 28, 28, 4, 151_936], false),
    ("72b", [8192, 29_568, 80, 64, 8, 152_064], false),
];

/// What the weights are kept as.
#[derive(Clone, Copy)]
enum Precision {
    Dense(DType),
    Packed(Quantization),
}

/// One run.
struct Run {
    first_token_s: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    /// Of the processor's memory, where that is the device's.
    bandwidth_bytes_per_s: Option<f64>,
    /// The most memory that the process has had until its first token.
    peak_bytes: Option<u64>,
}

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    check(args)?;
    let precision = args.precision.as_deref().map(precision).transpose()?;
    let (name, builder, precision) = match &args.model {
        Some(model) => (
            model.to_string_lossy().into_owned(),
            Model::builder(load::source(model)),
            precision,
        ),
        None => {
            let name = args.shape.as_deref().unwrap_or("0.5b");
            let config = shape(name, args.layers)?;
            let precision = precision.unwrap_or(Precision::Dense(DType::BF16));
            if is_host(&args.device.parse::<Device>()?.resolved()?.to_string()) {
                check_memory(&config, precision)?;
            }
            (name.to_owned(), Model::random(&config), Some(precision))
        }
    };
    let load_args = LoadArgs {
        device: args.device.clone(),
        dtype: precision
            .and_then(Precision::dtype)
            .map(|dtype| dtype.name().to_owned()),
        quantize: precision
            .and_then(Precision::quantization)
            .map(|q| q.name().to_owned()),
        activations: args.activations.clone(),
        kv_cache: args.kv_cache.clone(),
        preload: args.preload,
        screened_head: args.screened_head,
        adapter: None,
        context_length: args.context_length,
        long_context: args.long_context.clone(),
        threads: args.threads,
    };
    let start = Instant::now();
    let model = load::finish(builder, &load_args)?;
    let load_s = start.elapsed().as_secs_f64();
    // The first run pays for pages and threads that later ones find ready.
    generate(&model, args.prompt.min(16), 2)?.finish()?;
    let runs = (0..args.repeat)
        .map(|_| measure(&model, args))
        .collect::<Result<Vec<_>, _>>()?;
    let mut report = report(args, &model, &name, precision, load_s, &runs);
    if args.profile {
        report["profile"] = profile(&model, args)?;
    }
    if let Some(n) = args.streams {
        report["streams"] = streams::measure(&model, n, args.new)?;
    }
    match args.json {
        true => output::print_json(&report),
        false => output::print(&lines(&report)),
    }
}

fn check(args: &BenchArgs) -> Result<(), Failure> {
    for (name, value, least) in [
        ("prompt", args.prompt, 1),
        ("new", args.new, 2),
        ("repeat", args.repeat, 1),
        ("layers", args.layers.unwrap_or(1), 1),
        ("streams", args.streams.unwrap_or(1), 1),
    ] {
        if value < least {
            return Err(Failure::usage(
                format!("{name} is {value}"),
                format!("at least {least}"),
            ));
        }
    }
    Ok(())
}

fn precision(name: &str) -> Result<Precision, Failure> {
    if let Ok(quantization) = name.parse() {
        return Ok(Precision::Packed(quantization));
    }
    name.parse().map(Precision::Dense).map_err(|_| {
        Failure::usage(
            format!("unknown precision: `{}`", name.escape_debug()),
            "one of f32, bf16, f16, q8, q4",
        )
    })
}

impl Precision {
    fn dtype(self) -> Option<DType> {
        match self {
            Self::Dense(dtype) => Some(dtype),
            Self::Packed(_) => None,
        }
    }

    fn quantization(self) -> Option<Quantization> {
        match self {
            Self::Dense(_) => None,
            Self::Packed(quantization) => Some(quantization),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Dense(dtype) => dtype.name(),
            Self::Packed(quantization) => quantization.name(),
        }
    }
}

/// A published shape, checked as its file would be; `layers`: with so many instead.
fn shape(name: &str, layers: Option<usize>) -> Result<ModelConfig, Failure> {
    let Some(row) = SHAPES.iter().find(|row| row.0 == name) else {
        let names = SHAPES.map(|row| row.0).join(", ");
        return Err(Failure::usage(
            format!("unknown shape: `{}`", name.escape_debug()),
            format!("one of {names}"),
        ));
    };
    let &(name, [hidden, intermediate, published, heads, kv_heads, vocab], tied) = row;
    let layers = layers.unwrap_or(published);
    let mut config = json!({
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": 32_768,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    });
    if name == "57b-a14b" {
        for (key, value) in [
            ("model_type", json!("qwen2_moe")),
            ("num_experts", json!(64)),
            ("num_experts_per_tok", json!(8)),
            ("moe_intermediate_size", json!(2560)),
            ("shared_expert_intermediate_size", json!(20_480)),
            ("norm_topk_prob", json!(false)),
            ("decoder_sparse_step", json!(1)),
        ] {
            config[key] = value;
        }
    }
    Ok(ModelConfig::from_json(
        config.to_string().as_bytes(),
        Path::new(name),
    )?)
}

/// Whether the device's memory is the processor's.
fn is_host(device: &str) -> bool {
    matches!(device, "cpu" | "ndarray")
}

/// Refuses what the system would kill this program for.
fn check_memory(config: &ModelConfig, precision: Precision) -> Result<(), Failure> {
    let bits = match precision {
        Precision::Dense(dtype) => 8.0 * dtype.size_in_bytes() as f64,
        Precision::Packed(Quantization::Q8) => 8.5,
        Precision::Packed(_) => 4.5,
    };
    let needed = (config.parameter_count() as f64 * bits / 8.0) as u64;
    match status_bytes("/proc/meminfo", "MemAvailable:") {
        Some(available) if needed > available => Err(Failure::new(
            format!(
                "not enough memory: the weights take {}, {} are free",
                human_bytes(needed),
                human_bytes(available)
            ),
            "choose a smaller shape or precision",
        )),
        _ => Ok(()),
    }
}

fn generate(
    model: &Model,
    n_prompt: usize,
    n_new: usize,
) -> Result<qwen2_core::TokenStream, Failure> {
    let vocab_size = model.config().vocab_size;
    let prompt: Vec<u32> = (0..n_prompt)
        .map(|i| ((i * 7919 + 13) % vocab_size) as u32)
        .collect();
    let options = GenerateOptions::greedy()
        .max_new_tokens(n_new)
        .ignore_eos(true);
    Ok(model.stream(prompt, &options)?)
}

/// Prefill, read test, decode, read test; only the first and the third are timed by the stream.
fn measure(model: &Model, args: &BenchArgs) -> Result<Run, Failure> {
    let read = || match is_host(&model.device().to_string()) {
        true => read_bytes_per_s(model.threads()).map(Some),
        false => Ok(None),
    };
    let start = Instant::now();
    let mut stream = generate(model, args.prompt, args.new)?;
    stream.next().transpose()?;
    let first_token_s = start.elapsed().as_secs_f64();
    // Before the read test takes memory of its own.
    let peak_bytes = status_bytes("/proc/self/status", "VmHWM:");
    let before = read()?;
    for piece in stream.by_ref() {
        piece?;
    }
    let after = read()?;
    let timings = stream.into_generation().timings;
    Ok(Run {
        first_token_s,
        prefill_tokens_per_s: timings.prefill_tokens_per_s,
        decode_tokens_per_s: timings.decode_tokens_per_s,
        bandwidth_bytes_per_s: before
            .zip(after)
            .map(|(before, after)| f64::midpoint(before, after)),
        peak_bytes,
    })
}

/// What each part of the network takes: milliseconds of the prefill, microseconds of a decode step.
fn profile(model: &Model, args: &BenchArgs) -> Result<Value, Failure> {
    let table = |unit: &str, scale: f64, total: f64| {
        let mut rows = Vec::new();
        let mut rest = total;
        for part in profile::take() {
            let time = part.time.as_secs_f64() * scale;
            rest -= time;
            rows.push(json!({ "part": part.name, unit: time, "share": time / total }));
        }
        rows.push(json!({ "part": "the rest", unit: rest, "share": rest / total }));
        Value::from(rows)
    };
    let mut stream = generate(model, args.prompt, args.new)?;
    profile::set(true);
    let start = Instant::now();
    stream.next().transpose()?;
    let prefill = table("ms", 1e3, start.elapsed().as_secs_f64() * 1e3);
    let start = Instant::now();
    for piece in stream.by_ref() {
        piece?;
    }
    let scale = 1e6 / (args.new - 1) as f64;
    let decode = table("us", scale, start.elapsed().as_secs_f64() * scale);
    profile::set(false);
    Ok(json!({ "prefill": prefill, "decode": decode }))
}

fn report(
    args: &BenchArgs,
    model: &Model,
    name: &str,
    precision: Option<Precision>,
    load_s: f64,
    runs: &[Run],
) -> Value {
    let of = |value: &dyn Fn(&Run) -> f64| median(runs.iter().map(value).collect());
    let read = |value: &dyn Fn(&Run, f64) -> f64| {
        let values = runs
            .iter()
            .map(|run| Some(value(run, run.bandwidth_bytes_per_s?)));
        values.collect::<Option<Vec<_>>>().map(median)
    };
    let precision = precision.unwrap_or(Precision::Dense(model.dtype()));
    let per_token = model.memory().weights_per_token;
    json!({
        "model": name,
        "precision": if model.config().packed { "packed" } else { precision.name() },
        "activations": args.activations.as_deref().unwrap_or(DType::F32.name()),
        "device": model.device().to_string(),
        "threads": model.threads(),
        "prompt": args.prompt,
        "new": args.new,
        "repeat": args.repeat,
        "load_s": load_s,
        "prefill_tokens_per_s": of(&|run| run.prefill_tokens_per_s),
        "decode_tokens_per_s": of(&|run| run.decode_tokens_per_s),
        "first_token_s": of(&|run| run.first_token_s),
        "weight_bytes_per_token": per_token,
        "resident_bytes": status_bytes("/proc/self/status", "VmRSS:"),
        "prefill_peak_bytes": runs.first().and_then(|run| run.peak_bytes),
        "cache_bytes": model.memory().cache_per_token * (args.prompt + args.new) as u64,
        "bandwidth_bytes_per_s": read(&|_, bandwidth| bandwidth),
        "decode_bandwidth_share":
            read(&|run, bandwidth| run.decode_tokens_per_s * per_token as f64 / bandwidth),
    })
}

fn lines(report: &Value) -> String {
    let number = |key: &str| report[key].as_f64().unwrap_or(f64::NAN);
    let bytes = |key: &str| {
        report[key]
            .as_f64()
            .map_or_else(|| "unknown".to_owned(), |n| human_bytes(n as u64))
    };
    let rows = [
        (
            "model",
            format!(
                "{} {} on {}, {} threads",
                text(&report["model"]),
                text(&report["precision"]),
                text(&report["device"]),
                report["threads"]
            ),
        ),
        ("load", format!("{:.2} s", number("load_s"))),
        (
            "prefill",
            format!(
                "{:.1} tokens/s over {} tokens",
                number("prefill_tokens_per_s"),
                report["prompt"]
            ),
        ),
        ("first token", format!("{:.3} s", number("first_token_s"))),
        (
            "decode",
            format!(
                "{:.1} tokens/s over {} tokens",
                number("decode_tokens_per_s"),
                report["new"]
            ),
        ),
        (
            "weights",
            format!("{} read for each token", bytes("weight_bytes_per_token")),
        ),
        (
            "memory",
            match report["bandwidth_bytes_per_s"].is_null() {
                true => format!("{} resident", bytes("resident_bytes")),
                false => format!(
                    "{} read in a second, {} resident",
                    bytes("bandwidth_bytes_per_s"),
                    bytes("resident_bytes")
                ),
            },
        ),
        (
            "cache",
            format!(
                "{} of keys and values, {} resident at most until the first token",
                bytes("cache_bytes"),
                bytes("prefill_peak_bytes")
            ),
        ),
        (
            "share",
            format!(
                "{:.1} % of the memory's speed in decode",
                100.0 * number("decode_bandwidth_share")
            ),
        ),
    ];
    let shown = if report["decode_bandwidth_share"].is_null() {
        rows.len() - 1 // of a GPU's memory the speed is not known here
    } else {
        rows.len()
    };
    let mut lines: String = rows[..shown]
        .iter()
        .map(|(name, value)| format!("{name:<14}{value}\n"))
        .collect();
    lines += &streams_lines(&report["streams"]);
    for (title, table, unit) in [
        ("prefill, ms", "prefill", "ms"),
        ("decode, µs a token", "decode", "us"),
    ] {
        let Some(parts) = report["profile"][table].as_array() else {
            continue;
        };
        lines += &format!("\n{title}\n");
        for part in parts {
            let number = |key: &str| part[key].as_f64().unwrap_or(f64::NAN);
            let share = 100.0 * number("share");
            lines += &format!(
                "  {:<18}{:>10.1}{share:>7.1} %\n",
                text(&part["part"]),
                number(unit)
            );
        }
    }
    lines
}

fn streams_lines(streams: &Value) -> String {
    let number = |key: &str| streams[key].as_f64().unwrap_or(f64::NAN);
    if streams.is_null() {
        return String::new();
    }
    format!(
        "{:<14}{:.1} tokens/s in {}, {:.2} times one\n{:<14}{:.3} s to its first token behind a long one, {:.2} times alone\n",
        "streams",
        number("tokens_per_s"),
        streams["streams"],
        number("speedup"),
        "short prompt",
        number("short_first_token_s"),
        number("short_wait"),
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// A line like `VmRSS:  1234 kB` of a file of Linux' /proc, in bytes; `None` elsewhere.
fn status_bytes(file: &str, key: &str) -> Option<u64> {
    let status = std::fs::read_to_string(file).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_published_parameter_counts() {
        for (name, billions) in [
            ("0.5b", 0.494),
            ("1.5b", 1.544),
            ("7b", 7.616),
            ("57b-a14b", 57.41),
            ("72b", 72.71),
        ] {
            let count = shape(name, None).unwrap().parameter_count() as f64 / 1e9;
            assert!(
                (count - billions).abs() / billions < 1e-3,
                "{name}: {count}"
            );
        }
    }
}
