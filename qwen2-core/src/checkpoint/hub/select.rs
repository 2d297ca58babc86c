//! Which files of a repository make the model that was asked for.

use std::collections::BTreeMap;

use super::super::gguf;
use super::super::shards::{self, listed};
use super::super::{CONFIG, GENERATION_CONFIG};
use crate::error::{Error, ErrorKind, Result};

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const REQUIRED: [&str; 2] = [CONFIG, TOKENIZER];
/// Files that a model may do without; what they say changes its behaviour, so that their absence
/// must be known and not assumed.
pub(super) const OPTIONAL: [&str; 3] = [
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// Whether a repository with these files, of which no GGUF file was asked for, is one of GGUF files.
pub(super) fn is_gguf(names: &[&str]) -> bool {
    let has = |name| names.contains(&name);
    let gguf = names.iter().any(|name| name.ends_with(".gguf"));
    gguf && !has(shards::SINGLE) && !has(shards::INDEX)
}

/// The GGUF file, in all its parts, that `wanted` means: a quantization such as `Q4_0`, a path, a
/// name, or a pattern with `*`; without it the only one that there is.
///
/// # Errors
/// `NotFound` if there is none, `InvalidArgument` if there are several; both list what there is.
pub(super) fn gguf_parts(names: &[&str], wanted: Option<&str>, id: &str) -> Result<Vec<String>> {
    let mut models = BTreeMap::new();
    for name in names.iter().filter(|name| name.ends_with(".gguf")) {
        let parts = gguf::part_names(name);
        models.insert(parts[0].clone(), parts);
    }
    let all: Vec<String> = models.keys().map(|name| short(name)).collect();
    let matches = |parts: &[String]| match wanted {
        Some(wanted) => parts.iter().any(|part| is_meant(part, wanted)),
        None => true,
    };
    models.retain(|_, parts| matches(parts));
    let refused = |kind, what, choices: &[String]| {
        let choices: Vec<&str> = choices.iter().map(String::as_str).collect();
        Err(Error::new(kind, what)
            .with_key(match wanted {
                Some(wanted) => format!("{id}:{wanted}"),
                None => id.to_owned(),
            })
            .with_why(match choices.is_empty() {
                true => "there is none".to_owned(),
                false => format!("there are {}", listed(&choices)),
            })
            .with_help(format!(
                "name one behind a colon: {id}:Q4_0, or with the file's name"
            )))
    };
    let left: Vec<String> = models.keys().map(|name| short(name)).collect();
    match models.len() {
        0 => refused(ErrorKind::NotFound, "no such GGUF file", &all),
        1 => Ok(models.into_values().next().unwrap_or_default()),
        _ => refused(ErrorKind::InvalidArgument, "several GGUF files", &left),
    }
}

/// The name without what numbers its part.
fn short(first: &str) -> String {
    match gguf::part_names(first).len() {
        1 => first.to_owned(),
        _ => first
            .rsplit_once("-00001-of-")
            .map_or_else(|| first.to_owned(), |(base, _)| format!("{base}.gguf")),
    }
}

fn is_meant(path: &str, wanted: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let names = [path.to_owned(), name.to_owned(), short(path), short(name)];
    if wanted.contains('*') {
        return names.iter().any(|name| fits(name, wanted));
    }
    if wanted.ends_with(".gguf") {
        return names.iter().any(|name| name == wanted);
    }
    // qwen2-7b-instruct-q4_k_m.gguf, Qwen2-7B.Q4_K_M.gguf, Q4_K_M/…, qwen2_q4_k_m.gguf
    let (path, wanted) = (path.to_ascii_lowercase(), wanted.to_ascii_lowercase());
    let ending = format!("_{wanted}");
    path.split(['-', '.', '/'])
        .any(|word| word == wanted || (word.ends_with(&ending) && !is_quantization(word)))
}

/// `q4_0` is none of `iq4_0`, and `0` none of `q4_0`: words of their own.
fn is_quantization(word: &str) -> bool {
    let digits = word.trim_start_matches('i').strip_prefix('q');
    digits.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Whether `*` of the pattern can stand for something that makes it the name.
fn fits(name: &str, pattern: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let mut pieces: Vec<&str> = pieces.collect();
    let last = pieces.pop();
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    match last {
        Some(last) => rest.ends_with(last),
        None => rest.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 7] = [
        "README.md",
        "config.json",
        "qwen2-0_5b-instruct-q4_0.gguf",
        "qwen2-0_5b-instruct-q4_k_m-00001-of-00002.gguf",
        "qwen2-0_5b-instruct-q4_k_m-00002-of-00002.gguf",
        "old/Qwen2-0.5B.IQ4_NL.gguf",
        "qwen2_q8_0.gguf",
    ];

    fn one(wanted: &str) -> String {
        let parts = gguf_parts(&NAMES, Some(wanted), "org/name").expect(wanted);
        parts[0].clone()
    }

    #[test]
    fn a_file_is_found_by_its_quantization_its_name_or_a_pattern() {
        assert!(is_gguf(&NAMES));
        assert!(!is_gguf(&["a.gguf", shards::SINGLE]) && !is_gguf(&["config.json"]));
        for (wanted, name) in [
            ("Q4_0", NAMES[2]),
            ("q4_0", NAMES[2]),
            ("Q4_K_M", NAMES[3]),
            ("iq4_nl", NAMES[5]),
            ("Q8_0", NAMES[6]),
            ("qwen2_q8_0.gguf", NAMES[6]),
            ("qwen2-0_5b-instruct-q4_k_m.gguf", NAMES[3]),
            ("Qwen2-0.5B.IQ4_NL.gguf", NAMES[5]),
            ("old/*", NAMES[5]),
            ("*k_m*", NAMES[3]),
        ] {
            assert_eq!(one(wanted), name, "{wanted}");
        }
        let parts = gguf_parts(&NAMES, Some("Q4_K_M"), "org/name").expect("parts");
        assert_eq!(parts, NAMES[3..5]);
        assert_eq!(
            gguf_parts(&NAMES[..3], None, "org/name").expect("one"),
            [NAMES[2]]
        );
    }

    #[test]
    fn a_choice_that_is_none_or_several_lists_what_there_is() {
        let error = gguf_parts(&NAMES, Some("Q5_0"), "org/name").expect_err("none");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(
            error.to_string(),
            "no such GGUF file: org/name:Q5_0: there are old/Qwen2-0.5B.IQ4_NL.gguf, \
             qwen2-0_5b-instruct-q4_0.gguf, qwen2-0_5b-instruct-q4_k_m.gguf, qwen2_q8_0.gguf"
        );
        let error = gguf_parts(&NAMES, Some("*instruct*"), "org/name").expect_err("two");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(
            error.to_string(),
            "several GGUF files: org/name:*instruct*: there are qwen2-0_5b-instruct-q4_0.gguf, \
             qwen2-0_5b-instruct-q4_k_m.gguf"
        );
        let error = gguf_parts(&NAMES, None, "org/name").expect_err("four");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        // "0" ends several names, but is no quantization.
        assert!(gguf_parts(&NAMES, Some("0"), "org/name").is_err());
    }

    #[test]
    fn one_part_stands_for_all_of_its_model() {
        let parts = gguf_parts(&["d/a-00001-of-00002.gguf"], None, "org/name").expect("parts");
        assert_eq!(
            parts,
            ["d/a-00001-of-00002.gguf", "d/a-00002-of-00002.gguf"]
        );
    }
}
