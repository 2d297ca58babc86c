//! The programs of examples/ compile without a warning and run.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

use common::{Workshop, fixture, root, run, text};

/// Each with what it says on the demo model, among other things.
const EXAMPLES: [(&str, &str); 6] = [
    ("hello.c", "5"),
    ("chat.c", "Tuesday"),
    ("stream.c", "9"),
    ("session.c", "5"),
    ("engine.c", "tokens in"),
    ("chat.cpp", "Tuesday"),
];

#[test]
fn examples_run_on_a_tiny_model() {
    for (example, _) in EXAMPLES {
        let workshop = Workshop::new();
        let program = workshop.compile(&root().join("examples").join(example), &[]);
        let output = run(Command::new(program).arg(fixture("tied")));
        assert!(!output.stdout.is_empty(), "{example} printed nothing");
    }
}

#[test]
fn examples_report_a_missing_model() {
    for (example, _) in EXAMPLES {
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
    for (example, expected) in EXAMPLES {
        let workshop = Workshop::new();
        let program = workshop.compile(&root().join("examples").join(example), &[]);
        // Without an argument they open examples/demo-model of the folder they run in.
        let output = run(Command::new(program).current_dir(root()));
        let answer = text(&output.stdout);
        assert!(answer.contains(expected), "{example}: {answer}");
    }
}
