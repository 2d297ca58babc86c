//! The header and every promise of it, through a C and a C++ compiler.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

use common::{Workshop, demo, fixture, root, run, text};

/// The library is not instrumented, but every allocation of it is seen: what a host is given and
/// loses is a leak. Nothing is suppressed.
const SANITIZERS: [&str; 3] = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-g",
];

#[test]
fn header_may_be_included_twice_in_c_and_in_cpp() {
    for more in [&[][..], &["-xc++"]] {
        let workshop = Workshop::new();
        run(&mut Command::new(
            workshop.compile_test("double_include.c", more),
        ));
    }
}

#[test]
fn smoke_test_passes_as_c_and_as_cpp_and_prints_nothing_else() {
    for more in [&[][..], &["-xc++"]] {
        let workshop = Workshop::new();
        let output = run(Command::new(workshop.compile_test("smoke.c", more)).arg(fixture("tied")));
        assert_eq!(text(&output.stdout), "smoke: all well\n");
        assert_eq!(text(&output.stderr), "", "a library is silent");
    }
}

#[test]
fn smoke_test_passes_under_address_leak_and_undefined_behaviour_sanitizers() {
    let workshop = Workshop::new();
    let program = workshop.compile_test("smoke.c", &SANITIZERS);
    let output = run(Command::new(program)
        .arg(fixture("tied"))
        .env("ASAN_OPTIONS", "detect_leaks=1"));
    assert_eq!(text(&output.stderr), "");
}

/// What the test above relies on: a handle that is not freed does not go unnoticed.
#[test]
fn lost_handles_are_leaks_for_the_sanitizer() {
    let workshop = Workshop::new();
    let output = Command::new(workshop.compile_test("leak.c", &SANITIZERS))
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(
        text(&output.stderr).contains("detected memory leaks"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn smoke_test_passes_on_the_demo_model() {
    let workshop = Workshop::new();
    run(Command::new(workshop.compile_test("smoke.c", &[])).arg(demo()));
}

#[test]
fn constraints_and_tools_work_as_c_and_as_cpp_and_lose_nothing() {
    for more in [&SANITIZERS[..], &["-xc++"]] {
        let workshop = Workshop::new();
        let output = run(Command::new(workshop.compile_test("tools.c", more)).arg(demo()));
        assert_eq!(text(&output.stdout), "tools: all well\n");
        assert_eq!(text(&output.stderr), "", "a library is silent");
    }
}

#[test]
fn engines_and_adapters_work_as_c_and_as_cpp_and_lose_nothing() {
    let adapter = root().join("conformance/adapters/plain");
    let programs = [
        ("engine.c", &SANITIZERS[..]),
        ("engine.c", &["-xc++"]),
        ("engine.cpp", &SANITIZERS),
    ];
    for (program, more) in programs {
        let workshop = Workshop::new();
        let output = run(Command::new(workshop.compile_test(program, more))
            .arg(demo())
            .arg(fixture("tied"))
            .arg(&adapter));
        assert_eq!(text(&output.stdout), "engine: all well\n");
        assert_eq!(text(&output.stderr), "", "a library is silent");
    }
}

#[test]
fn callbacks_hear_all_once_and_may_enter_again_and_nothing_is_lost() {
    for more in [&SANITIZERS[..], &["-xc++"]] {
        let workshop = Workshop::new();
        let output = run(Command::new(workshop.compile_test("callbacks.c", more)).arg(demo()));
        assert_eq!(text(&output.stdout), "callbacks: all well\n");
        assert_eq!(text(&output.stderr), "", "a library is silent");
    }
}

/// 100 000 of each small handle and 1000 engines. Every loss is a leak to the sanitizer; what is still
/// reachable and grows shows in the memory of the program without one, where 8 MiB are room for the allocator;
/// 100 bytes lost in each round would be more.
#[test]
fn handles_made_and_freed_very_often_neither_leak_nor_grow() {
    for (more, may_grow) in [(&SANITIZERS[..], "1000000"), (&[], "8192")] {
        let workshop = Workshop::new();
        let output = run(Command::new(workshop.compile_test("cycles.c", more))
            .arg(fixture("tied"))
            .arg(may_grow)
            .env("ASAN_OPTIONS", "detect_leaks=1"));
        assert_eq!(text(&output.stdout), "cycles: all well\n");
        assert_eq!(text(&output.stderr), "");
    }
}
