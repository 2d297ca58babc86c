//! `qwen2 chat`: a conversation, line by line.

use super::*;

#[test]
fn chat_opens_the_demo_model_and_answers_line_by_line() {
    let outcome = qwen2_with(
        &["chat", "--greedy"],
        b"What is 12 plus 30?\n\nWhich is larger, 7 or 9?\n",
    );
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(
        lines.len(),
        2,
        "an answer for each message, none for the empty line: {lines:?}"
    );
    assert!(lines[0].contains("42"), "{lines:?}");
    assert!(lines[1].contains('9'), "{lines:?}");
    assert_eq!(
        outcome.stderr.matches(" tokens/s]").count(),
        2,
        "{}",
        outcome.stderr
    );
}

#[test]
fn chat_keeps_the_conversation_until_reset() {
    let tied = tied();
    let input = b"a\nb\n/reset\na\n/exit\nnever read\n";
    let outcome = qwen2_with(
        &["chat", &tied, "--greedy", "--max-new-tokens", "4", "--json"],
        input,
    );
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let answers: Vec<Value> = outcome
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[0]["usage"]["cached_tokens"], 0);
    assert!(
        answers[1]["usage"]["cached_tokens"].as_u64().unwrap() > 0,
        "the past is not read again"
    );
    assert_eq!(answers[0]["usage"], answers[2]["usage"]);
    assert_eq!(answers[0]["tokens"], answers[2]["tokens"]);
}

#[test]
fn chat_takes_instructions() {
    let tied = tied();
    let prompt_tokens = |args: &[&str]| {
        let common = ["chat", &tied, "--max-new-tokens", "1", "--json"];
        qwen2_with(&[&common[..], args].concat(), b"a\n").json()["usage"]["prompt_tokens"]
            .as_u64()
            .unwrap()
    };
    assert!(
        prompt_tokens(&["--system", "x"]) < prompt_tokens(&[]),
        "the default instructions are longer"
    );
}

#[test]
fn a_message_that_does_not_fit_leaves_the_conversation_as_it_was() {
    let tied = tied();
    let long = "long ".repeat(60);
    let input = format!("a\n{long}\nb\n");
    let with = qwen2_with(
        &["chat", &tied, "--greedy", "--max-new-tokens", "4", "--json"],
        input.as_bytes(),
    );
    let without = qwen2_with(
        &["chat", &tied, "--greedy", "--max-new-tokens", "4", "--json"],
        b"a\nb\n",
    );
    assert_eq!(
        with.code,
        Some(1),
        "a script learns that a message had no answer"
    );
    assert!(
        with.stderr
            .starts_with("error: conversation exceeds the context"),
        "{}",
        with.stderr
    );
    let tokens = |outcome: &Outcome| {
        let lines = outcome
            .stdout
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|answer| answer["tokens"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(tokens(&with), tokens(&without));
}

#[cfg(unix)]
#[test]
fn control_c_stops_the_answer_and_then_the_program() {
    let directory = tempfile::tempdir().unwrap();
    let model = endless(directory.path());
    let mut child = command(&["chat", &model, "--greedy"]).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    stdin.write_all(b"a\n").unwrap();
    let mut one = [0];
    stdout.read_exact(&mut one).unwrap();
    // Keeps the pipe empty, so that the program is at work and not at a write.
    let drain = std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
    interrupt(&child);
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        stderr.read_exact(&mut one).unwrap();
        line.push(one[0]);
    }
    assert!(String::from_utf8_lossy(&line).contains("ended by cancelled"));
    // Now it waits for the next message: Ctrl-C ends it.
    std::thread::sleep(std::time::Duration::from_millis(200));
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drain.join().unwrap().unwrap();
    drop(stdin);
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    let status = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_reader_that_leaves_ends_the_program_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = command(&["generate", &endless(directory.path()), "a", "--greedy"])
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let outcome = finish(child, b"");
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}
