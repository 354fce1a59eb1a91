//! Reads single lines of `/proc/<pid>/status`: `proc_pid_status(5)`.
//!
//! The process determines the length of its `Groups` line: up to 65,536 numbers, 720 KB. Other
//! lines are skipped in chunks and never held in memory (T27).

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::uio::pread;

/// The bytes of one read: more than the status of most processes.
const CHUNK: usize = 4096;
/// The longest name of a line that can be read.
const NAME_MAX: usize = 8;

/// The reason why the numbers could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StatusError {
    /// The read failed with this error.
    Io(Errno),
    /// A line is missing, or contains something other than numbers.
    Malformed,
    /// A line has more numbers than the caller of the function allows.
    TooMany,
}

/// Reads the numbers in these lines, each given by its name and the most numbers that it may have.
/// Reads nothing after the last of them. The process chooses the content of `Name`, the first line;
/// the kernel escapes newlines in it.
pub(crate) fn numbers<const N: usize>(
    file: impl AsFd,
    lines: [(&str, usize); N],
) -> Result<[Vec<u32>; N], StatusError> {
    let mut scan = Scan::new(lines);
    let (mut chunk, mut offset) = ([0; CHUNK], 0);
    loop {
        let length = pread(&file, &mut chunk, offset).map_err(StatusError::Io)?;
        if length == 0 || scan.feed(&chunk[..length])? {
            return scan.finish();
        }
        offset += i64::try_from(length).map_err(|_| StatusError::Malformed)?;
    }
}

/// Reads the numbers from a text that arrives in chunks of this size.
#[cfg(any(test, fuzzing))]
pub(crate) fn numbers_of<const N: usize>(
    text: &[u8],
    lines: [(&str, usize); N],
    chunk: usize,
) -> Result<[Vec<u32>; N], StatusError> {
    let mut scan = Scan::new(lines);
    for chunk in text.chunks(chunk) {
        if scan.feed(chunk)? {
            break;
        }
    }
    scan.finish()
}

/// The position of a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScanPosition {
    /// In the name of a line.
    Name,
    /// In a wanted line, and possibly in a number.
    Numbers(usize, Option<u32>),
    /// In a line that is skipped.
    Other,
}

struct Scan<'l, const N: usize> {
    lines: [(&'l str, usize); N],
    found: [Option<Vec<u32>>; N],
    at: ScanPosition,
    name: Vec<u8>,
}

impl<'l, const N: usize> Scan<'l, N> {
    fn new(lines: [(&'l str, usize); N]) -> Self {
        Self {
            lines,
            found: [const { None }; N],
            at: ScanPosition::Name,
            name: Vec::with_capacity(NAME_MAX),
        }
    }

    /// Reads a chunk. Returns whether all lines are complete.
    fn feed(&mut self, mut bytes: &[u8]) -> Result<bool, StatusError> {
        while let Some((&byte, rest)) = bytes.split_first() {
            bytes = rest;
            match self.at {
                ScanPosition::Other => {
                    let end = std::iter::once(&byte)
                        .chain(rest)
                        .position(|byte| *byte == b'\n');
                    let Some(end) = end else { return Ok(false) };
                    (self.at, bytes) = (ScanPosition::Name, &rest[end..]);
                }
                ScanPosition::Name => self.at = self.name(byte),
                ScanPosition::Numbers(line, number) => {
                    self.at = self.number(line, number, byte)?;
                    if self.at == ScanPosition::Name && self.found.iter().all(Option::is_some) {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    fn name(&mut self, byte: u8) -> ScanPosition {
        match byte {
            b'\n' => self.name.clear(),
            b':' => {
                let line = self
                    .lines
                    .iter()
                    .position(|(name, _)| name.as_bytes() == self.name);
                let line = line.filter(|line| self.found[*line].is_none());
                self.name.clear();
                return line.map_or(ScanPosition::Other, |line| {
                    self.found[line] = Some(Vec::new());
                    ScanPosition::Numbers(line, None)
                });
            }
            _ if self.name.len() < NAME_MAX => self.name.push(byte),
            _ => {
                self.name.clear();
                return ScanPosition::Other;
            }
        }
        ScanPosition::Name
    }

    fn number(
        &mut self,
        line: usize,
        number: Option<u32>,
        byte: u8,
    ) -> Result<ScanPosition, StatusError> {
        if byte.is_ascii_digit() {
            let number = number
                .unwrap_or(0)
                .checked_mul(10)
                .and_then(|n| n.checked_add(u32::from(byte - b'0')));
            return Ok(ScanPosition::Numbers(
                line,
                Some(number.ok_or(StatusError::Malformed)?),
            ));
        }
        if !matches!(byte, b' ' | b'\t' | b'\n') {
            return Err(StatusError::Malformed);
        }
        if let (Some(number), Some(found)) = (number, &mut self.found[line]) {
            if found.len() == self.lines[line].1 {
                return Err(StatusError::TooMany);
            }
            found.push(number);
        }
        Ok(if byte == b'\n' {
            ScanPosition::Name
        } else {
            ScanPosition::Numbers(line, None)
        })
    }

    fn finish(self) -> Result<[Vec<u32>; N], StatusError> {
        // Without its newline the last number may be incomplete.
        if matches!(self.at, ScanPosition::Numbers(..)) || self.found.iter().any(Option::is_none) {
            return Err(StatusError::Malformed);
        }
        Ok(self.found.map(Option::unwrap_or_default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Name:\tUid:\\t0\nUmask:\t0022\nUid:\t1001\t1002\t1003\t1004\nGid:\t7\t8\t9\t10\n\
                        Groups:\t44 4 44 \nNSpid:\t12\t1\nVmSize:\t 1 kB\n";

    #[test]
    fn numbers_finds_lines_in_any_chunks_and_order() {
        for chunk in [1, 2, 3, 7, 4096] {
            let [uids, gids] =
                numbers_of(TEXT.as_bytes(), [("Uid", 4), ("Gid", 4)], chunk).unwrap();
            assert_eq!(
                (uids, gids),
                (vec![1001, 1002, 1003, 1004], vec![7, 8, 9, 10])
            );
            let [pids, groups] =
                numbers_of(TEXT.as_bytes(), [("NSpid", 32), ("Groups", 3)], chunk).unwrap();
            assert_eq!((pids, groups), (vec![12, 1], vec![44, 4, 44]));
            assert_eq!(
                numbers_of(TEXT.as_bytes(), [("Groups", 2)], chunk),
                Err(StatusError::TooMany)
            );
            assert_eq!(
                numbers_of(TEXT.as_bytes(), [("Umask", 1)], chunk),
                Ok([vec![22]])
            );
        }
    }

    #[test]
    fn numbers_fails_for_missing_or_malformed_lines() {
        for (text, line) in [
            (TEXT, "PPid"),
            (TEXT, "VmSize"),
            ("Uid:\t1\t-1\n", "Uid"),
            ("Uid:\t4294967296\n", "Uid"),
            ("Uid:\t1", "Uid"),
            ("", "Uid"),
            ("Uid\n", "Uid"),
        ] {
            assert_eq!(
                numbers_of(text.as_bytes(), [(line, 4)], 4096),
                Err(StatusError::Malformed),
                "{text:?} {line}"
            );
        }
        assert_eq!(
            numbers_of(b"Uid:\t4294967295\n", [("Uid", 1)], 3),
            Ok([vec![u32::MAX]])
        );
        assert_eq!(numbers_of(b"Groups:\t\n", [("Groups", 1)], 3), Ok([vec![]]));
    }

    #[test]
    fn numbers_reads_nothing_after_the_last_line() {
        let text = format!("{TEXT}Uid:\tnonsense\n");
        assert_eq!(
            numbers_of(text.as_bytes(), [("Uid", 4)], 4096),
            Ok([vec![1001, 1002, 1003, 1004]])
        );
    }
}
