//! ModelScope's hub and its cache.

use std::fs;

use crate::server::{AtEnd, COMMIT, Hub, ID, WEIGHTS, files_of, fixture};

const MODEL_SCOPE: &str = "modelscope:org/tiny-model";

#[test]
fn a_model_of_modelscope_is_fetched_once_into_its_own_cache() {
    let hub = Hub::start("tied");
    let first = hub.load_id(MODEL_SCOPE, &[]);
    assert_eq!(first["hidden_size"], 32, "{first}");
    let snapshot = "modelscope/models/org--tiny-model/snapshots/master";
    let snapshot = hub.home.path().join(snapshot);
    for (name, bytes) in hub.files() {
        assert_eq!(fs::read(snapshot.join(&name)).expect("read"), bytes);
    }
    assert!(!hub.home.path().join("hub").exists());
    let requests = hub.n_requests();
    assert_eq!(hub.load_id(MODEL_SCOPE, &[])["hidden_size"], 32);
    let offline = [("QWEN2_OFFLINE", "1")];
    assert_eq!(hub.load_id(MODEL_SCOPE, &offline)["hidden_size"], 32);
    // The variable says the same for ids that name no hub.
    let by_variable = [("QWEN2_HUB", "modelscope")];
    assert_eq!(hub.load(&by_variable)["hidden_size"], 32);
    assert_eq!(hub.n_requests(), requests);
    let outcome = hub.load(&[("QWEN2_HUB", "elsewhere")]);
    assert_eq!(outcome["kind"], "invalid_argument", "{outcome}");
}

#[test]
fn a_model_in_shards_is_found_through_its_index() {
    let hub = Hub::start("bf16_shards");
    assert_eq!(hub.load_id(MODEL_SCOPE, &[])["hidden_size"], 32);
}

#[test]
fn refusals_of_modelscope_are_typed() {
    let hub = Hub::start("tied");
    // Some of its errors come with status 200.
    let outcome = hub.load_id(&format!("{MODEL_SCOPE}@v9"), &[]);
    assert_eq!(outcome["kind"], "not_found", "{outcome}");
    let message = outcome["message"].as_str().expect("message");
    assert!(message.ends_with("revision not found"), "{message}");
    for (status, kind) in [
        (404, "not_found"),
        (403, "permission_denied"),
        (500, "network"),
    ] {
        hub.state().refuse = Some(status);
        let outcome = hub.load_id(MODEL_SCOPE, &[]);
        assert_eq!(outcome["kind"], kind, "{status}: {outcome}");
    }
    hub.state().refuse = Some(401);
    let outcome = hub.load_id(MODEL_SCOPE, &[]);
    let help = outcome["help"].as_str().expect("help");
    assert!(help.contains("MODELSCOPE_API_TOKEN"), "{help}");
    let outcome = hub.load_id(MODEL_SCOPE, &[("QWEN2_OFFLINE", "1")]);
    assert_eq!(outcome["kind"], "not_found", "{outcome}");
}

#[test]
fn the_token_is_sent_in_both_forms_that_modelscope_knows() {
    let hub = Hub::start("tied");
    let token = [("MODELSCOPE_API_TOKEN", "secret"), ("HF_TOKEN", "other")];
    assert_eq!(hub.load_id(MODEL_SCOPE, &token)["hidden_size"], 32);
    let tokens = hub.state().tokens.clone();
    let sent = |wanted: &str| tokens.iter().any(|(_, token)| token == wanted);
    assert!(sent("Bearer secret") && sent("m_session_id=secret"));
    assert!(!sent("Bearer other"));
    assert!(!tokens.iter().any(|(path, _)| path.starts_with("/cdn")));
}

#[test]
fn a_cut_download_resumes_and_a_damaged_one_is_refused() {
    let hub = Hub::start("tied");
    let id = [("QWEN2_TEST_ID", MODEL_SCOPE)];
    hub.state().stop_at = Some((50_000, AtEnd::Close));
    assert_eq!(hub.load(&id)["kind"], "network");
    hub.assert_that_no_file_is_wrong();
    hub.resumes_from(50_000, &id);

    let hub = Hub::start("tied");
    hub.state().damage = true;
    let outcome = hub.load(&id);
    let message = outcome["message"].as_str().expect("message");
    assert!(message.starts_with("download is damaged"), "{message}");
    hub.assert_that_no_file_is_wrong();
}

#[test]
fn a_branch_that_moved_on_between_two_halves_leaves_no_mixture() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Close));
    assert_eq!(hub.load_id(MODEL_SCOPE, &[])["kind"], "network");
    {
        let mut state = hub.state();
        state.stop_at = None;
        // Of the same length, and other weights.
        let config = state.files.get_mut("generation_config.json").expect("file");
        let last = config.len() - 1;
        config[last] = b' ';
        config[last - 1] = b'}';
        let weights = state.files.get_mut(WEIGHTS).expect("weights");
        let last = weights.len() - 1;
        weights[last] ^= 1;
        weights[last - 70_000] ^= 1;
    }
    assert_eq!(hub.load_id(MODEL_SCOPE, &[])["hidden_size"], 32);
    hub.assert_that_no_file_is_wrong();
}

#[test]
fn models_of_earlier_versions_of_its_package_are_used_where_they_are() {
    for folder in [
        "models/org/tiny-model",
        "hub/org/tiny-model",
        "org/tiny-model",
    ] {
        let hub = Hub::start("tied");
        let old = hub.home.path().join("modelscope").join(folder);
        fs::create_dir_all(&old).expect("mkdir");
        for (name, bytes) in hub.files() {
            fs::write(old.join(name), bytes).expect("write");
        }
        let outcome = hub.load_id(MODEL_SCOPE, &[]);
        assert_eq!(outcome["hidden_size"], 32, "{folder}: {outcome}");
        assert_eq!(hub.n_requests(), 0, "{folder}");
        let other = format!("modelscope:{ID}@{COMMIT}");
        let offline = [("QWEN2_OFFLINE", "1")];
        assert_eq!(hub.load_id(&other, &offline)["kind"], "not_found");
    }
}

#[test]
fn an_adapter_is_fetched_by_its_id_from_either_hub() {
    let files = files_of(&fixture("adapters/plain"), "reference.json");
    let hub = Hub::with(files);
    for id in [ID, MODEL_SCOPE] {
        let before = hub.n_requests();
        let outcome = hub.load(&[("QWEN2_TEST_ADAPTER", id)]);
        assert_eq!(outcome["hidden_size"], 32, "{outcome}");
        assert!(hub.n_requests() > before);
        let offline = [("QWEN2_TEST_ADAPTER", id), ("QWEN2_OFFLINE", "1")];
        assert_eq!(hub.load(&offline)["hidden_size"], 32);
    }
    let outcome = hub.load(&[("QWEN2_TEST_ADAPTER", "org/other")]);
    assert_eq!(outcome["kind"], "not_found", "{outcome}");
}
