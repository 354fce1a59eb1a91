//! The addresses of the systemd unit `awsvid.socket`, which the configuration has to name as well.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::config::{Config, Problem};

#[cfg(any(test, fuzzing))]
pub(in crate::commands) mod fuzzing;

const UNIT: &str = "awsvid.socket";
/// Directories of units, by their precedence.
const DIRECTORIES: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

/// Returns a warning for each address of the unit that `[listen]` does not name. `root` is the root
/// directory.
pub(super) fn warnings(config: &Config, root: &Path) -> Vec<Problem> {
    let listen = &config.listen;
    let is_named = |address: &String| {
        let is_path = |path: &PathBuf| path.as_os_str() == address.as_str();
        let sockets = listen.unix.iter().chain(&listen.status);
        let mut tcp = listen.tcp.iter().chain(&listen.admin);
        sockets.into_iter().any(is_path)
            || address
                .parse::<SocketAddr>()
                .is_ok_and(|address| tcp.any(|one| *one == address))
    };
    let unnamed = addresses(root)
        .into_iter()
        .filter(|address| !is_named(address));
    unnamed
        .map(|address| Problem {
            line: None,
            key: "listen".to_owned(),
            what: format!("{UNIT} has the address {address}, so awsvid rejects its callers"),
            fix: format!("add it here, or remove it there: systemctl edit {UNIT}"),
        })
        .collect()
}

/// Returns the addresses of the unit, with its drop-in files.
fn addresses(root: &Path) -> Vec<String> {
    let directories = || DIRECTORIES.iter().map(|directory| root.join(directory));
    let Some(unit) =
        directories().find_map(|directory| fs::read_to_string(directory.join(UNIT)).ok())
    else {
        return Vec::new();
    };
    // Files of the same name: the first directory wins.
    let mut drop_ins: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in directories() {
        let entries = fs::read_dir(directory.join(format!("{UNIT}.d")));
        for entry in entries.into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|kind| kind == "conf") {
                drop_ins.entry(entry.file_name()).or_insert(entry.path());
            }
        }
    }
    let drop_ins = drop_ins
        .values()
        .map(|path| fs::read_to_string(path).unwrap_or_default());
    parse(std::iter::once(unit).chain(drop_ins))
}

/// Parses the texts of the unit and its drop-in files.
fn parse(texts: impl Iterator<Item = String>) -> Vec<String> {
    let mut addresses = Vec::new();
    for text in texts {
        for line in text.lines() {
            match line
                .split_once('=')
                .map(|(key, value)| (key.trim(), value.trim()))
            {
                // An empty value removes those before it.
                Some(("ListenStream", "")) => addresses.clear(),
                Some(("ListenStream", address)) => addresses.push(address.to_owned()),
                Some(_) | None => {}
            }
        }
    }
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../../deploy/systemd/awsvid.socket");

    fn config(listen: &str) -> Config {
        let text = format!(
            "[listen]\n{listen}\n[identity]\nworkload_api_socket = \"unix:///a\"\n[sts]\nregion = \"eu-central-1\"\n\
             [[workload]]\nspiffe_id = \"spiffe://t/a\"\nuid = 1\n\
             [[role]]\nname = \"a\"\nspiffe_id = \"spiffe://t/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n"
        );
        Config::parse(&text, &|_| None).unwrap().config
    }

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn addresses_that_only_the_unit_has_are_reported() {
        let root = tempfile::tempdir().unwrap();
        let unnamed = |listen: &str| -> Vec<String> {
            let problems = warnings(&config(listen), root.path());
            problems
                .into_iter()
                .map(|problem| problem.what.split(' ').nth(4).unwrap().to_owned())
                .collect()
        };
        assert_eq!(unnamed("tcp = []"), [""; 0], "without the unit");
        write(root.path(), "lib/systemd/system/awsvid.socket", SHIPPED);
        assert_eq!(unnamed(""), [""; 0]);
        assert_eq!(unnamed("tcp = []"), ["127.0.0.1:974,", "[::1]:974,"]);
        assert_eq!(
            unnamed("unix = \"/run/a.sock\""),
            ["/run/awsvid/awsvid.sock,"]
        );

        let drop_in = "[Socket]\nListenStream=\nListenStream=/run/awsvid/awsvid.sock\n";
        write(
            root.path(),
            "etc/systemd/system/awsvid.socket.d/override.conf",
            drop_in,
        );
        assert_eq!(unnamed("tcp = []"), [""; 0]);
        // A file of the same name in another directory has no effect, one of another name has.
        let more = "[Socket]\nListenStream = 975\n";
        write(
            root.path(),
            "run/systemd/system/awsvid.socket.d/override.conf",
            more,
        );
        assert_eq!(unnamed(""), [""; 0]);
        write(
            root.path(),
            "run/systemd/system/awsvid.socket.d/port.conf",
            more,
        );
        assert_eq!(unnamed(""), ["975,"]);
    }
}
