//! `qwen2 info`, `convert` and `tokenize`: what a checkpoint is and needs.

use super::*;

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
