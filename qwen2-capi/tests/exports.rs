//! The library lets out our own functions, all of them, and nothing else.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::{library, run, text};

#[test]
fn exported_symbols_are_those_of_the_abi() {
    let output = run(Command::new("nm")
        .args(["-D", "--defined-only", "--format=posix"])
        .arg(library()));
    let mut symbols: Vec<String> = text(&output.stdout)
        .lines()
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    symbols.sort_unstable();
    let foreign: Vec<_> = symbols
        .iter()
        .filter(|name| !name.starts_with("qwen2_"))
        .collect();
    assert!(
        foreign.is_empty(),
        "foreign symbols leave the library: {foreign:?}"
    );
    let list = symbols.join("\n") + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(format!("abi/qwen2-{}.txt", qwen2::QWEN2_ABI_VERSION));
    if std::env::var_os("QWEN2_BLESS").is_some() {
        std::fs::write(&path, &list).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == list,
        "exports changed; a symbol may be added (QWEN2_BLESS=1), none may go without a new ABI version:\n{list}"
    );
}

#[test]
fn every_export_is_in_the_header() {
    let header = std::fs::read_to_string(common::root().join("include/qwen2.h")).unwrap();
    let output = run(Command::new("nm")
        .args(["-D", "--defined-only", "--format=posix"])
        .arg(library()));
    for line in text(&output.stdout).lines() {
        let name = line.split(' ').next().unwrap();
        assert!(
            header.contains(&format!("{name}(")),
            "{name} is not in qwen2.h"
        );
    }
}

#[test]
fn soname_carries_the_abi_version() {
    let output = run(Command::new("readelf").arg("-d").arg(library()));
    let soname = format!("[libqwen2.so.{}]", qwen2::QWEN2_ABI_VERSION);
    assert!(
        text(&output.stdout).contains(&soname),
        "{}",
        text(&output.stdout)
    );
}
