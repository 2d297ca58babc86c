//! The direction of imports: api → {checkpoint, text, generate} → model → ops → burn.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// Source without comments and without its unit tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("\n#[cfg(test)]\nmod tests").next().unwrap();
    text.lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn imports_point_downwards_only() {
    let src = common::root().join("qwen2-core/src");
    let forbidden: [(&str, &[&str]); 8] = [
        (
            "ops",
            &[
                "crate::model",
                "crate::generate",
                "crate::text",
                "crate::checkpoint",
                "crate::api",
            ],
        ),
        (
            "model",
            &[
                "crate::generate",
                "crate::text",
                "crate::checkpoint",
                "crate::api",
                "burn_flex",
                "std::fs",
                "std::path",
            ],
        ),
        (
            "text",
            &[
                "crate::model",
                "crate::generate",
                "crate::checkpoint",
                "crate::api",
                "crate::ops",
                "burn::",
            ],
        ),
        (
            "checkpoint",
            &[
                "crate::model",
                "crate::generate",
                "crate::text",
                "crate::api",
                "crate::ops",
                "burn::",
            ],
        ),
        (
            "generate",
            &["crate::checkpoint", "crate::api", "burn::tensor"],
        ),
        ("error.rs", &["crate::"]),
        (
            "config.rs",
            &[
                "crate::model",
                "crate::generate",
                "crate::text",
                "crate::checkpoint",
                "crate::api",
                "crate::ops",
            ],
        ),
        (
            "device.rs",
            &[
                "crate::model",
                "crate::generate",
                "crate::text",
                "crate::checkpoint",
                "crate::api",
            ],
        ),
    ];
    let mut wrong = Vec::new();
    for (part, names) in forbidden {
        let place = src.join(part);
        let list = if place.is_dir() {
            files(&place)
        } else {
            vec![place]
        };
        assert!(!list.is_empty(), "{part} is gone");
        for path in list {
            let code = code(&path);
            for name in names.iter().filter(|name| code.contains(**name)) {
                wrong.push(format!(
                    "{} imports {name}",
                    path.strip_prefix(&src).unwrap().display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_says_its_job_in_its_first_line() {
    for path in files(&common::root().join("qwen2-core/src")) {
        let text = fs::read_to_string(&path).unwrap();
        let first = text.lines().next().unwrap_or_default();
        assert!(
            first.starts_with("//! ") || first.starts_with("#![doc"),
            "{}",
            path.display()
        );
    }
}

#[test]
fn public_types_are_send_and_sync_where_promised() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    send::<qwen2_core::Model>();
    sync::<qwen2_core::Model>();
    send::<qwen2_core::Session>();
    send::<qwen2_core::TokenStream>();
    send::<qwen2_core::Error>();
    sync::<qwen2_core::Error>();
    assert_eq!(size_of::<qwen2_core::Error>(), size_of::<usize>());
}
