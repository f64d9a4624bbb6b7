//! Why this process has ended, where a cluster looks for it: the file that Kubernetes shows as a container's termination message.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::Path,
};

/// Where a container has that file, if it is in a cluster.
const FILE: &str = "/dev/termination-log";
/// Bytes that a cluster reads of it.
const BYTES_MAX: usize = 4096;
/// What stands for the rest of a message that is longer.
const AND_SO_ON: &str = " ...";

/// Says why this process ends, if there is a place for it. There is nobody to tell that it could not be said.
pub(crate) fn leave(message: &str) {
    let _ = write(Path::new(FILE), message);
}

fn write(file: &Path, message: &str) -> io::Result<()> {
    // Outside a cluster there is none, and none is made.
    let mut file = OpenOptions::new().write(true).truncate(true).open(file)?;
    let message = without_secrets(message);
    if message.len() <= BYTES_MAX {
        return file.write_all(message.as_bytes());
    }
    let cut = message.floor_char_boundary(BYTES_MAX - AND_SO_ON.len());
    file.write_all(format!("{}{AND_SO_ON}", &message[..cut]).as_bytes())
}

/// The message without what stands between `://` and `@`: whoever may read a pod's status need not know passwords.
fn without_secrets(message: &str) -> String {
    let mut text = String::with_capacity(message.len());
    let mut rest = message;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + "://".len());
        text.push_str(before);
        let host = after.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(after.len());
        rest = match after[..host].rfind('@') {
            Some(at) => {
                text.push_str("***");
                &after[at..]
            }
            None => after,
        };
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_left_where_there_is_a_place_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("termination-log");
        assert!(write(&file, "no").is_err());
        assert!(!file.exists());
        std::fs::write(&file, "what was said before, at length").unwrap();
        write(&file, "no such topic").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "no such topic");
        for length in [2047, 2048, 2049, 9_000] {
            write(&file, &"\u{fc}".repeat(length)).unwrap();
            let text = std::fs::read_to_string(&file).unwrap();
            assert!(text.len() <= BYTES_MAX && text.len() > BYTES_MAX - 8, "{length}: {}", text.len());
            assert_eq!(text.ends_with(AND_SO_ON), length > 2048);
        }
    }

    #[test]
    fn passwords_in_locations_are_not_said() {
        for (message, said) in [
            ("open s3://key:secret@host/x: no", "open s3://***@host/x: no"),
            ("open s3://a@b@host", "open s3://***@host"),
            ("s3://bucket/a@b, then http://u:p@h", "s3://bucket/a@b, then http://***@h"),
            ("job@home", "job@home"),
            ("://", "://"),
        ] {
            assert_eq!(without_secrets(message), said);
        }
    }
}
