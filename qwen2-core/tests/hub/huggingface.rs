//! The Hugging Face hub and its cache.

use std::fs;

use serde_json::json;

use crate::server::{COMMIT, Hub, ID, WEIGHTS};

#[test]
fn the_second_load_and_an_offline_load_make_no_request() {
    let hub = Hub::start("tied");
    let first = hub.load(&[]);
    assert_eq!(first["hidden_size"], 32, "{first}");
    let progress = first["progress"].as_array().expect("progress");
    let last = progress.last().expect("some progress");
    assert_eq!(last[0], last[1]);
    // The download ends at its total, which is the size of the files, before the weights are read.
    let size: u64 = hub.files().values().map(|bytes| bytes.len() as u64).sum();
    assert!(progress.contains(&json!([size, size])), "{size}: {first}");

    let requests = hub.n_requests();
    assert!(requests > 0);
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    for offline in ["HF_HUB_OFFLINE", "QWEN2_OFFLINE"] {
        assert_eq!(hub.load(&[(offline, "1")])["hidden_size"], 32);
    }
    assert_eq!(hub.n_requests(), requests);
}

#[test]
fn the_cache_is_laid_out_as_huggingface_hub_has_it() {
    let hub = Hub::start("tied");
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    let model = hub.home.path().join("hub/models--org--tiny-model");
    let read = |path: &str| fs::read_to_string(model.join(path)).expect("read");
    assert_eq!(read("refs/main"), COMMIT);
    let snapshot = model.join("snapshots").join(COMMIT);
    for (name, bytes) in hub.files() {
        assert_eq!(fs::read(snapshot.join(&name)).expect("read"), bytes);
        #[cfg(unix)]
        {
            let target = fs::read_link(snapshot.join(&name)).expect("link");
            let is_blob = target.starts_with("../../blobs");
            assert!(is_blob, "{}", target.display());
        }
    }
    let absent = model.join(".no_exist").join(COMMIT);
    assert!(absent.join("chat_template.jinja").is_file());
}

#[test]
fn a_model_in_shards_is_found_through_its_index() {
    let hub = Hub::start("bf16_shards");
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    assert_eq!(hub.load(&[("HF_HUB_OFFLINE", "1")])["hidden_size"], 32);
}

#[test]
fn a_revision_is_kept_beside_the_branch_and_an_unknown_one_is_not_found() {
    let hub = Hub::start("tied");
    hub.state().revisions = vec!["refs%2Fpr%2F1".to_owned()];
    let id = format!("{ID}@refs/pr/1");
    assert_eq!(hub.load_id(&id, &[])["hidden_size"], 32);
    let requests = hub.n_requests();
    for id in [id, format!("hf:{ID}@{COMMIT}")] {
        assert_eq!(hub.load_id(&id, &[])["hidden_size"], 32, "{id}");
    }
    assert_eq!(hub.n_requests(), requests);
    let outcome = hub.load(&[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(outcome["kind"], "not_found", "main is another revision");
    let outcome = hub.load_id(&format!("{ID}@v9"), &[]);
    assert_eq!(outcome["kind"], "not_found", "{outcome}");
    let help = outcome["help"].as_str().expect("help");
    assert!(help.contains("revision"), "{help}");
}

#[test]
fn a_mirror_that_lists_only_names_is_asked_for_the_sizes() {
    let hub = Hub::start("tied");
    hub.state().names_only = true;
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    hub.assert_that_no_file_is_wrong();
    assert_eq!(hub.load(&[("HF_HUB_OFFLINE", "1")])["hidden_size"], 32);
}

#[test]
fn an_empty_cache_in_offline_mode_says_so() {
    let hub = Hub::start("tied");
    for variable in ["HF_HUB_OFFLINE", "QWEN2_OFFLINE"] {
        let outcome = hub.load(&[(variable, "1")]);
        assert_eq!(outcome["kind"], "not_found");
        let message = outcome["message"].as_str().expect("message");
        let says = format!("{ID}: {variable} is set and the cache lacks config.json");
        assert!(message.contains(&says), "{message}");
    }
    assert_eq!(hub.n_requests(), 0);
}

#[test]
fn refusals_of_the_hub_are_typed() {
    let hub = Hub::start("tied");
    for (status, kind) in [
        (404, "not_found"),
        (401, "permission_denied"),
        (403, "permission_denied"),
        (500, "network"),
    ] {
        hub.state().refuse = Some(status);
        let outcome = hub.load(&[]);
        assert_eq!(outcome["kind"], kind, "{status}: {outcome}");
        assert!(outcome["help"].is_string());
    }
    hub.state().refuse = None;
    let nowhere = ("HF_ENDPOINT", "http://127.0.0.1:9");
    assert_eq!(hub.load(&[nowhere])["kind"], "network");
    assert_eq!(hub.load(&[])["hidden_size"], 32);
}

#[test]
fn names_from_the_server_do_not_become_paths() {
    let hub = Hub::start("tied");
    hub.state().etag = Some("../../../../escaped".to_owned());
    for names_only in [false, true] {
        hub.state().names_only = names_only;
        let outcome = hub.load(&[]);
        assert_eq!(outcome["kind"], "network", "{outcome}");
        let message = outcome["message"].as_str().expect("message");
        assert!(message.contains("ETag ../"), "{outcome}");
    }
}

#[test]
fn the_token_is_sent_to_the_hub() {
    let hub = Hub::start("tied");
    assert_eq!(hub.load(&[("HF_TOKEN", "hf_secret")])["hidden_size"], 32);
    let tokens = hub.state().tokens.clone();
    let sent = |(_, token): &(String, String)| token == "Bearer hf_secret";
    assert!(!tokens.is_empty() && tokens.iter().all(sent), "{tokens:?}");
    // Storage is asked without it.
    let at_storage = |(path, _): &(String, String)| path.starts_with("/cdn");
    assert!(!tokens.iter().any(at_storage), "{tokens:?}");
    assert_eq!(hub.n_downloads(WEIGHTS), 1);
}
