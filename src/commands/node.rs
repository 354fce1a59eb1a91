//! Warnings about users, programs and files that a configuration names and that this node lacks or
//! exposes.

mod socket_unit;

#[cfg(any(test, fuzzing))]
pub(super) use socket_unit::fuzzing;

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::accounts::NameService;
use crate::config::{AuditFile, Config, Problem, exposures, socket_exposures};
use crate::listen::{first_unprivileged_port, read_first_unprivileged_port};
use crate::workload_rule::{AccountName, AccountState, ExeMatcher, OVERFLOW_ID};

const OTHERS_WRITE: u32 = 0o022;
/// Time limit of the metadata of a file.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);

/// Returns warnings about this node. None of them prevents the start, because what is missing may
/// appear. Blocks while the name service does not answer.
pub(super) fn warnings(config: &Config, service: &dyn NameService) -> Vec<Problem> {
    let mut states = BTreeMap::new();
    let mut warnings = accounts(config, service, &mut states);
    warnings.extend(config.shadowed(|name| {
        states
            .get(name)
            .copied()
            .unwrap_or(AccountState::Unanswered)
    }));
    warnings.extend(read_first_unprivileged_port().err().map(|error| {
        Problem {
            line: None,
            key: "listen.tcp".to_owned(),
            what: format!("which ports any user can take is not known: {error}"),
            fix: "make /proc/sys/net readable, and set net.ipv4.ip_unprivileged_port_start to 1024"
                .to_owned(),
        }
    }));
    warnings.extend(config.unprivileged_ports(first_unprivileged_port()));
    warnings.extend(programs(config));
    warnings.extend(files(config));
    warnings.extend(exposed_sockets(config));
    warnings.extend(socket_unit::warnings(config, Path::new("/")));
    warnings
}

/// Returns each way in which another user could change a file that the configuration names and the
/// daemon trusts (T38). The daemon does not use such a file.
pub(super) fn exposed(config: &Config) -> Vec<Problem> {
    let found = |path: &Path| Some((path.to_owned(), fs::metadata(path).ok()?));
    let ca_file = config.sts.ca_file.as_deref().and_then(found);
    let problems = ca_file
        .map(|(path, file)| exposures(&path, &file, "CA file"))
        .unwrap_or_default();
    problems
        .into_iter()
        .map(|problem| problem.with_key("sts.ca_file"))
        .collect()
}

fn accounts(
    config: &Config,
    service: &dyn NameService,
    states: &mut BTreeMap<AccountName, AccountState>,
) -> Vec<Problem> {
    let mut warnings = Vec::new();
    for (name, (key, line)) in config
        .workloads
        .iter()
        .flat_map(|workload| &workload.accounts)
    {
        let warning = |what: String, fix: &str| Problem {
            line: line.clone(),
            key: key.clone(),
            what,
            fix: fix.to_owned(),
        };
        let state = match service.id(name) {
            Ok(Some(id)) => AccountState::Id(id),
            Ok(None) => AccountState::Absent,
            Err(error) => {
                let what = format!("the lookup of the {name} failed: {}", error.desc());
                warnings.push(warning(
                    what,
                    "check /etc/nsswitch.conf and the services that it names",
                ));
                AccountState::Unanswered
            }
        };
        match state {
            AccountState::Id(OVERFLOW_ID) => warnings.push(warning(
                format!("the {name} has the number {OVERFLOW_ID}, which the kernel shows for an id that it cannot map"),
                "give the workload a user or group of its own: no caller matches this one",
            )),
            AccountState::Absent => warnings.push(warning(
                format!("the {name} does not exist on this node, so the rule matches no caller yet"),
                "correct the name, or create the account",
            )),
            AccountState::Id(_) | AccountState::Unanswered => {}
        }
        states.insert(name.clone(), state);
    }
    warnings
}

fn programs(config: &Config) -> impl Iterator<Item = Problem> {
    config.workloads.iter().filter_map(|workload| {
        let path = workload.rule.rule.exe.as_ref().map(ExeMatcher::path)?;
        let (what, fix) = program(path)?;
        Some(Problem {
            line: workload.line.clone(),
            key: "workload.exe".to_owned(),
            what,
            fix: fix.to_owned(),
        })
    })
}

/// Returns a warning for each way in which another user could put its own socket at an agent's
/// path. Whatever listens there identifies the callers.
fn exposed_sockets(config: &Config) -> Vec<Problem> {
    let mut warnings = Vec::new();
    for (key, path) in config.identity.agent_sockets() {
        let found = within_time(path, |path| Ok(socket_exposures(path)));
        let found = found.unwrap_or_else(|error| {
            let what = format!(
                "the directories of {} cannot be checked: {error}",
                path.display()
            );
            let fix = "move it to a file system that answers";
            vec![warning("", what, fix)]
        });
        warnings.extend(found.into_iter().map(|problem| problem.with_key(key)));
    }
    warnings
}

/// Returns a warning for each socket of an agent that does not exist. `check` reports this as a
/// failed step.
pub(super) fn missing_sockets(config: &Config) -> Vec<Problem> {
    let sockets = config.identity.agent_sockets().into_iter();
    let missing = sockets.filter(|(_, path)| {
        metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    });
    let missing = missing.map(|(key, path)| {
        let what = format!("{} does not exist", path.display());
        warning(key, what, "start the SPIFFE agent, or correct the path")
    });
    missing.collect()
}

/// Returns the metadata of a file.
fn metadata(path: &Path) -> io::Result<Metadata> {
    within_time(path, |path| fs::metadata(path))
}

/// Runs a call on a file. Fails with `TimedOut` if its file system does not answer: NFS, or a
/// user's FUSE mount (T25).
fn within_time<T: Send + 'static>(
    path: &Path,
    call: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (sender, result) = mpsc::channel();
    let path = path.to_owned();
    // The thread ends with the command.
    thread::spawn(move || drop(sender.send(call(&path))));
    result
        .recv_timeout(METADATA_TIMEOUT)
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Returns a warning about a key whose line is not known.
fn warning(key: &str, what: String, fix: &str) -> Problem {
    Problem {
        line: None,
        key: key.to_owned(),
        what,
        fix: fix.to_owned(),
    }
}

fn program(path: &Path) -> Option<(String, &'static str)> {
    let shown = path.display();
    match metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some((
            format!("{shown} does not exist, so the rule matches no caller yet"),
            "correct the path if it is wrong",
        )),
        Err(error) => Some((
            format!(
                "{shown} cannot be read, so callers that the rule may match are rejected until it can: {error}"
            ),
            "name a file that root can read, on a file system that answers",
        )),
        Ok(found) if !found.is_file() => Some((
            format!("{shown} is not a file, so the rule matches no caller"),
            "name the program's file",
        )),
        Ok(found)
            if found.uid() != 0
                || found.mode() & OTHERS_WRITE != 0
                || !exposures(path, &found, "program").is_empty() =>
        {
            Some((
                format!(
                    "{shown} can be changed by users other than root, so it proves nothing about its caller"
                ),
                "give it and the directories above it to root with mode 0755, or use `user` or `systemd_unit`",
            ))
        }
        Ok(_) => None,
    }
}

fn files(config: &Config) -> Vec<Problem> {
    let mut warnings = Vec::new();
    if let Some(path) = &config.sts.ca_file
        && let Err(error) = File::open(path)
    {
        let what = format!("{} cannot be read: {error}", path.display());
        warnings.push(warning(
            "sts.ca_file",
            what,
            "put the certificates there before the first request to this STS",
        ));
    }
    if let AuditFile::Path(path) = &config.audit.file
        && let Some(directory) = path.parent().filter(|directory| !directory.is_dir())
    {
        let what = format!("the directory {} does not exist", directory.display());
        warnings.push(warning(
            "audit.file",
            what,
            "create it, or mount it: until then audit records wait, and are lost beyond 8 MiB",
        ));
    }
    warnings
}

#[cfg(test)]
mod tests;
