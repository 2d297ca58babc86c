//! One input as several files: texts and binaries with a line of percent signs between them.

use std::path::Path;
use std::{fs, io};

use tempfile::TempDir;

const BREAK: &[u8] = b"\n%%%%\n";

/// The parts of an input, exactly `N`; the last has all that is left, those that lack are empty.
pub fn sections<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut rest = Some(input);
    std::array::from_fn(|number| {
        let part = rest.unwrap_or_default();
        let end = part.windows(BREAK.len()).position(|bytes| bytes == BREAK);
        match end.filter(|_| number + 1 < N) {
            Some(end) => {
                rest = Some(&part[end + BREAK.len()..]);
                &part[..end]
            }
            None => {
                rest = None;
                part
            }
        }
    })
}

thread_local! {
    /// In memory where the system has such a place; emptied by its drop at the end of the program.
    static DIRECTORY: TempDir = match Path::new("/dev/shm") {
        shm if shm.is_dir() => tempfile::tempdir_in(shm),
        _ => tempfile::tempdir(),
    }
    .expect("a directory");
}

/// Runs `body` on a directory with these files; those without contents are not there.
pub fn with_files<R>(files: &[(&str, &[u8])], body: impl FnOnce(&Path) -> R) -> R {
    DIRECTORY.with(|directory| {
        for (name, contents) in files {
            let path = directory.path().join(name);
            match contents {
                [] => match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{error}"),
                    _ => {}
                },
                contents => fs::write(&path, contents).expect("write"),
            }
        }
        body(directory.path())
    })
}
