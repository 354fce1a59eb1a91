//! A program's headers, as binutils' readelf prints them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::process::run;

/// Headers, segments, dynamic section and versions of symbols.
pub(super) struct Elf {
    printed: String,
}

impl Elf {
    pub(super) fn read(program: &Path) -> Self {
        let mut command = Command::new("readelf");
        command
            .args([
                "--wide",
                "--file-header",
                "--program-headers",
                "--dynamic",
                "--version-info",
            ])
            .arg(program)
            .env("LC_ALL", "C");
        let printed = run(command, b"", Duration::from_secs(60)).success("readelf");
        Self { printed }
    }

    /// Returns the same with another text.
    pub(super) fn replaced(&self, from: &str, to: &str) -> Self {
        assert!(self.printed.contains(from), "{from} in {}", self.printed);
        let printed = self.printed.replace(from, to);
        Self { printed }
    }

    pub(super) fn assert_hardened(&self) {
        let found = self.weaknesses();
        assert!(found.is_empty(), "{found:?} in {}", self.printed);
    }

    /// Returns the protections that the program lacks.
    pub(super) fn weaknesses(&self) -> Vec<&'static str> {
        let has = |begin: &str, rest: &str| {
            let lines = self.printed.lines().map(str::trim_start);
            lines
                .filter(|line| line.contains(begin))
                .any(|line| line.contains(rest))
        };
        let stack = self
            .printed
            .lines()
            .find(|line| line.trim_start().starts_with("GNU_STACK"));
        let flags = stack.and_then(|line| line.split_whitespace().nth(6));
        let table = [
            (has("Type:", "DYN"), "is not position-independent"),
            (has("GNU_RELRO", ""), "has no RELRO"),
            (
                has("(FLAGS", "NOW") || has("(BIND_NOW)", ""),
                "has no immediate binding",
            ),
            (!has("(RPATH)", "") && !has("(RUNPATH)", ""), "has an RPATH"),
            (flags == Some("RW"), "has an executable stack"),
        ];
        let weak = table.into_iter().filter(|(is_right, _)| !is_right);
        weak.map(|(_, weakness)| weakness).collect()
    }

    /// Returns the libraries that the program is linked with.
    pub(super) fn needed(&self) -> Vec<String> {
        let lines = self
            .printed
            .lines()
            .filter(|line| line.contains("(NEEDED)"));
        lines
            .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned()))
            .collect()
    }

    /// Returns the newest version of glibc that a symbol needs.
    pub(super) fn newest_glibc(&self) -> Option<(u32, u32)> {
        let version = |rest: &str| {
            let digits = |c: char| !c.is_ascii_digit() && c != '.';
            let mut numbers = rest.split(digits).next()?.split('.');
            Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
        };
        self.printed
            .split("GLIBC_")
            .skip(1)
            .filter_map(version)
            .max()
    }
}
