//! Whole checkpoints: the fixtures of `conformance/`, and every way to damage one.

use std::fs;

use serde_json::Value;

use super::*;

fn conformance() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance")
}

fn open(directory: &Path) -> Result<Checkpoint> {
    Checkpoint::open(&Source::from(directory), &mut |_| ControlFlow::Continue(()))
}

/// What loading does before it looks at numbers.
fn load(directory: &Path) -> Result<bool> {
    let checkpoint = open(directory)?;
    names::audit(&checkpoint)
}

fn copy(base: &str, to: &Path) {
    for file in fs::read_dir(conformance().join("models").join(base)).expect("base") {
        let file = file.expect("entry");
        if file.file_name() != "reference.json" {
            fs::copy(file.path(), to.join(file.file_name())).expect("copy");
        }
    }
}

#[test]
fn every_fixture_opens_and_has_its_tensors() {
    for fixture in fs::read_dir(conformance().join("models")).expect("models") {
        let path = fixture.expect("entry").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("name")
            .to_owned();
        let checkpoint = open(&path).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let tied = names::audit(&checkpoint).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let has_head = checkpoint.names().any(|name| name == "lm_head.weight");
        assert_eq!(tied, !has_head, "{name}");
    }
}

#[test]
fn tensors_are_slices_of_the_map_and_add_up_to_the_total() {
    let checkpoint = open(&conformance().join("models/bf16_shards")).expect("open");
    assert_eq!(checkpoint.dtype(), Some(DType::BF16));
    let mut total = 0;
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name).expect("tensor");
        let numbers: usize = tensor.shape.iter().product();
        assert_eq!(
            tensor.bytes.len(),
            numbers * tensor.encoding.size_in_bytes()
        );
        let again = checkpoint.tensor(name).expect("tensor");
        assert_eq!(
            tensor.bytes.as_ptr(),
            again.bytes.as_ptr(),
            "copied: {name}"
        );
        total += tensor.bytes.len() as u64;
    }
    assert_eq!(total, checkpoint.total_bytes());
    assert!(
        checkpoint
            .tensor("absent")
            .expect_err("absent")
            .to_string()
            .starts_with("no tensor named absent: ")
    );
}

#[test]
fn the_stored_head_is_used_even_if_the_flag_says_tied() {
    let checkpoint = open(&conformance().join("models/tied_flag_untied_weights")).expect("open");
    assert!(checkpoint.config.tie_word_embeddings);
    assert!(!names::audit(&checkpoint).expect("audit"));
    let parsed = open(&conformance().join("models/tied")).expect("open");
    assert!(names::audit(&parsed).expect("audit"));
}

#[test]
fn the_single_file_wins_over_an_index() {
    let dir = tempfile::tempdir().expect("tempdir");
    copy("tied", dir.path());
    fs::write(dir.path().join("model.safetensors.index.json"), "{}").expect("write");
    assert!(load(dir.path()).expect("load"));
}

#[test]
fn an_absent_generation_config_is_an_empty_one() {
    let dir = tempfile::tempdir().expect("tempdir");
    copy("tied", dir.path());
    assert_eq!(
        open(dir.path()).expect("open").generation_config.top_k,
        Some(20)
    );
    fs::remove_file(dir.path().join("generation_config.json")).expect("remove");
    assert_eq!(
        open(dir.path()).expect("open").generation_config,
        GenerationConfig::default()
    );
}

#[test]
fn the_progress_callback_sees_the_total_and_can_stop() {
    let source = Source::from(conformance().join("models/tied"));
    let mut seen = Vec::new();
    let outcome = Checkpoint::open(&source, &mut |progress| {
        seen.push(progress);
        ControlFlow::Break(())
    });
    assert_eq!(outcome.expect_err("stopped").kind(), ErrorKind::Cancelled);
    let total = open(&conformance().join("models/tied"))
        .expect("open")
        .total_bytes();
    assert_eq!(seen, [Progress::new(0, total)]);
}

/// Every case of `conformance/errors.json`: kind, text and help, as Python and C check them too.
#[cfg(unix)]
#[test]
fn every_damaged_checkpoint_gives_the_documented_error() {
    let text = fs::read_to_string(conformance().join("errors.json")).expect("errors.json");
    let file: Value = serde_json::from_str(&text).expect("json");
    let mut wrong = Vec::new();
    for case in file["cases"].as_array().expect("cases") {
        let dir = tempfile::tempdir().expect("tempdir");
        copy(case["base"].as_str().expect("base"), dir.path());
        for change in case["changes"].as_array().expect("changes") {
            apply(change, dir.path());
        }
        let (kind, message, help) = match load(dir.path()) {
            Ok(_) => ("loaded", String::new(), None),
            Err(error) => (
                error.kind().name(),
                error.to_string(),
                error.help().map(str::to_owned),
            ),
        };
        let message = message.replace(&dir.path().display().to_string(), "{dir}");
        let found = serde_json::json!({ "kind": kind, "message": message, "help": help });
        if ["kind", "message", "help"]
            .iter()
            .any(|key| found[key] != case[key])
        {
            wrong.push(format!("{}: {found}", case["name"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[cfg(unix)]
fn apply(change: &Value, dir: &Path) {
    let text = |key: &str| change[key].as_str().expect("text");
    let path = dir.join(text("file"));
    match text("op") {
        "remove" => fs::remove_file(path).expect("remove"),
        "truncate" => {
            let file = fs::OpenOptions::new().write(true).open(path).expect("open");
            file.set_len(change["length"].as_u64().expect("length"))
                .expect("truncate");
        }
        "write" => fs::write(path, text("text")).expect("write"),
        "write_base64" => fs::write(path, base64(text("base64"))).expect("write"),
        "symlink" => std::os::unix::fs::symlink(text("target"), path).expect("link"),
        op @ ("set_json" | "remove_json") => {
            let mut json: Value =
                serde_json::from_slice(&fs::read(&path).expect("read")).expect("json");
            let object = json.as_object_mut().expect("object");
            match op {
                "set_json" => object.insert(text("key").to_owned(), change["value"].clone()),
                _ => object.remove(text("key")),
            };
            fs::write(path, json.to_string()).expect("write");
        }
        other => panic!("unknown op {other}"),
    }
}

#[cfg(unix)]
fn base64(text: &str) -> Vec<u8> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0_u32, 0);
    for symbol in text.bytes().filter(|symbol| *symbol != b'=') {
        let value = alphabet
            .iter()
            .position(|known| *known == symbol)
            .expect("base64");
        bits = (bits << 6) | value as u32;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}
