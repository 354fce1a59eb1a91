//! A directory of users beyond the local files, which the name service queries through nss-systemd.
//! It can know a user, fail, or not respond at all.
//!
//! The interface is that of `io.systemd.UserDatabase` (systemd's "User/Group Record Lookup API via
//! Varlink").

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use serde_json::{Value, json};

use super::counterparts::skip;

const SERVICE: &str = "io.example.Directory";
const MODULE: &str = "libnss_systemd.so.2";
/// Mounts the directory's files over this computer's, for one process and its children.
const ENTER: &str = r#"for name in passwd group nsswitch.conf; do mount --bind "$0/$name" "/etc/$name"; done
mount --bind "$0/run" /run
exec "$@""#;

/// The directory's response for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Account {
    /// The name has this number.
    Id(u32),
    /// The directory returns an error.
    Fails,
    /// No response, until this is changed.
    Hangs,
}

/// A directory that ends with the value.
pub(crate) struct Directory {
    folder: PathBuf,
    shared: Arc<DirectoryState>,
}

#[derive(Default)]
struct DirectoryState {
    accounts: Mutex<BTreeMap<String, Account>>,
    changed: Condvar,
}

impl Directory {
    /// Starts it with no accounts, and root as the only local user. Its files are below `folder`.
    /// Returns `None` after a printed skip if this computer lacks the module.
    pub(crate) fn start(folder: &Path) -> Option<Self> {
        let libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"].map(Path::new);
        let below = libraries.iter().flat_map(|path| {
            fs::read_dir(path)
                .into_iter()
                .flatten()
                .filter_map(Result::ok)
        });
        let folders = libraries
            .iter()
            .map(|path| path.to_path_buf())
            .chain(below.map(|entry| entry.path()));
        if !folders
            .into_iter()
            .any(|folder| folder.join(MODULE).exists())
        {
            skip(&format!("{MODULE} is missing: install libnss-systemd"));
            return None;
        }
        let folder = folder.join("directory");
        let sockets = folder.join("run/systemd/userdb");
        fs::create_dir_all(&sockets).expect("a folder");
        let files = [
            ("passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("group", "root:x:0:\n"),
            (
                "nsswitch.conf",
                "passwd: files systemd\ngroup: files systemd\n",
            ),
        ];
        for (name, text) in files {
            fs::write(folder.join(name), text).expect("a file");
        }
        let listener = UnixListener::bind(sockets.join(SERVICE)).expect("a socket");
        let shared = Arc::<DirectoryState>::default();
        let answering = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = answering.clone();
                thread::spawn(move || shared.serve(stream));
            }
        });
        Some(Self { folder, shared })
    }

    /// Sets the response for the user and the group of this name from now on.
    pub(crate) fn set(&self, name: &str, account: Account) {
        self.shared
            .accounts
            .lock()
            .unwrap()
            .insert(name.to_owned(), account);
        self.shared.changed.notify_all();
    }

    /// Adds a line to the local `/etc/passwd`.
    pub(crate) fn add_local(&self, line: &str) {
        let mut file = fs::OpenOptions::new()
            .append(true)
            .open(self.folder.join("passwd"))
            .expect("the file");
        writeln!(file, "{line}").expect("written");
    }

    /// Returns words in front of a command of root that make it use this directory and these local
    /// files.
    pub(crate) fn words(&self) -> Vec<&str> {
        let folder = self.folder.to_str().expect("a path in UTF-8");
        vec![
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-euc",
            ENTER,
            folder,
        ]
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let mut accounts = self.shared.accounts.lock().unwrap();
        accounts
            .values_mut()
            .for_each(|account| *account = Account::Fails);
        self.shared.changed.notify_all();
    }
}

impl DirectoryState {
    fn serve(&self, stream: UnixStream) {
        let mut stream = BufReader::new(stream);
        let mut request = Vec::new();
        while stream
            .read_until(0, &mut request)
            .is_ok_and(|read| read > 0)
        {
            request.pop();
            let request: Value =
                serde_json::from_slice(&std::mem::take(&mut request)).expect("a request in JSON");
            let mut answer = self.answer(&request).to_string().into_bytes();
            answer.push(0);
            if stream.get_mut().write_all(&answer).is_err() {
                return;
            }
        }
    }

    fn answer(&self, request: &Value) -> Value {
        let parameters = &request["parameters"];
        let failed = |error: &str| json!({"error": format!("io.systemd.UserDatabase.{error}"), "parameters": {}});
        let accounts = self.accounts.lock().unwrap();
        let method = request["method"].as_str().unwrap_or_default();
        let name = parameters["userName"]
            .as_str()
            .or(parameters["groupName"].as_str())
            .map(str::to_owned);
        let Some(name) = name else {
            return failed("NoRecordFound");
        };
        let hangs =
            |accounts: &mut BTreeMap<String, Account>| accounts.get(&name) == Some(&Account::Hangs);
        let accounts = self.changed.wait_while(accounts, hangs).unwrap();
        let is_user = method.ends_with(".GetUserRecord");
        match accounts.get(&name) {
            Some(Account::Id(_)) if method.ends_with(".GetMemberships") => failed("NoRecordFound"),
            Some(Account::Id(id)) => {
                let record = match is_user {
                    true => json!({"userName": name, "uid": id, "gid": id, "service": SERVICE}),
                    false => json!({"groupName": name, "gid": id, "service": SERVICE}),
                };
                json!({"parameters": {"record": record, "incomplete": false}})
            }
            Some(Account::Fails | Account::Hangs) => failed("ServiceNotAvailable"),
            None => failed("NoRecordFound"),
        }
    }
}
