//! `qwen2 serve` says where it is, answers there, and ends when it is told to.
#![cfg(feature = "serve")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

fn serve(args: &[&str]) -> Command {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo-model");
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen2"));
    command
        .arg("serve")
        .arg(model)
        .args(args)
        .env_remove("QWEN2_API_KEY")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Starts a server and reads where it listens.
fn start(mut command: Command) -> (Child, String) {
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line
        .split("http://")
        .nth(1)
        .unwrap_or_else(|| panic!("{line}"));
    let address = address.split(',').next().unwrap().to_owned();
    (child, address)
}

fn get(address: &str, path: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n{headers}connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

#[cfg(unix)]
#[test]
fn it_answers_where_it_says_and_ends_well_at_either_signal() {
    for signal in ["-INT", "-TERM"] {
        let (child, address) = start(serve(&["--port", "0", "--name", "small"]));
        assert!(get(&address, "/v1/models", "").contains(r#""id":"small""#));
        assert!(get(&address, "/", "").contains("<!doctype html>"));
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{signal}");
        assert_eq!((output.stdout, output.stderr), (vec![], vec![]), "{signal}");
    }
}

#[test]
fn the_key_comes_from_the_arguments_or_the_environment() {
    let mut with_variable = serve(&["--port", "0"]);
    with_variable.env("QWEN2_API_KEY", "secret");
    for command in [
        serve(&["--port", "0", "--api-key", "secret"]),
        with_variable,
    ] {
        let (mut child, address) = start(command);
        assert!(get(&address, "/v1/models", "").starts_with("HTTP/1.1 401"));
        let key = "authorization: Bearer secret\r\n";
        assert!(get(&address, "/v1/models", key).starts_with("HTTP/1.1 200"));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn what_cannot_be_served_is_an_error_with_a_way_out() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, code, error) in [
        (
            ["--port", port.as_str()],
            1,
            format!("error: cannot listen at 127.0.0.1:{port}: "),
        ),
        (
            ["--host", "no host"],
            1,
            "error: cannot listen at no host:8000: ".to_owned(),
        ),
        (
            ["--api-key", ""],
            2,
            "error: the API key is empty\n".to_owned(),
        ),
    ] {
        let output = serve(&args).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(
            stderr.starts_with(&error) && stderr.contains("\nhelp: "),
            "{stderr}"
        );
    }
}
