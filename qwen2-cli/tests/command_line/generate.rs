//! `qwen2 generate`: text to stdout, the rate to stderr, options as the library has them.

use super::*;

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

#[test]
fn a_context_that_is_stretched_is_said_on_stderr() {
    let model = |name: &str| {
        let path = root().join("conformance/models").join(name);
        path.display().to_string()
    };
    let said = |model: &str, options: &[&str]| {
        let args = ["generate", model, "hi", "--max-new-tokens", "1", "--json"];
        let outcome = qwen2(&[&args, options].concat());
        outcome.json(); // stdout is as without
        outcome.stderr
    };
    let longer = ["--context-length", "320"];
    let by = |by: &'static str| [&longer[..], &["--long-context", by]].concat();
    let yarn = "context of 320 tokens: YaRN, factor 2.5 over the 128 of training, for ";
    assert_eq!(
        said(&tied(), &longer),
        format!("{yarn}short texts as well\n")
    );
    let when_needed = said(&tied(), &by("yarn_when_needed"));
    assert_eq!(when_needed, format!("{yarn}longer texts only\n"));
    let chunks = "dual chunk attention, chunks of 88, factor 2.5 over the 128 of training\n";
    assert_eq!(
        said(&tied(), &by("dual_chunk")),
        format!("context of 320 tokens: {chunks}")
    );
    // What a checkpoint asks for by itself is said as well.
    assert_eq!(
        said(&model("yarn"), &[]),
        "context of 80 tokens: YaRN, factor 4 over the 20 of training, for short texts as well\n"
    );
    assert_eq!(
        said(&model("dual_chunk"), &[]),
        "context of 128 tokens: dual chunk attention, chunks of 18, factor 3.2 over the 40 of training\n"
    );
    assert_eq!(said(&tied(), &["--context-length", "128"]), "");
}
