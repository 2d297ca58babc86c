//! Repositories of GGUF files, on both hubs.

use std::collections::BTreeMap;

use crate::server::{Hub, files_of, fixture};

/// One file and one in two parts.
fn repository() -> BTreeMap<String, Vec<u8>> {
    let files = files_of(&fixture("gguf"), "");
    let renamed = files.into_iter().map(|(name, bytes)| {
        let name = name.replace("moe", "tiny-q8_0");
        (name.replace("bf16_shards", "bf16/tiny-bf16"), bytes)
    });
    let mut files: BTreeMap<_, _> = renamed.collect();
    files.insert("README.md".to_owned(), b"#".to_vec());
    files.insert("config.json".to_owned(), b"{}".to_vec());
    files
}

#[test]
fn the_file_that_is_asked_for_is_fetched_alone_and_once() {
    for prefix in ["", "modelscope:"] {
        for (file, n_files) in [
            ("Q8_0", 1),
            ("BF16", 2),
            ("tiny-q8_0.gguf", 1),
            ("bf16/*", 2),
        ] {
            let hub = Hub::with(repository());
            let id = format!("{prefix}org/tiny-model:{file}");
            let outcome = hub.load_id(&id, &[]);
            assert!(outcome["hidden_size"].is_number(), "{id}: {outcome}");
            let requests = hub.state().requests.clone();
            let fetched = requests.iter().filter(|path| path.starts_with("/cdn/"));
            assert_eq!(fetched.count(), n_files, "{requests:?}");
            for environment in [&[][..], &[("QWEN2_OFFLINE", "1")]] {
                let outcome = hub.load_id(&id, environment);
                assert!(outcome["hidden_size"].is_number(), "{id}: {outcome}");
            }
            assert_eq!(hub.n_requests(), requests.len(), "{id}");
            let outcome = hub.load_id(
                &format!("{prefix}org/tiny-model:Q4_0"),
                &[("QWEN2_OFFLINE", "1")],
            );
            assert_eq!(outcome["kind"], "not_found");
        }
    }
}

#[test]
fn a_choice_that_is_open_lists_what_there_is() {
    let hub = Hub::with(repository());
    for (id, kind) in [
        ("org/tiny-model", "invalid_argument"),
        ("org/tiny-model:*tiny*", "invalid_argument"),
        ("org/tiny-model:Q4_K_M", "not_found"),
    ] {
        let outcome = hub.load_id(id, &[]);
        assert_eq!(outcome["kind"], kind, "{id}: {outcome}");
        let message = outcome["message"].as_str().expect("message");
        let listed = "bf16/tiny-bf16.gguf, tiny-q8_0.gguf";
        assert!(message.ends_with(listed), "{message}");
        let help = outcome["help"].as_str().expect("help");
        assert!(help.contains("org/tiny-model:"), "{help}");
    }
}

#[test]
fn the_only_gguf_file_needs_no_name() {
    let mut files = repository();
    files.remove("tiny-q8_0.gguf");
    let hub = Hub::with(files);
    for environment in [&[][..], &[("QWEN2_OFFLINE", "1")]] {
        let outcome = hub.load_id("org/tiny-model", environment);
        assert_eq!(outcome["hidden_size"], 32, "{outcome}");
    }
}

#[test]
fn one_part_of_two_is_not_taken_for_the_model() {
    let hub = Hub::with(repository());
    let id = "org/tiny-model:BF16";
    assert_eq!(hub.load_id(id, &[])["hidden_size"], 32);
    let second = crate::server::all_files(hub.home.path()).into_iter();
    let second: Vec<_> = second
        .filter(|path| path.to_string_lossy().ends_with("00002-of-00002.gguf"))
        .collect();
    assert_eq!(second.len(), 1);
    std::fs::remove_file(&second[0]).expect("remove");
    let outcome = hub.load_id(id, &[("QWEN2_OFFLINE", "1")]);
    assert_eq!(outcome["kind"], "not_found", "{outcome}");
    assert_eq!(hub.load_id(id, &[])["hidden_size"], 32);
}
