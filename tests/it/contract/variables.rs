//! The environment variables in configuration.md are those that the daemon reads.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::lists::{code, table};
use crate::harness::counterparts::process::{await_some, run};
use crate::harness::counterparts::{folder, skip};
use crate::harness::daemon::{Daemon, PROGRAM};

const CONFIGURATION: &str = include_str!("../../../deploy/docs/configuration.md");

/// Variables that libraries have for their own developers, and what each is for.
const OF_LIBRARIES: [(&str, &str); 8] = [
    (
        "AWS_EXECUTION_ENV",
        "the environment that the SDK names in its User-Agent",
    ),
    (
        "AWS_LAMBDA_FUNCTION_NAME",
        "the SDK's protection from recursion in AWS Lambda",
    ),
    ("_X_AMZN_TRACE_ID", "the same"),
    (
        "NO_COLOR",
        "the default for colours, which the daemon replaces",
    ),
    (
        "OPENSSL_IA32CAP",
        "masks features of the processor, for tests of the TLS library",
    ),
    ("RUST_MIN_STACK", "the stacks of new threads"),
    (
        "SMITHY_CLIENT_SDK_CUSTOM_PARTITION",
        "AWS's partitions, for tests of the SDK",
    ),
    (
        "TOKIO_UNSTABLE_SHARDED_BLOCKING_QUEUE",
        "a trial of tokio's",
    ),
];

/// The last variable that the SDK reads for a call.
const LAST_OF_CALL: &str = "_X_AMZN_TRACE_ID";
const TIMEOUT: Duration = Duration::from_secs(60);

/// Writes down the name of each variable that the program reads.
const GETENV: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>
char *getenv(const char *name) {
    char *(*next)(const char *) = (char *(*)(const char *))dlsym(RTLD_NEXT, "getenv");
    char line[256];
    size_t length = strnlen(name, sizeof line - 1);
    memcpy(line, name, length);
    line[length] = '\n';
    int file = open(NAMES, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file >= 0) {
        if (write(file, line, length + 1) < 0) {}
        close(file);
    }
    return next(name);
}
"#;

/// Builds the library, which writes to `names`.
fn library(folder: &Path, names: &Path) -> PathBuf {
    let (source, library) = (folder.join("getenv.c"), folder.join("getenv.so"));
    fs::write(&source, GETENV).unwrap();
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-o"]).arg(&library);
    compile.arg(format!("-DNAMES=\"{}\"", names.display()));
    compile.arg(source).arg("-ldl");
    run(compile, b"", TIMEOUT).success("cc");
    library
}

/// Returns the variables in the first cells of the first table below `heading`.
fn documented(heading: &str) -> BTreeSet<String> {
    let rows = table(CONFIGURATION, heading).into_iter();
    rows.flat_map(|row| code(row[0])).collect()
}

#[test]
fn variables_are_those_of_the_document() {
    if !Path::new("/usr/bin/cc").exists() {
        return skip("cc is missing: install gcc");
    }
    let folder = folder();
    let names = folder.path().join("names");
    let preload = format!("LD_PRELOAD={}", library(folder.path(), &names).display());
    let words = ["env", preload.as_str(), "LISTEN_FDS=0"];
    // AWS's own STS, for which the daemon needs the system's certificates.
    let daemon = Daemon::start_behind(&words, folder.path(), "", super::CONFIGURATION);
    assert_eq!(super::fetch(daemon.tcp(), super::GOOD).status, 403);
    await_some("the SDK builds a call to STS", TIMEOUT, || {
        let read = fs::read_to_string(&names).unwrap_or_default();
        read.contains(LAST_OF_CALL).then_some(())
    });
    drop(daemon);
    // Without `--config`, and without the keys that have variables. It has no STS either.
    let path = folder.path().join("broker.toml");
    fs::write(&path, "[identity]\nsource = \"spiffe-broker\"\n").unwrap();
    let mut command = Command::new("env");
    command.env_clear().arg(&preload).arg(PROGRAM).arg("serve");
    command.env("AWSVID_CONFIG", path);
    let output = run(command, b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(78), "{output:?}");

    let read = fs::read_to_string(names).unwrap();
    // The same name in small letters counts too.
    let mut read: BTreeSet<String> = read.lines().map(str::to_uppercase).collect();
    let documented: BTreeSet<String> = ["\n### Proxies and TLS\n", "\n## Environment variables\n"]
        .into_iter()
        .flat_map(documented)
        .collect();
    let unread: Vec<&String> = documented.difference(&read).collect();
    assert!(unread.is_empty(), "documented, and not read: {unread:?}");
    for (name, purpose) in OF_LIBRARIES {
        assert!(read.remove(name), "not read: {name} ({purpose})");
    }
    read.retain(|name| !documented.contains(name));
    assert!(read.is_empty(), "read, and not documented: {read:?}");
}
