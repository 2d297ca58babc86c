//! Both forms of the config, the published sizes, and refusals.

use serde_json::{Value, json};

use super::*;

const PATH: &str = "/m/config.json";

/// The published Qwen2 0.5B Instruct, in the form of June 2024.
fn published() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936
    })
}

fn with(changes: Value) -> Value {
    let mut config = published();
    for (key, value) in changes.as_object().expect("changes") {
        match value.as_str() {
            Some("<removed>") => config.as_object_mut().expect("object").remove(key),
            _ => config
                .as_object_mut()
                .expect("object")
                .insert(key.clone(), value.clone()),
        };
    }
    config
}

fn parse(config: &Value) -> Result<ModelConfig> {
    ModelConfig::from_json(config.to_string().as_bytes(), Path::new(PATH))
}

fn refusal(changes: Value) -> (ErrorKind, String) {
    let error = parse(&with(changes)).expect_err("refused");
    (error.kind(), error.to_string())
}

#[test]
fn both_forms_of_the_config_read_the_same() {
    let june_2024 = parse(&published()).expect("2024");
    let transformers_5 = parse(&with(json!({
        "rope_theta": "<removed>", "torch_dtype": "<removed>", "sliding_window": null,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "layer_types": vec!["full_attention"; 24], "dtype": "bfloat16"
    })))
    .expect("5");
    assert_eq!(june_2024, transformers_5);
    assert_eq!(june_2024.head_dim, 64);
    assert_eq!(june_2024.rope_theta, 1e6);
    assert_eq!(june_2024.dtype, Some(DType::BF16));
    assert_eq!(june_2024.eos_token_ids, [151_645]);
    assert_eq!(june_2024.context_length(), 32_768);
    assert_eq!(june_2024.layer_sliding_windows, vec![None; 24]);
}

#[test]
fn published_sizes_have_the_published_parameter_counts_and_cache_sizes() {
    // hidden, intermediate, layers, heads, kv heads, vocab, tied, parameters, cache bytes per token
    let sizes = [
        (896, 4864, 24, 14, 2, 151_936, true, 494_032_768_u64, 12_288),
        (1536, 8960, 28, 12, 2, 151_936, true, 1_543_714_304, 28_672),
        (
            3584,
            18_944,
            28,
            28,
            4,
            152_064,
            false,
            7_615_616_512,
            57_344,
        ),
        (
            8192,
            29_568,
            80,
            64,
            8,
            152_064,
            false,
            72_706_203_648,
            327_680,
        ),
    ];
    for (hidden, intermediate, layers, heads, kv, vocab, tied, parameters, cache) in sizes {
        let config = parse(&with(json!({
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
            "tie_word_embeddings": tied
        })))
        .expect("config");
        assert_eq!(config.parameter_count(), parameters);
        assert_eq!(config.kv_bytes_per_token(DType::BF16), cache);
    }
}

fn mixture() -> Value {
    json!({
        "model_type": "qwen2_moe", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": false, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480,
        "norm_topk_prob": false, "decoder_sparse_step": 1
    })
}

#[test]
fn the_mixture_is_read_whole() {
    let config = parse(&with(mixture())).expect("57B");
    assert_eq!(config.parameter_count(), 57_408_658_944);
    let moe = config.moe.as_ref().expect("experts");
    assert!(moe.is_sparse(0) && !moe.norm_topk_prob);
}

#[test]
fn yarn_is_read_from_both_keys_and_stretches_the_context() {
    let yarn = json!({"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"});
    let config = parse(&with(json!({ "rope_scaling": yarn }))).expect("yarn");
    assert_eq!(config.context_length(), 131_072);
    assert_eq!(config.rope_theta, 1e6);
    let parameters = json!({
        "factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn",
        "rope_theta": 1e6
    });
    let new = parse(&with(
        json!({"rope_parameters": parameters, "rope_theta": "<removed>"}),
    ));
    assert_eq!(new.expect("yarn"), config);
    assert_eq!(
        config.rope_scaling,
        Some(RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32_768,
            attention_factor: None,
            beta_fast: 32.0,
            beta_slow: 1.0,
            extrapolation_factor: 1.0,
            truncate: true,
        })
    );
}

#[test]
fn keys_of_vllm_and_transformers_agree_on_yarns_attention_or_are_refused() {
    let factor = |changes: Value| -> Result<Option<f64>> {
        let mut yarn = json!({"type": "yarn", "factor": 4.0});
        for (key, value) in changes.as_object().expect("changes") {
            yarn[key] = value.clone();
        }
        match parse(&with(json!({ "rope_scaling": yarn })))?.rope_scaling {
            Some(RopeScaling::Yarn {
                attention_factor, ..
            }) => Ok(attention_factor),
            None => panic!("no yarn"),
        }
    };
    let own = 0.1 * 4_f64.ln() + 1.0;
    assert_eq!(factor(json!({})).expect("none"), None);
    assert_eq!(
        factor(json!({"attn_factor": 2.0})).expect("vLLM"),
        Some(2.0 * own)
    );
    assert_eq!(
        factor(json!({"attn_factor": 2.0, "attention_factor": 2.0 * own})).expect("both"),
        Some(2.0 * own)
    );
    assert_eq!(
        factor(json!({"apply_yarn_scaling": true})).expect("as by default"),
        None
    );
    assert_eq!(
        factor(json!({"apply_yarn_scaling": false})).expect("off"),
        Some(1.0)
    );
    for (changes, key) in [
        (
            json!({"attn_factor": 1.0, "attention_factor": 1.5}),
            "attn_factor",
        ),
        (
            json!({"attn_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 1.0}),
            "attn_factor",
        ),
        (
            json!({"apply_yarn_scaling": false, "attention_factor": 1.5}),
            "apply_yarn_scaling",
        ),
        (json!({"extrapolation_factor": 0.0}), "extrapolation_factor"),
        (json!({"extrapolation_factor": "1"}), "extrapolation_factor"),
        (json!({"attn_factor": -1.0}), "attn_factor"),
        (json!({"truncate": 0}), "truncate"),
    ] {
        let error = factor(changes.clone()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{changes}: {error}");
        let key = format!("rope_scaling.{key}");
        assert_eq!(error.key(), Some(key.as_str()), "{changes}: {error}");
    }
}

#[test]
fn the_rope_base_inside_the_table_wins_over_the_one_outside() {
    let table = json!({"rope_type": "default", "rope_theta": 5.0});
    assert_eq!(
        parse(&with(json!({ "rope_parameters": table })))
            .expect("config")
            .rope_theta,
        5.0
    );
    let none = parse(&with(json!({"rope_theta": "<removed>"}))).expect("config");
    assert_eq!(none.rope_theta, 10_000.0);
}

#[test]
fn layers_from_max_window_layers_on_slide() {
    let windows = |changes: Value| {
        let mut all = json!({
            "num_hidden_layers": 3, "use_sliding_window": true, "sliding_window": 8,
            "max_window_layers": 1
        });
        for (key, value) in changes.as_object().expect("changes") {
            all[key] = value.clone();
        }
        parse(&with(all)).map(|config| config.layer_sliding_windows)
    };
    assert_eq!(
        windows(json!({})).expect("windows"),
        [None, Some(8), Some(8)]
    );
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let by_type = windows(json!({ "layer_types": types })).expect("windows");
    assert_eq!(by_type, [Some(8), None, Some(8)]);
    let off = windows(json!({"use_sliding_window": false})).expect("windows");
    assert_eq!(off, [None; 3]);
    let null = windows(json!({"sliding_window": null})).expect("windows");
    assert_eq!(null, [None; 3]);
    let error = windows(json!({"use_sliding_window": false, "layer_types": types}));
    assert_eq!(error.expect_err("no window").key(), Some("layer_types"));
    let error = windows(json!({"layer_types": ["full_attention"]}));
    assert!(
        error
            .expect_err("too few")
            .to_string()
            .ends_with("1 entries for num_hidden_layers 3")
    );
}

#[test]
fn every_illegal_value_is_an_invalid_file_that_names_its_key() {
    let cases = [
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (
            json!({"num_key_value_heads": "<removed>"}),
            "num_key_value_heads",
        ),
        (
            json!({"num_hidden_layers": 1_000_000_000}),
            "num_hidden_layers",
        ),
        (json!({"num_hidden_layers": -1}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 2.5}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 1e300}), "num_hidden_layers"),
        (json!({"hidden_size": "896"}), "hidden_size"),
        (json!({"hidden_size": "<removed>"}), "hidden_size"),
        (json!({"hidden_size": null}), "hidden_size"),
        (json!({"hidden_size": 897}), "hidden_size"),
        (json!({"hidden_size": 14 * 63}), "hidden_size"),
        (json!({"head_dim": 63}), "head_dim"),
        (json!({"intermediate_size": 0}), "intermediate_size"),
        (json!({"vocab_size": 0}), "vocab_size"),
        (json!({"vocab_size": u64::MAX}), "vocab_size"),
        (
            json!({"max_position_embeddings": 0}),
            "max_position_embeddings",
        ),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
        (json!({"rms_norm_eps": "1e-6"}), "rms_norm_eps"),
        (json!({"rope_theta": -1.0}), "rope_theta"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings"),
        (json!({"eos_token_id": [1, -2]}), "eos_token_id"),
        (json!({"model_type": "<removed>"}), "model_type"),
        (json!({"rope_scaling": []}), "rope_scaling"),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 0.5}}),
            "rope_scaling.factor",
        ),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}}),
            "rope_scaling.beta_fast",
        ),
    ];
    for (changes, key) in cases {
        let error = parse(&with(changes.clone())).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{changes}: {error}");
        assert_eq!(error.key(), Some(key), "{error}");
        assert_eq!(error.path(), Some(Path::new(PATH)));
    }
}

#[test]
fn what_is_known_but_not_done_is_unsupported_and_named() {
    let cases = [
        (
            json!({"model_type": "llama"}),
            "model type is not supported: /m/config.json: model_type: llama",
        ),
        (
            json!({"hidden_act": "gelu"}),
            "activation is not supported: /m/config.json: hidden_act: gelu",
        ),
        (
            json!({"rope_scaling": {"type": "llama3", "factor": 2.0}}),
            "rope type is not supported: /m/config.json: rope_scaling.type: llama3",
        ),
        (
            json!({"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}),
            "quantized checkpoint is not supported: /m/config.json: quantization_config: bitsandbytes",
        ),
        (
            json!({"torch_dtype": "float64"}),
            "dtype is not supported: /m/config.json: torch_dtype: float64",
        ),
        (
            json!({"layer_types": vec!["chunked_attention"; 24]}),
            "layer type is not supported: /m/config.json: layer_types: chunked_attention",
        ),
    ];
    for (changes, message) in cases {
        assert_eq!(
            refusal(changes),
            (ErrorKind::Unsupported, message.to_owned())
        );
    }
}

#[test]
fn text_that_is_not_a_json_object_says_where() {
    let message = |bytes: &[u8]| {
        ModelConfig::from_json(bytes, Path::new(PATH))
            .expect_err("refused")
            .to_string()
    };
    assert!(
        message(b"{\"a\": 1,\n \"b\" 2}")
            .contains("file is not valid JSON: /m/config.json: line 2, column 6: ")
    );
    assert_eq!(
        message(b"{\"a\xff\": 1}"),
        "file is not UTF-8: /m/config.json: byte 3"
    );
    assert_eq!(
        message(b"[1]"),
        "file is not a JSON object: /m/config.json: found [1]"
    );
    assert!(message(b"").starts_with("file is not valid JSON"));
    assert!(message(b"{\"rms_norm_eps\": NaN}").starts_with("file is not valid JSON"));
}

#[test]
fn generation_config_takes_one_eos_or_a_list_and_keeps_absent_keys_absent() {
    let read = |text: &str| {
        GenerationConfig::from_json(text.as_bytes(), Path::new("/m/generation_config.json"))
    };
    let config = read(r#"{"eos_token_id": [151645, 151643], "temperature": 0.7, "top_k": 20}"#)
        .expect("list");
    assert_eq!(config.eos_token_ids, [151_645, 151_643]);
    assert_eq!(
        (config.temperature, config.top_k, config.top_p),
        (Some(0.7), Some(20), None)
    );
    assert_eq!(
        read(r#"{"eos_token_id": 7}"#).expect("one").eos_token_ids,
        [7]
    );
    assert_eq!(read("{}").expect("empty"), GenerationConfig::default());
    for text in [
        r#"{"top_p": 1.5}"#,
        r#"{"temperature": -1}"#,
        r#"{"repetition_penalty": 0}"#,
    ] {
        assert_eq!(
            read(text).expect_err("refused").kind(),
            ErrorKind::InvalidFile
        );
    }
}

#[test]
fn the_default_is_a_config_that_would_be_read() {
    let text = serde_json::to_string(&ModelConfig::default()).expect("json");
    let read = ModelConfig::from_json(text.as_bytes(), Path::new(PATH)).expect("config");
    assert_eq!(read, ModelConfig::default());
}

#[test]
fn dtypes_are_known_by_our_names_and_by_torchs() {
    assert_eq!("bf16".parse::<DType>().expect("ours"), DType::BF16);
    assert_eq!("float16".parse::<DType>().expect("torch"), DType::F16);
    let error = "int8".parse::<DType>().expect_err("unknown");
    assert_eq!(error.to_string(), "unknown dtype: dtype: int8");
}

proptest::proptest! {
    /// No bytes make the reader panic, and what it accepts has sizes that can be multiplied.
    #[test]
    fn damaged_configs_never_panic(at in 0usize..600, byte: u8) {
        let mut text = published().to_string().into_bytes();
        let at = at % text.len();
        text[at] = byte;
        if let Ok(config) = ModelConfig::from_json(&text, Path::new(PATH)) {
            proptest::prop_assert!(config.parameter_count() > 0);
            proptest::prop_assert!(config.context_length() > 0);
        }
    }
}
