//! The built program does what its help says, for people and for machines.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Outcome {
    fn success(&self) {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
    }

    fn json(&self) -> Value {
        self.success();
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen2"));
    command
        .args(args)
        // The demo model is unpacked here, not in the home of whoever runs the tests.
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn finish(mut child: Child, stdin: &[u8]) -> Outcome {
    child.stdin.take().unwrap().write_all(stdin).unwrap();
    let output = child.wait_with_output().unwrap();
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn qwen2_with(args: &[&str], stdin: &[u8]) -> Outcome {
    finish(command(args).spawn().unwrap(), stdin)
}

fn qwen2(args: &[&str]) -> Outcome {
    qwen2_with(args, b"")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn tied() -> String {
    root().join("conformance/models/tied").display().to_string()
}

fn demo() -> String {
    root().join("examples/demo-model").display().to_string()
}

/// The tied fixture with room for a million tokens: greedy, it goes on until it is stopped.
fn endless(directory: &Path) -> String {
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(Path::new(&tied()).join(name), directory.join(name)).unwrap();
    }
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = 1_000_000.into();
    std::fs::write(path, config.to_string()).unwrap();
    directory.display().to_string()
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

// ------------------------------------------------------------------------------- generate

#[test]
fn generate_streams_text_to_stdout_and_the_rate_to_stderr() {
    let tied = tied();
    let args = [
        "generate",
        &tied,
        "hello",
        "--greedy",
        "--max-new-tokens",
        "8",
    ];
    let text = qwen2(&args);
    assert_eq!(text.code, Some(0), "{}", text.stderr);
    assert!(
        text.stderr.starts_with("[8 tokens, ")
            && text.stderr.ends_with(" tokens/s, ended by length]\n"),
        "{}",
        text.stderr
    );

    let json = qwen2(&[&args[..], &["--json"]].concat());
    let value = json.json();
    assert_eq!(json.stderr, "");
    assert_eq!(
        keys(&value),
        [
            "text",
            "tokens",
            "finish_reason",
            "stop_match",
            "seed",
            "usage",
            "timings"
        ]
    );
    assert_eq!(
        keys(&value["usage"]),
        ["prompt_tokens", "cached_tokens", "completion_tokens"]
    );
    assert_eq!(
        keys(&value["timings"]),
        [
            "prefill_s",
            "decode_s",
            "prefill_tokens_per_s",
            "decode_tokens_per_s"
        ]
    );
    assert_eq!(value["tokens"].as_array().unwrap().len(), 8);
    assert_eq!(value["finish_reason"], "length");
    assert_eq!(
        text.stdout,
        format!("{}\n", value["text"].as_str().unwrap())
    );
}

#[test]
fn generate_reads_the_prompt_from_stdin_without_its_last_newline() {
    let tied = tied();
    let args = ["--greedy", "--max-new-tokens", "8", "--json"];
    let given = qwen2(&[&["generate", &tied, "two\nlines"], &args[..]].concat()).json();
    let read = qwen2_with(
        &[&["generate", &tied, "-"], &args[..]].concat(),
        b"two\nlines\n",
    )
    .json();
    assert_eq!(given["tokens"], read["tokens"]);
}

#[test]
fn generate_chat_goes_through_the_template_and_plain_text_does_not() {
    let tied = tied();
    let count = |args: &[&str]| {
        let common = [
            "generate",
            &tied,
            "hello",
            "--max-new-tokens",
            "1",
            "--json",
        ];
        qwen2(&[&common[..], args].concat()).json()["usage"]["prompt_tokens"]
            .as_u64()
            .unwrap()
    };
    let tokens = |args: &[&str]| {
        qwen2(&[&["tokenize", &tied, "hello", "--json"], args].concat()).json()["count"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(count(&[]), tokens(&[]));
    assert_eq!(count(&["--chat"]), tokens(&["--chat"]));
    assert!(
        count(&["--chat", "--system", "x"]) < count(&["--chat"]),
        "the default instructions are longer"
    );
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let tied = tied();
    let run = |seed: &str| {
        let args = [
            "generate",
            &tied,
            "hello",
            "--max-new-tokens",
            "12",
            "--temperature",
            "1.5",
            "--seed",
            seed,
            "--json",
        ];
        qwen2(&args).json()
    };
    let (first, again, other) = (run("7"), run("7"), run("8"));
    assert_eq!(first["tokens"], again["tokens"]);
    assert_eq!(first["seed"], 7);
    assert_ne!(first["tokens"], other["tokens"]);
}

#[test]
fn biases_bans_and_log_probabilities_come_from_flags() {
    let tied = tied();
    let run = |more: &[&str]| {
        let args = [
            "generate",
            &tied,
            "hello",
            "--greedy",
            "--json",
            "--max-new-tokens",
            "3",
        ];
        qwen2(&[&args[..], more].concat()).json()
    };
    let plain = run(&[]);
    assert!(plain.get("logprobs").is_none());
    let flags = [
        "--logit-bias",
        "77=100",
        "--logit-bias",
        "5=-1.5",
        "--logprobs",
        "2",
    ];
    let forced = run(&flags);
    assert_eq!(forced["tokens"], serde_json::json!([77, 77, 77]));
    assert_eq!(forced["logprobs"].as_array().map(Vec::len), Some(3));
    assert_eq!(forced["logprobs"][0]["token"], 77);
    let top = &forced["logprobs"][0]["top"];
    assert_eq!(
        top[0]["token"], plain["tokens"][0],
        "the model's own likeliest"
    );
    let bad = qwen2(&["generate", &tied, "x", "--logit-bias", "77"]);
    assert_ne!(bad.code, Some(0));
}

#[test]
fn stop_may_be_given_several_times_and_ends_before_the_text() {
    let tied = tied();
    let args = [
        "generate",
        &tied,
        "hello",
        "--greedy",
        "--max-new-tokens",
        "40",
        "--json",
    ];
    let whole = qwen2(&args).json();
    let text = whole["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    let stopped = qwen2(&[&args[..], &["--stop", "never in it", "--stop", &stop]].concat()).json();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["stop_match"]["text"], stop.as_str());
    assert_eq!(
        stopped["text"].as_str().unwrap(),
        &text[..text.find(&stop).unwrap()]
    );
}

#[test]
fn loading_options_reach_the_library() {
    let tied = tied();
    let with = |args: &[&str]| {
        qwen2(&[&["generate", &tied, "hello", "--max-new-tokens", "4"], args].concat())
    };
    for args in [
        &["--device", "cpu", "--threads", "1", "--preload"][..],
        &[
            "--dtype",
            "bf16",
            "--activations",
            "bf16",
            "--context-length",
            "64",
            "--kv-cache",
            "bf16",
        ],
        &[
            "--quantize",
            "q8",
            "--top-k",
            "5",
            "--top-p",
            "0.9",
            "--min-p",
            "0.01",
            "--repetition-penalty",
            "1.1",
        ],
    ] {
        let outcome = with(args);
        assert_eq!(outcome.code, Some(0), "{args:?}: {}", outcome.stderr);
    }
    let overflow = with(&["--context-length", "7"]);
    assert_eq!(overflow.code, Some(1));
    assert!(
        overflow
            .stderr
            .starts_with("error: prompt and new tokens exceed the context"),
        "{}",
        overflow.stderr
    );
    assert!(overflow.stderr.contains("\nhelp: "), "{}", overflow.stderr);
}

// ---------------------------------------------------------------------------------- chat

#[test]
fn chat_opens_the_demo_model_and_answers_line_by_line() {
    let outcome = qwen2_with(
        &["chat", "--greedy"],
        b"What is 12 plus 30?\n\nWhich is larger, 7 or 9?\n",
    );
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(
        lines.len(),
        2,
        "an answer for each message, none for the empty line: {lines:?}"
    );
    assert!(lines[0].contains("42"), "{lines:?}");
    assert!(lines[1].contains('9'), "{lines:?}");
    assert_eq!(
        outcome.stderr.matches(" tokens/s]").count(),
        2,
        "{}",
        outcome.stderr
    );
}

#[test]
fn chat_keeps_the_conversation_until_reset() {
    let tied = tied();
    let input = b"a\nb\n/reset\na\n/exit\nnever read\n";
    let outcome = qwen2_with(
        &["chat", &tied, "--greedy", "--max-new-tokens", "4", "--json"],
        input,
    );
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let answers: Vec<Value> = outcome
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[0]["usage"]["cached_tokens"], 0);
    assert!(
        answers[1]["usage"]["cached_tokens"].as_u64().unwrap() > 0,
        "the past is not read again"
    );
    assert_eq!(answers[0]["usage"], answers[2]["usage"]);
    assert_eq!(answers[0]["tokens"], answers[2]["tokens"]);
}

#[test]
fn chat_takes_instructions() {
    let tied = tied();
    let prompt_tokens = |args: &[&str]| {
        let common = ["chat", &tied, "--max-new-tokens", "1", "--json"];
        qwen2_with(&[&common[..], args].concat(), b"a\n").json()["usage"]["prompt_tokens"]
            .as_u64()
            .unwrap()
    };
    assert!(
        prompt_tokens(&["--system", "x"]) < prompt_tokens(&[]),
        "the default instructions are longer"
    );
}

#[test]
fn a_message_that_does_not_fit_leaves_the_conversation_as_it_was() {
    let tied = tied();
    let long = "long ".repeat(60);
    let input = format!("a\n{long}\nb\n");
    let with = qwen2_with(
        &["chat", &tied, "--greedy", "--max-new-tokens", "4", "--json"],
        input.as_bytes(),
    );
    let without = qwen2_with(
        &["chat", &tied, "--greedy", "--max-new-tokens", "4", "--json"],
        b"a\nb\n",
    );
    assert_eq!(
        with.code,
        Some(1),
        "a script learns that a message had no answer"
    );
    assert!(
        with.stderr
            .starts_with("error: conversation exceeds the context"),
        "{}",
        with.stderr
    );
    let tokens = |outcome: &Outcome| {
        let lines = outcome
            .stdout
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|answer| answer["tokens"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(tokens(&with), tokens(&without));
}

#[cfg(unix)]
#[test]
fn control_c_stops_the_answer_and_then_the_program() {
    let directory = tempfile::tempdir().unwrap();
    let model = endless(directory.path());
    let mut child = command(&["chat", &model, "--greedy"]).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    stdin.write_all(b"a\n").unwrap();
    let mut one = [0];
    stdout.read_exact(&mut one).unwrap();
    // Keeps the pipe empty, so that the program is at work and not at a write.
    let drain = std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
    interrupt(&child);
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        stderr.read_exact(&mut one).unwrap();
        line.push(one[0]);
    }
    assert!(String::from_utf8_lossy(&line).contains("ended by cancelled"));
    // Now it waits for the next message: Ctrl-C ends it.
    std::thread::sleep(std::time::Duration::from_millis(200));
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drain.join().unwrap().unwrap();
    drop(stdin);
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    let status = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_reader_that_leaves_ends_the_program_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = command(&["generate", &endless(directory.path()), "a", "--greedy"])
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let outcome = finish(child, b"");
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}

// ---------------------------------------------------------------------- info and tokenize

#[test]
fn info_tells_what_a_checkpoint_is_and_needs() {
    let outcome = qwen2(&["info", &tied(), "--json"]);
    let value = outcome.json();
    assert_eq!(
        keys(&value),
        [
            "name",
            "model_type",
            "file_format",
            "parameters",
            "stored_bytes",
            "dtype",
            "formats",
            "bits_per_weight",
            "trained_context_length",
            "longest_context_length",
            "context_length",
            "weight_bytes",
            "kv_cache",
            "cache_bytes_per_token",
            "cache_bytes",
            "cache_bytes_by_type",
            "memory_bytes",
            "device",
            "devices",
            "survey",
            "instruction_set",
            "threads",
            "config",
            "version",
        ]
    );
    assert_eq!(
        (&value["name"], &value["model_type"], &value["dtype"]),
        (&"tied".into(), &"qwen2".into(), &"f32".into())
    );
    assert_eq!(value["context_length"], 128);
    assert_eq!(
        value["weight_bytes"].as_u64().unwrap(),
        4 * value["parameters"].as_u64().unwrap()
    );
    assert_eq!(
        value["cache_bytes"].as_u64().unwrap(),
        128 * value["cache_bytes_per_token"].as_u64().unwrap()
    );
    assert!(value["devices"].as_array().unwrap().contains(&"cpu".into()));
    assert_eq!(value["config"]["num_key_value_heads"], 2);
    assert_eq!(value["file_format"], "safetensors");
    assert_eq!(
        (&value["bits_per_weight"], &value["kv_cache"]),
        (&32.0.into(), &"f32".into())
    );
    let number = |key: &str| value[key].as_u64().unwrap();
    assert_eq!(number("trained_context_length"), 128);
    assert_eq!(number("longest_context_length"), 32 * 128);
    assert_eq!(
        number("memory_bytes"),
        number("weight_bytes") + number("cache_bytes")
    );
    let survey = value["survey"].as_array().unwrap();
    let row = |name: &str| survey.iter().find(|row| row["name"] == name).unwrap();
    assert_eq!(row("cpu")["found"], true);
    for row in survey.iter().filter(|row| row["compiled"] == false) {
        assert!(row["help"].as_str().unwrap().contains("feature"), "{row}");
    }

    let lines = qwen2(&["info", &tied()]);
    assert_eq!(lines.code, Some(0));
    for name in [
        "model",
        "architecture",
        "parameters",
        "format",
        "context",
        "weights",
        "cache",
        "memory",
        "device ",
        "processor",
    ] {
        assert!(
            lines.stdout.lines().any(|line| line.starts_with(name)),
            "{name}: {}",
            lines.stdout
        );
    }
}

#[test]
fn a_checkpoint_is_converted_quantized_and_measured() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let text = at("text.txt");
    std::fs::write(&text, "12 plus 30 is 42. The fox is quick.").unwrap();
    qwen2(&["convert", &demo(), &at("demo.gguf")]).success();
    qwen2(&["convert", &at("demo.gguf"), &at("demo"), "--dtype", "f32"]).success();
    qwen2(&[
        "quantize",
        &demo(),
        &at("q4.gguf"),
        "--precision",
        "q4",
        "--format",
        "gguf",
    ])
    .success();
    let info = qwen2(&["info", &at("q4.gguf"), "--json"]).json();
    let formats: Vec<_> = info["formats"].as_object().unwrap().keys().collect();
    assert_eq!(formats, ["Q4_0", "Q8_0", "f32"]);
    assert_eq!(info["file_format"], "gguf");
    assert!(info["weight_bytes"].as_u64() <= info["stored_bytes"].as_u64());
    let gptq = root()
        .join("conformance/grouped/gptq4")
        .display()
        .to_string();
    let info = qwen2(&["info", &gptq, "--json"]).json();
    let formats: Vec<_> = info["formats"].as_object().unwrap().keys().collect();
    assert_eq!(formats, ["f16", "grouped"]);
    let format = info["file_format"].as_str().unwrap();
    assert!(
        format.starts_with("safetensors, GPTQ with 4 bits in groups of"),
        "{format}"
    );
    let perplexity = |model: &str| {
        let args = [
            "perplexity",
            model,
            &text,
            "--window",
            "16",
            "--stride",
            "4",
            "--json",
        ];
        qwen2(&args).json()["perplexity"].as_f64().unwrap()
    };
    let want = perplexity(&demo());
    assert!((perplexity(&at("demo.gguf")) - want).abs() < 1e-4 * want);
    assert!((perplexity(&at("demo")) - want).abs() < 0.01 * want);
    assert_ne!(perplexity(&at("q4.gguf")), want);
    let refused = qwen2(&["quantize", &demo(), &at("x"), "--format", "gguf"]);
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("does not end in .gguf"),
        "{}",
        refused.stderr
    );
}

#[test]
fn info_needs_no_weights_and_knows_the_demo_model() {
    let directory = tempfile::tempdir().unwrap();
    let moe = root().join("conformance/models/moe/config.json");
    std::fs::copy(moe, directory.path().join("config.json")).unwrap();
    let value = qwen2(&["info", &directory.path().display().to_string(), "--json"]).json();
    assert_eq!(
        (&value["model_type"], &value["stored_bytes"]),
        (&"qwen2_moe".into(), &serde_json::Value::Null)
    );
    let config = directory.path().join("config.json").display().to_string();
    assert_eq!(qwen2(&["info", &config, "--json"]).json(), value);
    let shape = directory.path().join("my-shape.json");
    std::fs::copy(&config, &shape).unwrap();
    let shape = qwen2(&["info", &shape.display().to_string(), "--json"]).json();
    assert_eq!(
        (&shape["name"], &shape["memory_bytes"]),
        (&"my-shape".into(), &value["memory_bytes"])
    );

    let built_in = qwen2(&["info", "--json"]).json();
    let in_tree = qwen2(&["info", &demo(), "--json"]).json();
    assert_eq!(built_in, in_tree, "the program carries examples/demo-model");
}

#[test]
fn info_foretells_what_loading_takes() {
    let directory = tempfile::tempdir().unwrap();
    for precision in ["q8", "q4"] {
        let packed = directory.path().join(precision).display().to_string();
        qwen2(&["quantize", &demo(), &packed, "--precision", precision]).success();
        let packed = qwen2(&["info", &packed, "--json"]).json();
        let args = [
            "info",
            &demo(),
            "--quantize",
            precision,
            "--kv-cache",
            "q4",
            "--json",
        ];
        let foretold = qwen2(&args).json();
        assert_eq!(
            foretold["weight_bytes"], packed["weight_bytes"],
            "{precision}"
        );
        assert_eq!(foretold["kv_cache"], "q4");
        let by_type = &foretold["cache_bytes_by_type"];
        assert_eq!(foretold["cache_bytes"], by_type["q4"]);
        assert!(by_type["q4"].as_u64() < by_type["q8"].as_u64());
    }
    let q4 = directory.path().join("q4").display().to_string();
    let refused = qwen2(&["info", &q4, "--dtype", "f32"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    let refused = qwen2(&["info", &demo(), "--device", "cuda:99"]);
    assert!(
        refused.stderr.contains("device is not available"),
        "{}",
        refused.stderr
    );
}

#[test]
fn info_tells_what_an_adapter_is() {
    let adapter = root().join("conformance/adapters/plain");
    let adapter = adapter.display().to_string();
    let value = qwen2(&["info", &adapter, "--json"]).json();
    assert_eq!(
        (&value["file_format"], &value["base_model"]),
        (&"adapter".into(), &"tied".into())
    );
    assert_eq!(value["modules"], serde_json::json!(["q_proj", "v_proj"]));
    // lora_alpha is 8, r 4.
    assert_eq!(
        (&value["ranks"][0], &value["scales"][0]),
        (&4.into(), &2.0.into())
    );
    let config = qwen2(&["info", &tied(), "--json"]).json()["config"].clone();
    let size = |key: &str| config[key].as_u64().unwrap();
    let widths = size("num_attention_heads") + size("num_key_value_heads");
    let outputs = widths * size("head_dim");
    let numbers = size("num_hidden_layers") * 4 * (2 * size("hidden_size") + outputs);
    assert_eq!(value["parameters"].as_u64().unwrap(), numbers);
    assert!(qwen2(&["info", &adapter]).stdout.contains("q_proj, v_proj"));
}

#[test]
fn info_takes_a_precision_and_a_context() {
    let value = qwen2(&[
        "info",
        &tied(),
        "--dtype",
        "bf16",
        "--context-length",
        "10",
        "--json",
    ])
    .json();
    // Vectors, of which each layer has five, stay in f32.
    let size = |key: &str| value["config"][key].as_u64().unwrap();
    let (layers, hidden) = (size("num_hidden_layers"), size("hidden_size"));
    let heads = size("num_attention_heads") + 2 * size("num_key_value_heads");
    let vectors = layers * (2 * hidden + heads * size("head_dim")) + hidden;
    assert_eq!(
        value["weight_bytes"].as_u64().unwrap(),
        2 * value["parameters"].as_u64().unwrap() + 2 * vectors
    );
    assert_eq!(
        value["cache_bytes"].as_u64().unwrap(),
        10 * value["cache_bytes_per_token"].as_u64().unwrap()
    );
    let outcome = qwen2(&["info", &tied(), "--context-length", "4097"]);
    assert_eq!(
        (outcome.code, outcome.stderr.lines().next()),
        (
            Some(2),
            Some(
                "error: context is longer than the model's: context_length: 4097, the model has 128 and is stretched 32 times at most"
            )
        )
    );
}

#[test]
fn tokenize_round_trips_and_never_makes_control_tokens_of_text() {
    let tied = tied();
    let text = "héllo <|im_end|>\n你好";
    let value = qwen2(&["tokenize", &tied, text, "--json"]).json();
    assert_eq!(keys(&value), ["tokens", "pieces", "count"]);
    assert_eq!(
        value["count"].as_u64().unwrap() as usize,
        value["tokens"].as_array().unwrap().len()
    );
    assert!(
        value["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .all(|id| id.as_u64().unwrap() < 294),
        "294 to 296 are control tokens"
    );
    let ids = value["tokens"].to_string();
    let decoded = qwen2(&["tokenize", &tied, "--decode", &ids]);
    assert_eq!(decoded.stdout, format!("{text}\n"));
    let decoded = qwen2(&["tokenize", &tied, "--decode", &ids, "--json"]).json();
    assert_eq!(
        (keys(&decoded), &decoded["text"]),
        (vec!["tokens", "text", "count"], &text.into())
    );
    let lines = qwen2_with(&["tokenize", &tied, "-"], b"a b\n").stdout;
    assert_eq!(lines.lines().next(), Some("64\t\"a\""));
}

// ------------------------------------------------------------------------------ quantize

#[test]
fn a_packed_directory_is_a_model_like_others() {
    let directory = tempfile::tempdir().unwrap();
    let packed = directory.path().join("packed").display().to_string();
    let outcome = qwen2(&["quantize", &demo(), &packed, "--precision", "q8"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(
        outcome.stdout.ends_with("is packed in q8\n"),
        "{}",
        outcome.stdout
    );
    let answer = qwen2(&[
        "generate",
        &packed,
        "What is 12 plus 30?",
        "--chat",
        "--greedy",
    ]);
    assert!(answer.stdout.contains("42"), "{}", answer.stdout);
    let info = qwen2(&["info", &packed, "--json"]).json();
    assert_eq!(info["weight_bytes"], info["stored_bytes"]);
    assert_eq!(info["config"]["packed"], true);
    let again = qwen2(&["quantize", &demo(), &packed]);
    assert_eq!(again.code, Some(2));
    assert!(
        again.stderr.starts_with("error: destination exists: "),
        "{}",
        again.stderr
    );
    let wrong = qwen2(&["quantize", &demo(), &packed, "--precision", "q3"]);
    assert!(
        wrong.stderr.contains("unknown quantization"),
        "{}",
        wrong.stderr
    );
}

// --------------------------------------------------------------------------------- bench

#[test]
fn bench_reports_what_the_documentation_names() {
    let tied = tied();
    for precision in ["f32", "bf16", "q8", "q4"] {
        let args = [
            "bench",
            &tied,
            "--precision",
            precision,
            "--prompt",
            "16",
            "--new",
            "8",
            "--repeat",
            "1",
            "--threads",
            "1",
            "--json",
        ];
        let value = qwen2(&args).json();
        assert_eq!(
            keys(&value),
            [
                "model",
                "precision",
                "activations",
                "device",
                "threads",
                "prompt",
                "new",
                "repeat",
                "load_s",
                "prefill_tokens_per_s",
                "decode_tokens_per_s",
                "first_token_s",
                "weight_bytes_per_token",
                "resident_bytes",
                "prefill_peak_bytes",
                "cache_bytes",
                "bandwidth_bytes_per_s",
                "decode_bandwidth_share",
            ]
        );
        assert_eq!(
            (&value["precision"], &value["threads"]),
            (&precision.into(), &1.into())
        );
        let number = |key: &str| value[key].as_f64().unwrap();
        for key in [
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "bandwidth_bytes_per_s",
            "decode_bandwidth_share",
        ] {
            assert!(number(key) > 0.0, "{key}: {value}");
        }
    }
}

#[test]
fn bench_profiles_every_part_of_a_forward() {
    let args = [
        "bench",
        &tied(),
        "--prompt",
        "16",
        "--new",
        "8",
        "--repeat",
        "1",
    ];
    let value = qwen2(&[&args[..], &["--profile", "--json"]].concat()).json();
    for (table, unit) in [("prefill", "ms"), ("decode", "us")] {
        let parts = value["profile"][table].as_array().unwrap();
        let names: Vec<_> = parts
            .iter()
            .map(|part| part["part"].as_str().unwrap())
            .collect();
        for name in [
            "norm, q k v",
            "attention",
            "down, add",
            "norm, head",
            "sample",
            "the rest",
        ] {
            assert!(names.contains(&name), "{table}: {names:?}");
        }
        let share: f64 = parts
            .iter()
            .map(|part| part["share"].as_f64().unwrap())
            .sum();
        assert!((share - 1.0).abs() < 1e-6, "{table}: {share}");
        assert!(parts.iter().all(|part| part[unit].is_f64()), "{table}");
    }
    let lines = qwen2(&[&args[..], &["--profile"]].concat()).stdout;
    assert!(lines.contains("decode, µs a token\n"), "{lines}");
}

// -------------------------------------------------------------------------------- errors

#[test]
fn errors_are_a_line_with_a_way_out_on_stderr() {
    let tied = tied();
    for (args, code, error) in [
        (
            &["generate", "/absent", "x"][..],
            1,
            "error: no such model: /absent",
        ),
        (
            &["generate", &tied, ""],
            2,
            "error: prompt is empty: prompt",
        ),
        (
            &["generate", &tied, "x", "--temperature", "200"],
            2,
            "error: option out of range: temperature: expected 0 to 100, found 200",
        ),
        (
            &["generate", &tied, "x", "--device", "abacus"],
            2,
            "error: unknown device: device: `abacus`",
        ),
        (
            &["generate", &tied, "x", "--dtype", "f8"],
            2,
            "error: unknown dtype: dtype: f8",
        ),
        (
            &["generate", &tied, "x", "--quantize", "q3"],
            2,
            "error: unknown quantization: quantize: `q3`",
        ),
        (
            &["generate", &tied, "x", "--context-length", "4097"],
            2,
            "error: context is longer than the model's: context_length: 4097, the model has 128 and is stretched 32 times at most",
        ),
        (
            &["tokenize", &tied, "--decode", "1 x"],
            2,
            "error: not a token id: `x`",
        ),
        (&["bench", "--shape", "3b"], 2, "error: unknown shape: `3b`"),
        (
            &["bench", "--precision", "q3"],
            2,
            "error: unknown precision: `q3`",
        ),
        (&["bench", "--new", "1"], 2, "error: new is 1"),
    ] {
        let outcome = qwen2(args);
        assert_eq!(outcome.code, Some(code), "{args:?}: {}", outcome.stderr);
        assert_eq!(outcome.stdout, "", "{args:?}");
        let lines: Vec<&str> = outcome.stderr.lines().collect();
        assert_eq!(lines.first(), Some(&error), "{args:?}");
        assert!(
            lines.get(1).is_some_and(|line| line.starts_with("help: ")),
            "{args:?}: {lines:?}"
        );
    }
}

#[test]
fn a_device_that_is_not_compiled_in_names_the_feature() {
    if cfg!(feature = "cuda") {
        return;
    }
    let outcome = qwen2(&["generate", &tied(), "x", "--device", "cuda"]);
    assert_eq!(outcome.code, Some(1));
    assert!(
        outcome
            .stderr
            .starts_with("error: device is not available: cuda: not compiled in\nhelp: "),
        "{}",
        outcome.stderr
    );
}

#[test]
fn wrong_usage_is_code_2_and_help_is_text() {
    for args in [
        &[][..],
        &["sing"],
        &["generate"],
        &["generate", "a", "b", "--frobnicate"],
        &["chat", "--top-k", "x"],
        &["generate", "a", "b", "--system", "s"],
        &["chat", "--greedy", "--temperature", "1"],
    ] {
        let outcome = qwen2(args);
        assert_eq!(
            (outcome.code, outcome.stdout.as_str()),
            (Some(2), ""),
            "{args:?}"
        );
        assert!(!outcome.stderr.is_empty(), "{args:?}");
    }
    for command in ["chat", "generate", "info", "tokenize", "bench"] {
        let outcome = qwen2(&[command, "--help"]);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        assert!(outcome.stdout.contains("--json"), "{command}");
    }
    assert_eq!(
        qwen2(&["--version"]).stdout,
        format!("qwen2 {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn the_library_runs_a_command_without_taking_the_process() {
    let args = ["qwen2", "info", &tied(), "--context-length", "0"].map(Into::into);
    assert_eq!(qwen2_cli::run(args), 2);
}
