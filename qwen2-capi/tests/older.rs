//! Programs that were compiled with an older header of this ABI version run with today's library.
//!
//! `tests/abi/` has such headers, each in a folder with the name of its commit or release; a release adds its own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Workshop, fixture, library, root, run, text};

fn older_headers() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/abi"));
    let headers = folders.unwrap().map(|folder| folder.unwrap().path());
    let headers: Vec<_> = headers.collect();
    assert!(!headers.is_empty());
    headers
}

/// The functions that a header declares: names before a parenthesis, outside of comments.
fn functions(header: &str) -> BTreeSet<&str> {
    let code = header
        .lines()
        .filter(|line| !line.starts_with("//") && !line.starts_with(" *"));
    let names = code.filter_map(|line| {
        let before = line.split_once('(')?.0;
        let name = before.rsplit([' ', '*']).next()?;
        (name.starts_with("qwen2_") && !before.starts_with("typedef")).then_some(name)
    });
    names.collect()
}

#[test]
fn no_function_of_an_older_header_is_gone() {
    let output = run(Command::new("nm")
        .args(["-D", "--defined-only", "--format=posix"])
        .arg(library()));
    let exports = text(&output.stdout);
    let exports: BTreeSet<_> = exports
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    for folder in older_headers() {
        let header = std::fs::read_to_string(folder.join("qwen2.h")).unwrap();
        let functions = functions(&header);
        assert!(functions.len() > 100, "{functions:?}");
        let gone: Vec<_> = functions.difference(&exports).collect();
        assert!(gone.is_empty(), "{}: {gone:?}", folder.display());
    }
}

#[test]
fn types_signatures_and_constants_of_older_headers_are_those_of_today() {
    for folder in older_headers() {
        for more in [&[][..], &["-xc++"]] {
            let workshop = Workshop::new();
            let new = root().join("include");
            for (name, target) in [("old", &folder), ("new", &new)] {
                std::os::unix::fs::symlink(target, workshop.path().join(name)).unwrap();
            }
            let include = format!("-I{}", workshop.path().display());
            let flags: Vec<_> = more.iter().copied().chain([&*include]).collect();
            run(&mut Command::new(
                workshop.compile_test("both_headers.c", &flags),
            ));
        }
    }
}

/// What the test above relies on: it does not compile where something differs.
#[test]
fn a_changed_signature_and_a_changed_constant_are_found() {
    let today = std::fs::read_to_string(root().join("include/qwen2.h")).unwrap();
    for (from, to) in [
        (
            "void qwen2_model_free(qwen2_model *model)",
            "int qwen2_model_free(qwen2_model *model)",
        ),
        ("#define QWEN2_ERROR_IO 4", "#define QWEN2_ERROR_IO 5"),
        (
            "typedef int32_t qwen2_status",
            "typedef int64_t qwen2_status",
        ),
    ] {
        let changed = today.replace(from, to);
        assert_ne!(changed, today, "{from}");
        let folder = tempfile::tempdir().unwrap();
        for (name, header) in [("old", &today), ("new", &changed)] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("qwen2.h"), header).unwrap();
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/both_headers.c");
        let output = Command::new("cc")
            .args(["-std=c11", "-Werror", "-fsyntax-only", "-I"])
            .arg(folder.path())
            .arg(source)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{from} became {to} unnoticed");
    }
}

#[test]
fn a_program_of_an_older_header_runs_with_todays_library() {
    for folder in older_headers() {
        for more in [&[][..], &["-xc++"]] {
            let workshop = Workshop::new();
            // Before the folder of today's header.
            let include = format!("-I{}", folder.display());
            let flags: Vec<_> = more.iter().copied().chain([&*include]).collect();
            let program = workshop.compile_test("older.c", &flags);
            let output = run(Command::new(program).arg(fixture("tied")));
            assert_eq!(text(&output.stdout), "older: all well\n");
            assert_eq!(text(&output.stderr), "");
        }
    }
}
