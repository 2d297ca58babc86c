//! Headers that lie cost neither memory nor the process: a typed error that says where.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{fixture, json, root};
use peak_alloc::PeakAlloc;
use qwen2_core::{Error, ErrorKind, Model, Tokenizer, inspect};
use serde_json::{Value, json as value};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What a refusal may hold at its worst.
const MOST: usize = 1 << 20;
/// The same where regular expressions are compiled, with their tables of Unicode.
const EXPRESSIONS: usize = 64 << 20;

/// The most memory that `body` holds beyond what was held before.
fn peak<R>(body: impl FnOnce() -> R) -> (R, usize) {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let result = body();
    (result, MEMORY.peak_usage() - before)
}

/// The shortest of five times: others have the processor as well.
fn fastest<R>(mut body: impl FnMut() -> R) -> Duration {
    let times = (0..5).map(|_| {
        let start = Instant::now();
        body();
        start.elapsed()
    });
    times.min().unwrap()
}

/// What a refusal may take.
const LONGEST: Duration = Duration::from_millis(10);

struct Case {
    name: &'static str,
    /// What the key of the error ends in.
    key: &'static str,
    /// Writes the checkpoint into a directory; what is opened then.
    write: fn(&Path) -> PathBuf,
}

fn checkpoint(name: &'static str, key: &'static str, write: fn(&Path) -> PathBuf) -> Case {
    Case { name, key, write }
}

/// A GGUF file of these bytes behind the magic, as long as it says.
fn gguf(directory: &Path, bytes: &[&[u8]], len: u64) -> PathBuf {
    let path = directory.join("model.gguf");
    fs::write(&path, [&[b"GGUF".as_slice()], bytes].concat().concat()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(len.max(file.metadata().unwrap().len()))
        .unwrap();
    path
}

fn counts(tensors: u64, keys: u64) -> Vec<u8> {
    let numbers = [tensors.to_le_bytes(), keys.to_le_bytes()].concat();
    [3_u32.to_le_bytes().as_slice(), &numbers].concat()
}

fn text(text: &str) -> Vec<u8> {
    [
        (text.len() as u64).to_le_bytes().as_slice(),
        text.as_bytes(),
    ]
    .concat()
}

fn gguf_cases() -> Vec<Case> {
    const HUGE: u64 = 1 << 63;
    vec![
        checkpoint("2^63 tensors", "", |to| gguf(to, &[&counts(HUGE, 0)], 0)),
        checkpoint("2^63 keys", "", |to| gguf(to, &[&counts(0, HUGE)], 0)),
        checkpoint("a terabyte of nothing", "tokenizer.ggml.model", |to| {
            gguf(to, &[&counts(0, 0)], 1 << 40)
        }),
        checkpoint("a string of 2^63 bytes", "", |to| {
            let key = [text("k"), 8_u32.to_le_bytes().to_vec()].concat();
            gguf(to, &[&counts(0, 1), &key, &HUGE.to_le_bytes()], 1 << 40)
        }),
        checkpoint(
            "four thousand million layers",
            "qwen2moe.block_count",
            |to| {
                let mut file = fs::read(root().join("conformance/gguf/moe.gguf")).unwrap();
                let key = b"qwen2moe.block_count";
                let at = file
                    .windows(key.len())
                    .position(|bytes| bytes == key)
                    .unwrap();
                file[at + key.len() + 4..][..4].fill(0xFF);
                fs::write(to.join("model.gguf"), file).unwrap();
                to.join("model.gguf")
            },
        ),
        // 4096 bytes of data for every stack of 1024.
        checkpoint("stacks of experts", "blk.16.ffn_gate_exps.weight", |to| {
            let tensor = |layer: u64| {
                let dims = [1, 1, 1024_u64].map(u64::to_le_bytes).concat();
                let name = text(&format!("blk.{layer}.ffn_gate_exps.weight"));
                let rank = 3_u32.to_le_bytes().to_vec();
                let kind = 0_u32.to_le_bytes().to_vec();
                [
                    name,
                    rank,
                    dims,
                    kind,
                    (layer * 4096).to_le_bytes().to_vec(),
                ]
                .concat()
            };
            let tensors: Vec<u8> = (0..100).flat_map(tensor).collect();
            gguf(to, &[&counts(100, 0), &tensors], 1 << 20)
        }),
        checkpoint("2^40 experts in a file without data", "", |to| {
            let dims = [1, 1, 1_u64 << 38].map(u64::to_le_bytes).concat();
            let name = text("blk.0.ffn_gate_exps.weight");
            let tensor = [name, 3_u32.to_le_bytes().to_vec(), dims, vec![0; 12]].concat();
            gguf(to, &[&counts(1, 0), &tensor], (1 << 40) + 4096)
        }),
    ]
}

/// A copy of a fixture with another config.json, or another file in place of its weights.
fn changed(directory: &Path, change: impl Fn(&mut Value), weights: Option<&[u8]>) -> PathBuf {
    let mut config = json(fixture("moe").join("config.json"));
    change(&mut config);
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let to = directory.join("model.safetensors");
    match weights {
        Some(bytes) => fs::write(to, bytes).unwrap(),
        None => drop(fs::copy(fixture("moe").join("model.safetensors"), to).unwrap()),
    }
    directory.to_owned()
}

/// A terabyte of nothing that takes no room on the disk.
fn sparse(path: &Path) {
    fs::File::create(path).unwrap().set_len(1 << 40).unwrap();
}

/// A safetensors file of one tensor without bytes.
fn empty_tensor(name: &str, dtype: &str, shape: &[u64]) -> Vec<u8> {
    let header =
        value!({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}).to_string();
    [
        (header.len() as u64).to_le_bytes().as_slice(),
        header.as_bytes(),
    ]
    .concat()
}

fn directory_cases() -> Vec<Case> {
    vec![
        checkpoint("a header of 2^63 bytes", "", |to| {
            changed(to, |_| (), Some(&(1_u64 << 63).to_le_bytes()))
        }),
        checkpoint("a header of 100 MB that is not there", "", |to| {
            changed(to, |_| (), Some(&100_000_000_u64.to_le_bytes()))
        }),
        checkpoint("2^64 numbers in no bytes", "l.weight", |to| {
            let file = empty_tensor("l.weight", "F32", &[1 << 32, 1 << 32]);
            changed(to, |_| (), Some(&file))
        }),
        checkpoint("offsets up to 2^64", "l.weight", |to| {
            let tensor =
                value!({"dtype": "F32", "shape": [1_u64 << 62], "data_offsets": [0, u64::MAX]});
            let header = value!({ "l.weight": tensor }).to_string();
            let length = (header.len() as u64).to_le_bytes();
            let file = [length.as_slice(), header.as_bytes()].concat();
            changed(to, |_| (), Some(&file))
        }),
        checkpoint("a tensor of 10,000 dimensions", "l.weight", |to| {
            let file = empty_tensor("l.weight", "F32", &[1; 10_000]);
            changed(to, |_| (), Some(&file))
        }),
        checkpoint("lists in lists in a header", "", |to| {
            let header = format!("{{\"l\":{}", "[".repeat(50_000));
            let length = (header.len() as u64).to_le_bytes();
            let file = [length.as_slice(), header.as_bytes()].concat();
            changed(to, |_| (), Some(&file))
        }),
        checkpoint("an index of a terabyte", "", |to| {
            changed(to, |_| (), None);
            fs::remove_file(to.join("model.safetensors")).unwrap();
            sparse(&to.join("model.safetensors.index.json"));
            to.to_owned()
        }),
        checkpoint("an index of lists in lists", "", |to| {
            changed(to, |_| (), None);
            fs::remove_file(to.join("model.safetensors")).unwrap();
            let index = format!("{{\"weight_map\":{}", "[".repeat(50_000));
            fs::write(to.join("model.safetensors.index.json"), index).unwrap();
            to.to_owned()
        }),
        checkpoint("a config of a terabyte", "", |to| {
            changed(to, |_| (), None);
            sparse(&to.join("config.json"));
            to.to_owned()
        }),
        checkpoint("a config of lists in lists", "", |to| {
            changed(to, |_| (), None);
            let config = format!("{{\"hidden_size\":{}", "[".repeat(50_000));
            fs::write(to.join("config.json"), config).unwrap();
            to.to_owned()
        }),
        checkpoint("a vocabulary of 2^64", "vocab_size", |to| {
            changed(to, |config| config["vocab_size"] = value!(u64::MAX), None)
        }),
        checkpoint("layers of 2^53 as a float", "num_hidden_layers", |to| {
            changed(
                to,
                |config| config["num_hidden_layers"] = value!(9e15),
                None,
            )
        }),
        checkpoint("a million experts", "num_experts", |to| {
            let change = |config: &mut Value| {
                config["num_hidden_layers"] = value!(1024);
                config["max_window_layers"] = value!(1024);
                config["num_experts"] = value!(1024);
            };
            changed(to, change, None)
        }),
        checkpoint("all the experts that there may be", "", |to| {
            let change = |config: &mut Value| {
                config["num_hidden_layers"] = value!(4);
                config["num_experts"] = value!(1024);
            };
            changed(to, change, None)
        }),
        checkpoint("words beside a dimension of 0", "l.qweight", |to| {
            let change = |config: &mut Value| {
                config["quantization_config"] = value!({"quant_method": "awq", "bits": 4});
            };
            let mut file = empty_tensor("l.qweight", "I32", &[0, 1 << 62]);
            let zeros = value!({"dtype": "I32", "shape": [0], "data_offsets": [0, 0]});
            let more = format!(
                ",\"l.qzeros\":{zeros},\"l.scales\":{}}}",
                zeros.to_string().replace("I32", "F16")
            );
            file.truncate(file.len() - 1);
            file.extend(more.as_bytes());
            let len = (file.len() - 8) as u64;
            file[..8].copy_from_slice(&len.to_le_bytes());
            changed(to, change, Some(&file))
        }),
    ]
}

/// tokenizer.json of `tied` with another part; what the error's key ends in.
fn tokenizer_cases() -> Vec<Case> {
    fn tokenizer(directory: &Path, change: impl Fn(&mut Value)) -> PathBuf {
        let mut tokenizer = json(fixture("tied").join("tokenizer.json"));
        change(&mut tokenizer);
        fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        directory.to_owned()
    }
    vec![
        checkpoint("a token of id 2^32 - 1", "", |to| {
            tokenizer(to, |json| json["model"]["vocab"]["a"] = value!(u32::MAX))
        }),
        checkpoint("an added token of id 2^32 - 1", "", |to| {
            tokenizer(to, |json| json["added_tokens"][0]["id"] = value!(u32::MAX))
        }),
        checkpoint("a token of id 2^64 - 1", "", |to| {
            tokenizer(to, |json| json["model"]["vocab"]["a"] = value!(u64::MAX))
        }),
        checkpoint("lists in lists", "", |to| {
            let text = format!("{{\"model\":{}", "[".repeat(50_000));
            fs::write(to.join("tokenizer.json"), text).unwrap();
            to.to_owned()
        }),
        checkpoint("a tokenizer of a terabyte", "", |to| {
            sparse(&to.join("tokenizer.json"));
            to.to_owned()
        }),
        checkpoint("a pattern of gigabytes", "", |to| {
            tokenizer(to, |json| {
                let pattern = value!({"Regex": "((a{1000}){1000}){1000}"});
                json["pre_tokenizer"]["pretokenizers"][0]["pattern"] = pattern;
            })
        }),
    ]
}

/// An adapter for a projection of `tied`, of these settings and with halves of these shapes.
fn write_adapter(directory: &Path, settings: &Value, shapes: [[u64; 2]; 2]) {
    let mut config = value!({"peft_type": "LORA", "r": 4, "lora_alpha": 4});
    let settings = settings.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(settings);
    fs::write(directory.join("adapter_config.json"), config.to_string()).unwrap();
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (half, shape) in [("lora_A", shapes[0]), ("lora_B", shapes[1])] {
        let end = at + 4 * shape[0] * shape[1];
        let name = format!("base_model.model.model.layers.0.self_attn.q_proj.{half}.weight");
        header.insert(
            name,
            value!({"dtype": "F32", "shape": shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    let header = Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    let file = [length.as_slice(), header.as_bytes(), &vec![0; at as usize]].concat();
    fs::write(directory.join("adapter_model.safetensors"), file).unwrap();
}

fn check(name: &str, key: &str, held: usize, most: usize, error: &Error) {
    assert!(held <= most, "{name}: {held} bytes");
    assert_eq!(error.kind(), ErrorKind::InvalidFile, "{name}: {error}");
    assert!(
        error.path().is_some() && error.help().is_some(),
        "{name}: {error}"
    );
    let found = error.key().unwrap_or_default();
    assert!(found.ends_with(key), "{name}: {error}");
}

/// One test for all, because the counter is one for all threads.
#[test]
fn what_lies_is_refused_within_a_megabyte_and_ten_milliseconds() {
    for case in gguf_cases().into_iter().chain(directory_cases()) {
        let directory = tempfile::tempdir().unwrap();
        let path = (case.write)(directory.path());
        let open = || inspect(&path, |_| ControlFlow::Continue(()));
        let (outcome, held) = peak(open);
        let took = fastest(open);
        assert!(took < LONGEST, "{}: {took:?}", case.name);
        check(
            case.name,
            case.key,
            held,
            MOST,
            &outcome.expect_err(case.name),
        );
    }
    for case in tokenizer_cases() {
        let directory = tempfile::tempdir().unwrap();
        let path = (case.write)(directory.path());
        let (outcome, held) = peak(|| Tokenizer::load(&path));
        let is_pattern = case.name.contains("pattern");
        let most = if is_pattern { EXPRESSIONS } else { MOST };
        let took = fastest(|| Tokenizer::load(&path));
        assert!(is_pattern || took < LONGEST, "{}: {took:?}", case.name);
        check(
            case.name,
            case.key,
            held,
            most,
            &outcome.expect_err(case.name),
        );
    }
    let model = Model::load(fixture("tied")).unwrap();
    let whole = [[4, 32], [32, 4]];
    let bomb = value!({"rank_pattern": {"((a{100}){100}){100}": 4}});
    for (name, key, settings, shapes) in [
        (
            "rank 0",
            "lora_B.weight",
            value!({"r": 0}),
            [[0, 32], [32, 0]],
        ),
        ("two ranks", "lora_B.weight", value!({}), [[4, 32], [32, 3]]),
        ("a pattern of gigabytes", "rank_pattern", bomb, whole),
        (
            "an infinite scale",
            "lora_alpha",
            value!({"lora_alpha": 1e300}),
            whole,
        ),
        (
            "the wrong shape",
            "q_proj.weight",
            value!({}),
            [[4, 31], [32, 4]],
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        write_adapter(directory.path(), &settings, shapes);
        let (outcome, held) = peak(|| model.with_adapter(directory.path()));
        check(name, key, held, MOST, &outcome.expect_err(name));
    }
}
