//! Errors and usage: a line with a way out, and the exit code.

use super::*;

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
