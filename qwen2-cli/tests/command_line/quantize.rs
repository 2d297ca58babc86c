//! `qwen2 quantize`: a packed directory is a model like others.

use super::*;

#[test]
fn a_packed_directory_is_a_model_like_others() {
    let directory = tempfile::tempdir().unwrap();
    let packed = directory.path().join("packed").display().to_string();
    let outcome = qwen2(&["quantize", &demo(), &packed, "--precision", "q8"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(
        outcome.stdout.ends_with("is packed in q8\n"),
        "{}",
        outcome.stdout
    );
    let answer = qwen2(&[
        "generate",
        &packed,
        "What is 12 plus 30?",
        "--chat",
        "--greedy",
    ]);
    assert!(answer.stdout.contains("42"), "{}", answer.stdout);
    let info = qwen2(&["info", &packed, "--json"]).json();
    assert_eq!(info["weight_bytes"], info["stored_bytes"]);
    assert_eq!(info["config"]["packed"], true);
    let again = qwen2(&["quantize", &demo(), &packed]);
    assert_eq!(again.code, Some(2));
    assert!(
        again.stderr.starts_with("error: destination exists: "),
        "{}",
        again.stderr
    );
    let wrong = qwen2(&["quantize", &demo(), &packed, "--precision", "q3"]);
    assert!(
        wrong.stderr.contains("unknown quantization"),
        "{}",
        wrong.stderr
    );
}
