//! Compiles C against the library that cargo built for these tests, and runs it.
#![allow(dead_code)] // every test binary uses a part
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// Warnings are errors, in C as in C++.
const FLAGS: [&str; 6] = [
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Wshadow",
    "-Werror",
    "-O1",
];

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

pub fn fixture(name: &str) -> PathBuf {
    root().join("conformance/models").join(name)
}

pub fn demo() -> PathBuf {
    root().join("examples/demo-model")
}

/// Beside this test, where cargo puts the library that the test depends on.
pub fn library() -> PathBuf {
    let directory = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned();
    let library = directory.join("libqwen2.so");
    assert!(library.exists(), "{} is not there", library.display());
    library
}

/// A folder for programs, with the library under the names that linker and loader look for.
pub struct Workshop(TempDir);

impl Workshop {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["libqwen2.so", "libqwen2.so.0"] {
            std::os::unix::fs::symlink(library(), directory.path().join(name)).unwrap();
        }
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Compiles a `.c` file as C11 or a `.cpp` file as C++17, with more flags.
    pub fn compile(&self, source: &Path, more: &[&str]) -> PathBuf {
        let is_c = source.extension().unwrap() == "c" && !more.contains(&"-xc++");
        let (compiler, standard) = if is_c {
            ("cc", "-std=c11")
        } else {
            ("c++", "-std=c++17")
        };
        let program = self.path().join(source.file_stem().unwrap());
        let output = Command::new(compiler)
            .args([standard, "-D_GNU_SOURCE"])
            .args(FLAGS)
            .args(more)
            .arg("-I")
            .arg(root().join("include"))
            .arg(source)
            .args(["-xnone", "-o"])
            .arg(&program)
            .arg(format!("-L{}", self.path().display()))
            .arg(format!("-Wl,-rpath,{}", self.path().display()))
            .args(["-lqwen2", "-lpthread"])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{compiler} {}:\n{}",
            source.display(),
            text(&output.stderr)
        );
        program
    }

    pub fn compile_test(&self, name: &str, more: &[&str]) -> PathBuf {
        self.compile(
            &Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/c")
                .join(name),
            more,
        )
    }
}

/// Runs a program that must succeed, and gives what it printed.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
