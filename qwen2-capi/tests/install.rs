//! An installed library is found by pkg-config and by CMake.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{fixture, library, root, run, text};
use tempfile::TempDir;

/// Whether a tool is there; the test that needs it is skipped by name where it is not.
fn is_there(tool: &str) -> bool {
    let there = Command::new(tool)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !there {
        println!("skipped: no {tool}");
    }
    there
}

/// What install.sh makes of the libraries that cargo built for this test.
fn install() -> TempDir {
    let prefix = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("install.sh");
    run(Command::new(script)
        .arg(prefix.path())
        .env("QWEN2_LIBRARY_DIR", library().parent().unwrap()));
    prefix
}

fn pkg_config(prefix: &Path, arguments: &[&str]) -> Vec<String> {
    let output = run(Command::new("pkg-config")
        .args(arguments)
        .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")));
    text(&output.stdout)
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

#[test]
fn installed_files_are_where_a_linker_and_a_loader_look() {
    let prefix = install();
    let link = |name: &str| fs::read_link(prefix.path().join("lib").join(name)).unwrap();
    assert_eq!(link("libqwen2.so").to_str(), Some("libqwen2.so.0"));
    assert_eq!(
        link("libqwen2.so.0").to_str(),
        Some(&*format!("libqwen2.so.{}", version()))
    );
    for file in [
        "include/qwen2.h",
        "include/qwen2.hpp",
        "lib/libqwen2.a",
        "lib/libqwen2.so.0",
    ] {
        assert!(
            prefix.path().join(file).metadata().unwrap().len() > 1000,
            "{file}"
        );
    }
    for file in [
        "lib/pkgconfig/qwen2.pc",
        "lib/cmake/qwen2/qwen2-config.cmake",
    ] {
        let text = fs::read_to_string(prefix.path().join(file)).unwrap();
        assert!(!text.contains('@'), "{file} was not filled in:\n{text}");
    }
}

#[test]
fn pkg_config_finds_the_shared_library() {
    if !is_there("pkg-config") {
        return;
    }
    let prefix = install();
    assert_eq!(
        pkg_config(prefix.path(), &["--modversion", "qwen2"]),
        [version()]
    );
    let program = prefix.path().join("hello");
    run(Command::new("cc")
        .arg(root().join("examples/hello.c"))
        .args(pkg_config(prefix.path(), &["--cflags", "--libs", "qwen2"]))
        .arg("-o")
        .arg(&program));
    run(Command::new(program)
        .arg(fixture("tied"))
        .env("LD_LIBRARY_PATH", prefix.path().join("lib")));
}

#[test]
fn pkg_config_finds_what_the_static_library_needs() {
    if !is_there("pkg-config") {
        return;
    }
    let prefix = install();
    for shared in ["libqwen2.so", "libqwen2.so.0"] {
        fs::remove_file(prefix.path().join("lib").join(shared)).unwrap();
    }
    let program = prefix.path().join("hello");
    run(Command::new("cc")
        .arg(root().join("examples/hello.c"))
        .args(pkg_config(
            prefix.path(),
            &["--static", "--cflags", "--libs", "qwen2"],
        ))
        .arg("-o")
        .arg(&program));
    run(Command::new(program).arg(fixture("tied")));
}

#[test]
fn cmake_finds_the_package() {
    if !is_there("cmake") {
        return;
    }
    let prefix = install();
    let project = tempfile::tempdir().unwrap();
    let lists = format!(
        "cmake_minimum_required(VERSION 3.13)\nproject(app C CXX)\nfind_package(qwen2 {} REQUIRED)\n\
         add_executable(shared {root}/examples/hello.c)\ntarget_link_libraries(shared qwen2::qwen2)\n\
         add_executable(static {root}/examples/hello.c)\ntarget_link_libraries(static qwen2::qwen2_static)\n\
         add_executable(cpp {root}/examples/chat.cpp)\ntarget_compile_features(cpp PRIVATE cxx_std_17)\n\
         target_link_libraries(cpp qwen2::qwen2)\n",
        version(),
        root = root().display()
    );
    fs::write(project.path().join("CMakeLists.txt"), lists).unwrap();
    let build = project.path().join("build");
    run(Command::new("cmake")
        .arg("-S")
        .arg(project.path())
        .arg("-B")
        .arg(&build)
        .arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.path().display())));
    run(Command::new("cmake").arg("--build").arg(&build));
    for program in ["shared", "static", "cpp"] {
        run(Command::new(build.join(program)).arg(fixture("tied")));
    }
}
