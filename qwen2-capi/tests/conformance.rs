//! The vectors of conformance/, through a C program.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Workshop, fixture, root, text};
use qwen2_core::{ErrorKind, Message, Tokenizer};
use serde_json::Value;
use tempfile::TempDir;

/// The project's bound for float32 on logits of size about 4.
const TOLERANCE: f64 = 1e-4;

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn hex(text: &str) -> String {
    let digits: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    if digits.is_empty() {
        "-".to_owned()
    } else {
        digits
    }
}

fn unhex(word: &str) -> String {
    let byte = |at| u8::from_str_radix(&word[at..at + 2], 16).unwrap();
    let bytes = if word == "-" {
        Vec::new()
    } else {
        (0..word.len()).step_by(2).map(byte).collect()
    };
    String::from_utf8(bytes).unwrap()
}

fn words(values: &Value) -> String {
    values
        .as_array()
        .unwrap()
        .iter()
        .map(|value| format!(" {value}"))
        .collect()
}

/// Gives the commands to the program and returns its answers, one a line.
fn drive(commands: &str) -> Vec<String> {
    let workshop = Workshop::new();
    let mut child = Command::new(workshop.compile_test("driver.c", &[]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let commands = commands.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(commands.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "{}", output.status);
    text(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn logits_and_greedy_tokens_equal_the_reference() {
    let mut names = Vec::new();
    let mut commands = String::new();
    for entry in fs::read_dir(root().join("conformance/models")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let reference = json(fixture(&name).join("reference.json"));
        let place = hex(fixture(&name).to_str().unwrap());
        writeln!(commands, "logits {place}{}", words(&reference["tokens"])).unwrap();
        let n = reference["greedy"].as_array().unwrap().len();
        writeln!(
            commands,
            "greedy {place} {n}{}",
            words(&reference["greedy_prompt"])
        )
        .unwrap();
        names.push((name, reference));
    }
    let answers = drive(&commands);
    assert_eq!(answers.len(), 2 * names.len());
    for ((name, reference), answers) in names.iter().zip(answers.chunks(2)) {
        let got: Vec<f64> = answers[0]
            .split(' ')
            .skip(3)
            .map(|word| word.parse().unwrap())
            .collect();
        let rows = reference["logits"].as_array().unwrap().iter();
        let want: Vec<f64> = rows
            .flat_map(|row| row.as_array().unwrap())
            .map(|x| x.as_f64().unwrap())
            .collect();
        assert_eq!(got.len(), want.len(), "{name}: {:.80}", answers[0]);
        let far = got
            .iter()
            .zip(&want)
            .find(|(got, want)| got.is_nan() || (*got - *want).abs() > TOLERANCE);
        assert_eq!(far, None, "{name}");
        assert_eq!(
            answers[1],
            format!("ok{}", words(&reference["greedy"])),
            "{name}"
        );
    }
}

#[test]
fn chats_are_rendered_as_the_vectors_say() {
    let vectors = json(root().join("conformance/chat.json"));
    let cases = vectors["cases"].as_array().unwrap();
    let mut commands = String::new();
    for case in cases {
        let place = hex(fixture("tied").to_str().unwrap());
        let generation = i32::from(case["add_generation_prompt"].as_bool().unwrap());
        write!(commands, "chat {place} {generation}").unwrap();
        for message in case["messages"].as_array().unwrap() {
            let part = |key: &str| hex(message[key].as_str().unwrap());
            write!(commands, " {} {}", part("role"), part("content")).unwrap();
        }
        commands.push('\n');
    }
    let tokenizer = Tokenizer::load(fixture("tied")).unwrap();
    let answers = drive(&commands);
    assert_eq!(answers.len(), cases.len());
    for (case, answer) in cases.iter().zip(&answers) {
        let parts: Vec<&str> = answer.split(' ').collect();
        assert_eq!(parts[0], "ok", "{}: {answer}", case["name"]);
        let rendered = case["rendered"].as_str().unwrap();
        assert_eq!(unhex(parts[1]), rendered, "{}", case["name"]);
        let messages = case["messages"].as_array().unwrap().iter().map(|message| {
            Message::new(
                message["role"].as_str().unwrap(),
                message["content"].as_str().unwrap(),
            )
        });
        let generation = case["add_generation_prompt"].as_bool().unwrap();
        let tokens = tokenizer
            .encode_chat(&messages.collect::<Vec<_>>(), generation)
            .unwrap();
        let got: Vec<u32> = parts[2..]
            .iter()
            .map(|word| word.parse().unwrap())
            .collect();
        assert_eq!(
            got, tokens,
            "{}: not the tokens that Rust gives",
            case["name"]
        );
    }
}

#[test]
fn bad_checkpoints_give_the_errors_of_the_vectors() {
    let vectors = json(root().join("conformance/errors.json"));
    let cases = vectors["cases"].as_array().unwrap();
    let mut places = Vec::new();
    let mut commands = String::new();
    for case in cases {
        let place = prepare(case);
        writeln!(commands, "load {}", hex(place.path().to_str().unwrap())).unwrap();
        places.push(place);
    }
    let answers = drive(&commands);
    assert_eq!(answers.len(), cases.len());
    let mut wrong = String::new();
    for ((case, place), answer) in cases.iter().zip(&places).zip(&answers) {
        let fill = |key: &str| {
            case[key]
                .as_str()
                .unwrap_or("")
                .replace("{dir}", place.path().to_str().unwrap())
        };
        let kind = ErrorKind::ALL
            .iter()
            .find(|kind| kind.name() == fill("kind"))
            .unwrap();
        let want = format!(
            "error {} {} {}",
            kind.code(),
            hex(&fill("message")),
            hex(&fill("help"))
        );
        if *answer != want {
            let readable: Vec<String> = answer.split(' ').skip(2).map(unhex).collect();
            writeln!(wrong, "{}: {answer:.9} {readable:?}", case["name"]).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The base with the case's changes, in a folder of its own.
fn prepare(case: &Value) -> TempDir {
    let place = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(case["base"].as_str().unwrap())).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), place.path().join(entry.file_name())).unwrap();
    }
    for change in case["changes"].as_array().unwrap() {
        apply(place.path(), change);
    }
    place
}

fn apply(directory: &Path, change: &Value) {
    let part = |key: &str| change[key].as_str().unwrap();
    let path = directory.join(part("file"));
    match part("op") {
        "remove" => fs::remove_file(path).unwrap(),
        "truncate" => {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(change["length"].as_u64().unwrap()).unwrap();
        }
        "set_json" => edit(&path, |object| {
            object[part("key")] = change["value"].clone()
        }),
        "remove_json" => edit(&path, |object| {
            object.as_object_mut().unwrap().remove(part("key"));
        }),
        "write" => fs::write(path, part("text")).unwrap(),
        "write_base64" => fs::write(path, base64(part("base64"))).unwrap(),
        "symlink" => {
            let _ = fs::remove_file(&path);
            std::os::unix::fs::symlink(part("target"), path).unwrap();
        }
        other => panic!("unknown op {other}"),
    }
}

fn edit(path: &Path, body: impl FnOnce(&mut Value)) {
    let mut object = json(path.to_owned());
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
        bits = bits << 6 | u32::try_from(sextet).unwrap();
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
        }
    }
    out
}
