//! `include/qwen2.h` is what cbindgen makes of the source.
#![allow(clippy::unwrap_used)]

use std::path::Path;

/// In the order of the header.
const SOURCES: [&str; 21] = [
    "version",
    "error",
    "load",
    "model",
    "adapter",
    "inspect",
    "embed",
    "prompt",
    "options",
    "processor",
    "generation",
    "stream",
    "engine",
    "request",
    "logprobs",
    "session",
    "tokenizer",
    "tools",
    "calls",
    "values",
    "log",
];

#[test]
fn header_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let builder = SOURCES.iter().fold(
        cbindgen::Builder::new().with_config(config),
        |builder, name| builder.with_src(root.join("src").join(format!("{name}.rs"))),
    );
    let mut rendered = Vec::new();
    builder.generate().unwrap().write(&mut rendered);
    // A macro is safe in every expression with its parentheses only; cbindgen drops them.
    let rendered = String::from_utf8(rendered)
        .unwrap()
        .replace("QWEN2_DONE -1", "QWEN2_DONE (-1)")
        .replace("QWEN2_PENDING -2", "QWEN2_PENDING (-2)");
    let path = root.join("../include/qwen2.h");
    if std::env::var_os("QWEN2_BLESS").is_some() {
        std::fs::write(&path, &rendered).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == rendered,
        "include/qwen2.h differs: QWEN2_BLESS=1 cargo test -p qwen2-capi --test header"
    );
}

#[test]
fn every_source_file_is_in_the_header() {
    let source = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    for file in source {
        let name = file
            .unwrap()
            .path()
            .file_stem()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let known =
            SOURCES.contains(&&*name) || ["lib", "fence", "courier", "last"].contains(&&*name);
        assert!(known, "{name}.rs is not listed here");
    }
}
