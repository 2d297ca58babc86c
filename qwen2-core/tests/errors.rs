//! Every bad checkpoint ends in its typed error, with the text that the vectors promise.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{fixture, json, root};
use qwen2_core::Model;
use serde_json::Value;

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn apply(directory: &Path, change: &Value) {
    let path = directory.join(change["file"].as_str().unwrap());
    match change["op"].as_str().unwrap() {
        "remove" => fs::remove_file(path).unwrap(),
        "truncate" => {
            let length = change["length"].as_u64().unwrap();
            fs::OpenOptions::new()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(length)
                .unwrap();
        }
        "set_json" => edit(&path, |object| {
            object[change["key"].as_str().unwrap()] = change["value"].clone();
        }),
        "remove_json" => edit(&path, |object| {
            object
                .as_object_mut()
                .unwrap()
                .remove(change["key"].as_str().unwrap());
        }),
        "write" => fs::write(path, change["text"].as_str().unwrap()).unwrap(),
        "write_base64" => fs::write(path, base64(change["base64"].as_str().unwrap())).unwrap(),
        #[cfg(unix)]
        "symlink" => {
            let _ = fs::remove_file(&path);
            std::os::unix::fs::symlink(change["target"].as_str().unwrap(), path).unwrap();
        }
        other => panic!("unknown op {other}"),
    }
}

fn edit(path: &Path, body: impl FnOnce(&mut Value)) {
    let mut object: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    body(&mut object);
    fs::write(path, serde_json::to_vec(&object).unwrap()).unwrap();
}

fn base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let sextets = text
        .bytes()
        .filter_map(|c| ALPHABET.iter().position(|&a| a == c));
    let (mut out, mut bits, mut n) = (Vec::new(), 0_u32, 0);
    for sextet in sextets {
        bits = bits << 6 | sextet as u32;
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
        }
    }
    out
}

#[test]
fn bad_checkpoints_give_the_errors_of_the_vectors() {
    let vectors = json(root().join("conformance/errors.json"));
    let cases = vectors["cases"].as_array().unwrap();
    assert!(cases.len() >= 25);
    let mut wrong = Vec::new();
    for case in cases {
        let directory = tempfile::tempdir().unwrap();
        copy(&fixture(case["base"].as_str().unwrap()), directory.path());
        for change in case["changes"].as_array().unwrap() {
            apply(directory.path(), change);
        }
        let name = case["name"].as_str().unwrap();
        let place = directory.path().to_str().unwrap();
        let fill = |key: &str| case[key].as_str().map(|text| text.replace("{dir}", place));
        match Model::load(directory.path()) {
            Ok(_) => wrong.push(format!("{name}: loaded")),
            Err(error) => {
                let got = (
                    error.kind().name().to_owned(),
                    error.to_string(),
                    error.help().map(str::to_owned),
                );
                let want = (
                    fill("kind").unwrap(),
                    fill("message").unwrap(),
                    fill("help"),
                );
                if got != want {
                    wrong.push(format!("{name}:\n  got  {got:?}\n  want {want:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
