//! Keeps the resident memory of a process that runs for long to the code that it uses.
//!
//! To plan a job touches code all over the program, once. The kernel maps 64 KiB around each place that is touched, and leaves it
//! mapped: more than half of a program of 130 MB is then resident in a process that does nothing. What is given back here is
//! mapped again where it is used, from the kernel's cache of the file, at a microsecond or so per 64 KiB.
//!
//! This crate is the exception to the rule of safe code: `madvise` is a call whose effect on memory the compiler can't see. It is
//! sound on pages that are those of a file, unchanged: whoever reads them reads the same bytes afterwards. So only mappings are
//! named that can't be written to and have no page of their own (a page that was written to, as the linker does at the start,
//! is its process's own from then on).

use std::{ffi::c_void, io, ptr::NonNull, time::Duration};

use floodmark_snapshot::env::{sleep, spawn_thread};
use nix::sys::mman::{MmapAdvise, madvise};

/// When a process has started, by and large, and how often it is looked at from then on.
const FIRST: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_secs(60);
const MAPPINGS: &str = "/proc/self/smaps";

/// Gives code back that has not been used for a while, as long as the process lives, on a thread of its own.
pub fn keep_small() {
    let keep = || {
        sleep(FIRST);
        loop {
            if let Err(error) = give_back() {
                return tracing::debug!(%error, "code stays in memory that isn't used");
            }
            sleep(EVERY);
        }
    };
    if let Err(error) = spawn_thread("footprint".to_owned(), keep) {
        tracing::debug!(%error, "code stays in memory that isn't used");
    }
}

/// Gives back all that can be read from files again. Answers with the bytes that were resident of that.
///
/// # Errors
/// When the kernel doesn't tell what is mapped, or refuses.
pub fn give_back() -> io::Result<u64> {
    let mut resident = 0;
    for mapping in mappings(&std::fs::read_to_string(MAPPINGS)?).filter(Mapping::can_be_read_again) {
        let Some(start) = NonNull::new(std::ptr::without_provenance_mut::<c_void>(mapping.start)) else { continue };
        let length = mapping.end - mapping.start;
        // Cold first: then the kernel doesn't count it as in use either, in the limits of a container, say.
        for advice in [MmapAdvise::MADV_COLD, MmapAdvise::MADV_DONTNEED] {
            // SAFETY: the mapping is this process's, is of a file, can't be written to, and no page of it has been: so every page
            // is the file's, and reading it again gives the same bytes. Nobody unmaps what the dynamic linker has mapped; were it
            // so, the call would fail, or advise about other pages of which the same does not hold: this program unloads no
            // library.
            #[expect(unsafe_code, reason = "see the header of this file")]
            unsafe {
                madvise(start, length, advice)?;
            }
        }
        resident += mapping.resident;
    }
    Ok(resident)
}

/// Of a line range of `smaps`.
struct Mapping<'a> {
    start: usize,
    end: usize,
    permissions: &'a str,
    path: &'a str,
    /// Bytes.
    resident: u64,
    /// Bytes in pages that are no longer the file's.
    own: u64,
}

impl Mapping<'_> {
    /// Code and constants of the program and its libraries.
    fn can_be_read_again(&self) -> bool {
        let unchanged = matches!(self.permissions, "r-xp" | "r--p") && self.own == 0;
        unchanged && self.path.starts_with('/') && self.resident > 0
    }
}

/// The mappings in a text like `/proc/self/smaps`; what can't be read of it is left out.
fn mappings(text: &str) -> impl Iterator<Item = Mapping<'_>> {
    let mut lines = text.lines().peekable();
    std::iter::from_fn(move || {
        loop {
            let Some(mut mapping) = head(lines.next()?) else { continue };
            while let Some(line) = lines.next_if(|line| head(line).is_none()) {
                let mut words = line.split_whitespace();
                let (name, kib) = (words.next(), words.next().and_then(|n| n.parse::<u64>().ok()));
                match (name, kib) {
                    (Some("Rss:"), Some(kib)) => mapping.resident = kib << 10,
                    (Some("Anonymous:"), Some(kib)) => mapping.own = kib << 10,
                    _ => {}
                }
            }
            return Some(mapping);
        }
    })
}

/// `55b2f2f2a000-55b2f7d69000 r-xp 016e6000 00:82 1041249    /usr/local/bin/floodmark`
fn head(line: &str) -> Option<Mapping<'_>> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).ok());
    let permissions = words.next()?;
    // Until the size is known nothing is taken for unchanged.
    let own = u64::MAX;
    Some(Mapping { start: start?, end: end?, permissions, path: words.nth(3).unwrap_or_default(), resident: 0, own })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55b2f1843000-55b2f2f2a000 r--p 00000000 00:82 1041249                    /usr/local/bin/floodmark
Size:              23452 kB
Rss:                8216 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
55b2f2f2a000-55b2f7d69000 r-xp 016e6000 00:82 1041249                    /usr/local/bin/floodmark
Rss:               48140 kB
Anonymous:             0 kB
55b2f7d69000-55b2f80c6000 r--p 06524000 00:82 1041249                    /usr/local/bin/floodmark
Rss:                3424 kB
Anonymous:          3424 kB
55b2f80c6000-55b2f80d0000 rw-p 06881000 00:82 1041249                    /usr/local/bin/floodmark
Rss:                  40 kB
Anonymous:             0 kB
7ffd0f5f2000-7ffd0f5f4000 r-xp 00000000 00:00 0                          [vdso]
Rss:                   8 kB
Anonymous:             0 kB
7f1b9c000000-7f1b9c05b000 r--p 00000000 00:00 0
Rss:                   8 kB
Anonymous:             0 kB
7f1bad9c1000-7f1badb17000 r-xp 00026000 00:82 1040981                    /usr/lib/x86_64-linux-gnu/libm.so.6
Rss:                   8 kB
";

    #[test]
    fn only_unchanged_pages_of_files_are_given_back() {
        let all: Vec<_> = mappings(SMAPS).collect();
        assert_eq!(all.len(), 7);
        assert_eq!((all[1].start, all[1].end, all[1].resident), (0x55b2_f2f2_a000, 0x55b2_f7d6_9000, 48_140 << 10));
        let given: Vec<_> = all.iter().filter(|m| m.can_be_read_again()).map(|m| (m.permissions, m.resident)).collect();
        // Not the linker's, nor what can be written to, nor what is no file's, nor what is not told of.
        assert_eq!(given, [("r--p", 8216 << 10), ("r-xp", 48_140 << 10)]);
    }

    #[test]
    fn what_was_given_back_is_used_again() {
        let resident = || -> u64 {
            let text = std::fs::read_to_string(MAPPINGS).unwrap();
            mappings(&text).filter(Mapping::can_be_read_again).map(|m| m.resident).sum()
        };
        let before = resident();
        assert!(give_back().unwrap() > 0);
        let after = resident();
        assert!(after < before, "{after} of {before} bytes are still resident");
        assert_eq!(format!("{:?}", "still the same".chars().rev().collect::<String>()), "\"emas eht llits\"");
    }
}
