//! A session in a file comes back as it was, or is refused; a damaged one changes nothing.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::{builder, demo, fixture, load};
use qwen2_core::{DType, ErrorKind, GenerateOptions, KvCacheType, Message, Model, Prompt};

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

fn tokens(n: u32) -> Prompt {
    Prompt::Tokens((0..n).map(|i| 10 + i * 7 % 200).collect())
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_session_goes_on_where_it_was_saved() {
    let folder = folder();
    let path = folder.path().join("a.session");
    for kv_cache in [
        KvCacheType::F32,
        KvCacheType::F16,
        KvCacheType::Q8,
        KvCacheType::Q4,
    ] {
        for name in ["tied", "gqa7", "head_dim_10"] {
            let model = builder(fixture(name)).kv_cache(kv_cache).load().unwrap();
            let mut session = model.session();
            session.append(tokens(70)).unwrap();
            session.generate(&greedy(5)).unwrap();
            session.save(&path).unwrap();
            // As after a restart.
            let model = builder(fixture(name)).kv_cache(kv_cache).load().unwrap();
            let mut restored = model.open_session(&path).unwrap();
            assert_eq!(restored.tokens(), session.tokens());
            let (want, got) = (session.generate(&greedy(9)), restored.generate(&greedy(9)));
            let (want, got) = (want.unwrap(), got.unwrap());
            assert_eq!(got.tokens, want.tokens, "{name} {kv_cache}");
            assert_eq!(got.usage, want.usage);
            assert_eq!(got.usage.cached_tokens, 74);
        }
    }
}

#[test]
fn a_cache_of_several_pages_comes_back() {
    let folder = folder();
    let path = folder.path().join("long.session");
    let model = load(demo());
    let mut session = model.session();
    session.append(tokens(700)).unwrap();
    session.generate(&greedy(3)).unwrap();
    session.save(&path).unwrap();
    let restored = model.open_session(&path).unwrap();
    // A fork shares the pages, and goes its own way.
    let mut fork = restored.fork().unwrap();
    drop(restored);
    let (want, got) = (session.generate(&greedy(20)), fork.generate(&greedy(20)));
    let (want, got) = (want.unwrap(), got.unwrap());
    assert_eq!((got.usage.cached_tokens, got.tokens), (702, want.tokens));
}

#[test]
fn messages_come_back_as_well_and_an_empty_session_too() {
    let folder = folder();
    let path = folder.path().join("b.session");
    let model = load(fixture("tied"));
    model.session().save(&path).unwrap();
    assert!(model.open_session(&path).unwrap().tokens().is_empty());
    let mut session = model.session();
    session.append([Message::user("a b ä 你好")]).unwrap();
    session.generate(&greedy(4)).unwrap();
    session.append([Message::user("c")]).unwrap(); // not read by the model yet
    session.save(&path).unwrap();
    let mut restored = model.open_session(&path).unwrap();
    assert_eq!(restored.messages(), session.messages());
    restored.rollback(1).unwrap();
    session.rollback(1).unwrap();
    assert_eq!(restored.tokens(), session.tokens());
    // Replaced in one step, with nothing left beside it.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// A file of some hundred kilobytes.
fn saved(folder: &tempfile::TempDir) -> (Model, PathBuf) {
    let model = builder(fixture("tied"))
        .kv_cache(DType::F32)
        .load()
        .unwrap();
    let path = folder.path().join("c.session");
    let mut session = model.session();
    session.append(tokens(110)).unwrap();
    session.generate(&greedy(5)).unwrap();
    session.save(&path).unwrap();
    (model, path)
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let folder = folder();
    let (model, path) = saved(&folder);
    let whole = fs::read(&path).unwrap();
    assert!(whole.len() > 8 * 1024, "{}", whole.len());
    let ends = (0..whole.len())
        .step_by(4096)
        .chain([1, 7, 8, 15, 16, 40, whole.len() - 1]);
    for end in ends {
        fs::write(&path, &whole[..end]).unwrap();
        let error = model.open_session(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{end}: {error}");
        assert_eq!(error.path(), Some(path.as_path()));
        assert!(error.help().is_some());
    }
    fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    let error = model.open_session(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFile, "a byte too many");
    fs::write(&path, &whole).unwrap();
    model.open_session(&path).unwrap();
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let folder = folder();
    let (model, path) = saved(&folder);
    let whole = fs::read(&path).unwrap();
    let header = 16 + u32::from_le_bytes(whole[12..16].try_into().unwrap()) as usize + 16;
    // Everywhere in what the library decides by, and here and there in the numbers.
    let places = (0..header)
        .chain((header..whole.len()).step_by(997))
        .chain(whole.len() - 16..whole.len());
    for at in places {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        let error = model.open_session(&path).unwrap_err();
        let kinds = [ErrorKind::InvalidFile, ErrorKind::Unsupported];
        assert!(kinds.contains(&error.kind()), "{at}: {error}");
        assert_eq!(
            error.kind() == ErrorKind::Unsupported,
            (8..12).contains(&at)
        );
    }
}

#[test]
fn a_session_of_another_model_or_of_other_settings_is_refused() {
    let folder = folder();
    let (_, path) = saved(&folder);
    let f32_cache = |name: &str| builder(fixture(name)).kv_cache(DType::F32).load().unwrap();
    let others = [
        f32_cache("untied"),
        f32_cache("gqa7"),
        // The same shapes with other weights.
        f32_cache("tied_flag_untied_weights"),
        builder(fixture("tied"))
            .kv_cache(DType::F16)
            .load()
            .unwrap(),
        builder(fixture("tied"))
            .kv_cache(DType::F32)
            .dtype(DType::BF16)
            .load()
            .unwrap(),
    ];
    for (case, other) in others.iter().enumerate() {
        let error = other.open_session(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{case}: {error}");
        assert!(error.to_string().contains("another model"), "{error}");
        assert!(error.to_string().contains("tied"), "{error}");
    }
    let short = builder(fixture("tied"))
        .kv_cache(DType::F32)
        .context_length(64);
    let error = short.load().unwrap().open_session(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow, "{error}");
}

#[test]
fn what_is_no_session_or_cannot_be_written_is_said() {
    let folder = folder();
    let model = load(fixture("tied"));
    let missing = folder.path().join("none");
    let error = model.open_session(&missing).unwrap_err();
    assert_eq!(
        (error.kind(), error.path()),
        (ErrorKind::NotFound, Some(missing.as_path()))
    );
    let text = folder.path().join("text");
    fs::write(
        &text,
        "Once upon a time there was a file that was no session.",
    )
    .unwrap();
    let error = model.open_session(&text).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFile);
    let nowhere = missing.join("d.session");
    let error = model.session().save(&nowhere).unwrap_err();
    assert_eq!(
        (error.kind(), error.path()),
        (ErrorKind::NotFound, Some(nowhere.as_path()))
    );
    // A directory in its place stays, and so does all in it.
    let error = model.session().save(folder.path()).unwrap_err();
    assert_eq!(error.path(), Some(folder.path()));
    assert_eq!(fs::read(&text).unwrap().len(), 54);
}
