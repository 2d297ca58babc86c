//! The programs of examples/ compile without a warning and run.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

use common::{Workshop, demo, fixture, root, run, text};

const EXAMPLES: [&str; 5] = ["hello.c", "chat.c", "stream.c", "session.c", "chat.cpp"];

#[test]
fn examples_run_on_a_tiny_model() {
    for example in EXAMPLES {
        let workshop = Workshop::new();
        let program = workshop.compile(&root().join("examples").join(example), &[]);
        let output = run(Command::new(program).arg(fixture("tied")));
        assert!(!output.stdout.is_empty(), "{example} printed nothing");
    }
}

#[test]
fn examples_report_a_missing_model() {
    for example in EXAMPLES {
        let workshop = Workshop::new();
        let program = workshop.compile(&root().join("examples").join(example), &[]);
        let output = Command::new(program).arg("/nowhere").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{example}");
        assert!(
            text(&output.stderr).contains("no such model: /nowhere"),
            "{example}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn examples_answer_on_the_demo_model() {
    if demo().is_none() {
        return; // not trained yet
    }
    for example in EXAMPLES {
        let workshop = Workshop::new();
        let program = workshop.compile(&root().join("examples").join(example), &[]);
        // Without an argument they open examples/demo-model of the folder they run in.
        let output = run(Command::new(program).current_dir(root()));
        let answer = text(&output.stdout);
        let expected = if example == "stream.c" {
            "9"
        } else if example == "chat.c" {
            "Tuesday"
        } else {
            "5"
        };
        assert!(answer.contains(expected), "{example}: {answer}");
    }
}
