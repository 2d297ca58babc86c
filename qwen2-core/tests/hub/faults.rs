//! What breaks while a file comes: never a broken cache, never half a file under its name.

use std::fs;
use std::time::Duration;

use crate::server::{AtEnd, Hub, WEIGHTS, read_outcome};

/// The weights, cut off behind 50,000 bytes, have not got their name.
fn cut(hub: &Hub) {
    hub.state().stop_at = Some((50_000, AtEnd::Close));
    let outcome = hub.load(&[]);
    assert_eq!(outcome["kind"], "network", "{outcome}");
    hub.assert_that_no_file_is_wrong();
}

#[test]
fn a_cut_connection_is_a_network_error_and_the_next_load_resumes() {
    let hub = Hub::start("tied");
    cut(&hub);
    hub.resumes_from(50_000, &[]);
}

#[test]
fn a_process_killed_while_it_downloads_leaves_a_cache_that_works() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Stall));
    let (mut child, _) = hub.spawn(&[], "killed.json");
    hub.wait_for_part(50_000);
    child.kill().expect("kill");
    child.wait().expect("wait");
    hub.assert_that_no_file_is_wrong();
    assert_eq!(hub.load(&[("HF_HUB_OFFLINE", "1")])["kind"], "not_found");
    hub.resumes_from(50_000, &[]);
}

#[test]
fn a_download_that_lacked_only_its_last_rename_is_completed() {
    let hub = Hub::start("tied");
    cut(&hub);
    fs::write(hub.part().expect("part"), &hub.files()[WEIGHTS]).expect("write");
    hub.state().stop_at = None;
    let (requests, downloads) = (hub.n_requests(), hub.n_downloads(WEIGHTS));
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    assert_eq!(hub.n_requests(), requests + 1, "the listing alone");
    assert_eq!(hub.n_downloads(WEIGHTS), downloads);
}

#[test]
fn a_half_that_was_damaged_on_the_disk_is_noticed_and_fetched_again() {
    let hub = Hub::start("tied");
    cut(&hub);
    let part = hub.part().expect("part");
    let mut bytes = fs::read(&part).expect("read");
    bytes[20_000] ^= 1;
    fs::write(&part, bytes).expect("write");
    hub.state().stop_at = None;
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    hub.assert_that_no_file_is_wrong();
    assert_eq!(hub.part(), None);
}

#[test]
fn wrong_bytes_from_the_server_never_get_the_name_of_the_file() {
    let hub = Hub::start("tied");
    hub.state().damage = true;
    let outcome = hub.load(&[]);
    assert_eq!(outcome["kind"], "network", "{outcome}");
    let message = outcome["message"].as_str().expect("message");
    assert!(message.starts_with("download is damaged"), "{message}");
    hub.assert_that_no_file_is_wrong();
    hub.state().damage = false;
    assert_eq!(hub.load(&[])["hidden_size"], 32);
}

#[test]
fn a_silent_server_is_given_up_on() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Stall));
    let outcome = hub.load(&[("HF_HUB_DOWNLOAD_TIMEOUT", "1")]);
    assert_eq!(outcome["kind"], "network");
    let message = outcome["message"].as_str().expect("message");
    assert!(message.starts_with("download stalled: "), "{outcome}");
}

#[test]
fn the_progress_callback_stops_a_download_even_of_a_silent_server() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Stall));
    let outcome = hub.load(&[("QWEN2_TEST_CANCEL", "1")]);
    assert_eq!(outcome["kind"], "cancelled", "{outcome}");
    hub.state().stop_at = None;
    assert_eq!(hub.load(&[])["hidden_size"], 32);
}

#[test]
fn a_server_that_ignores_ranges_leaves_no_wrong_file() {
    let hub = Hub::start("tied");
    cut(&hub);
    {
        let mut state = hub.state();
        state.stop_at = None;
        state.ignore_resume = true;
    }
    // The half is thrown away, and the file is fetched again from its start.
    assert_eq!(hub.load(&[])["hidden_size"], 32);
    hub.assert_that_no_file_is_wrong();
}

#[test]
fn a_server_that_never_sends_the_end_is_given_up_on() {
    let hub = Hub::start("tied");
    cut(&hub);
    hub.state().ignore_resume = true;
    let outcome = hub.load(&[]);
    assert_eq!(outcome["kind"], "network", "{outcome}");
    hub.assert_that_no_file_is_wrong();
}

#[test]
fn two_processes_at_once_fetch_each_file_once() {
    let hub = Hub::start("tied");
    hub.state().delay = Duration::from_millis(1000);
    let started: Vec<_> = (0..2)
        .map(|i| hub.spawn(&[], &format!("{i}.json")))
        .collect();
    for (mut child, outcome) in started {
        child.wait().expect("wait");
        let outcome = read_outcome(&outcome);
        assert_eq!(outcome["hidden_size"], 32, "{outcome}");
    }
    assert_eq!(hub.n_downloads(WEIGHTS), 1);
}

#[test]
fn a_process_that_waits_for_one_that_is_killed_goes_on_with_its_file() {
    let hub = Hub::start("tied");
    hub.state().stop_at = Some((50_000, AtEnd::Stall));
    let (mut first, _) = hub.spawn(&[], "first.json");
    hub.wait_for_part(50_000);
    let (mut second, outcome) = hub.spawn(&[], "second.json");
    std::thread::sleep(Duration::from_millis(500));
    hub.state().stop_at = None;
    first.kill().expect("kill");
    first.wait().expect("wait");
    second.wait().expect("wait");
    let outcome = read_outcome(&outcome);
    assert_eq!(outcome["hidden_size"], 32, "{outcome}");
    let resumed = format!("/cdn/{WEIGHTS} bytes=50000-");
    assert!(hub.state().requests.contains(&resumed));
}

/// A limit on the size of files stands for a full disk: writing fails in the middle.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_with_the_way_out_and_the_next_load_resumes() {
    use std::process::Command;
    let hub = Hub::start("tied");
    let outcome = hub.home.path().join("full.json");
    let inner = hub.command(&[], &outcome);
    let mut limited = Command::new("sh");
    // The unit of POSIX is 512 bytes, that of some shells 1024; ignored, the signal is an error code.
    limited.args(["-c", r#"trap "" XFSZ; ulimit -f 64; exec "$0" "$@""#]);
    limited.arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let status = limited.stdout(std::process::Stdio::null()).status();
    assert!(status.expect("sh").success());
    let outcome = read_outcome(&outcome);
    assert_eq!(outcome["kind"], "io", "{outcome}");
    let help = outcome["help"].as_str().expect("help");
    assert!(help.contains("make room"), "{help}");
    hub.assert_that_no_file_is_wrong();
    let length = fs::metadata(hub.part().expect("part")).expect("part").len();
    hub.resumes_from(length as usize, &[]);
}

#[test]
fn a_cache_that_cannot_be_written_is_an_error_that_names_it() {
    let hub = Hub::start("tied");
    let file = hub.home.path().join("file");
    fs::write(&file, "").expect("write");
    let cache = file.join("hub");
    let outcome = hub.load(&[("HF_HUB_CACHE", cache.to_str().expect("text"))]);
    assert_eq!(outcome["kind"], "io", "{outcome}");
    let help = outcome["help"].as_str().expect("help");
    assert!(help.contains("HF_HOME"), "{help}");
}
