//! The daemon rejects a configuration that another user could change, and such a file that it names
//! (T38).

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::client::fetch;
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, PROGRAM};

const OTHER: u32 = 51_001;
const EX_CONFIG: Option<i32> = Some(78);

/// Returns a configuration for `uid` alone.
fn configuration(uid: u32) -> String {
    format!(
        "[identity]\nworkload_api_socket = \"unix:///nonexistent/agent.sock\"\n[sts]\nregion = \"eu-central-1\"\n\
         [[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = {uid}\n\
         [[role]]\nname = \"a\"\nspiffe_id = \"spiffe://example.org/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n"
    )
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

type Prepare = fn(&Path, &Path);

/// Returns ways to let another user change a file in a folder, and the daemon's error for each,
/// which calls the file `noun`.
fn cases(noun: &str) -> [(String, Prepare); 5] {
    let of_file = |text: &str| format!("{text} the {noun}");
    [
        (of_file("uid 51001 owns"), |_, file| {
            chown(file, Some(OTHER), None).unwrap()
        }),
        (of_file("every user of this node can write"), |_, file| {
            set_mode(file, 0o666)
        }),
        (of_file("gid 51001 can write"), |_, file| {
            chown(file, None, Some(OTHER)).unwrap();
            set_mode(file, 0o664);
        }),
        ("uid 51001 owns ".to_owned(), |folder, _| {
            chown(folder, Some(OTHER), None).unwrap()
        }),
        (
            "every user of this node can write to ".to_owned(),
            |folder, _| set_mode(folder, 0o777),
        ),
    ]
}

#[test]
fn exposed_configuration_ends_the_start() {
    if !root() {
        return;
    }
    for (words, prepare) in cases("configuration") {
        let folder = folder();
        let file = folder.path().join("awsvid.toml");
        fs::write(&file, "").unwrap();
        prepare(folder.path(), &file);
        let (status, log) = Daemon::run_to_exit(&[], folder.path(), &configuration(0));
        assert_eq!(status, EX_CONFIG, "{log}");
        assert!(
            log.contains(&words) && log.contains("; ch"),
            "{words}: {log}"
        );
    }
}

#[test]
fn exposed_configuration_is_rejected_by_reload() {
    if !root() {
        return;
    }
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", &configuration(54_321));
    let file = folder.path().join("awsvid.toml");
    // The file has become writable, and another user makes itself root's workload.
    set_mode(&file, 0o666);
    let write = format!(
        "text=$(sed 's/uid = 54321/uid = 0/' {0}); printf '%s\\n' \"$text\" >{0}",
        file.display()
    );
    let mut other = Command::new("setpriv");
    other.env_clear().env("PATH", "/usr/bin:/bin").args([
        "--reuid",
        "51001",
        "--clear-groups",
        "sh",
        "-euc",
        &write,
    ]);
    run(other, b"", Duration::from_secs(20)).success("another user's change");
    let changed = daemon.text();
    assert!(changed.contains("uid = 0\n"), "{changed}");
    assert!(!daemon.reload_text(&changed), "it took effect");
    assert!(
        daemon
            .log()
            .contains("every user of this node can write the configuration"),
        "{}",
        daemon.log()
    );
    let unix = || std::os::unix::net::UnixStream::connect(daemon.unix()).unwrap();
    assert_eq!(fetch(unix()).1["code"], "no_identity");
    set_mode(&file, 0o644);
    assert!(daemon.reload_text(&changed));
    assert_ne!(fetch(unix()).1["code"], "no_identity");
}

/// Another user could bind the socket while the agent is down, and name all callers.
#[test]
fn exposed_agent_socket_is_logged_at_the_start() {
    let folder = folder();
    let directory = folder.path().join("agent");
    fs::create_dir(&directory).unwrap();
    set_mode(&directory, 0o1777);
    let socket = directory.join("agent.sock").display().to_string();
    let text = configuration(54_321).replace("/nonexistent/agent.sock", &socket);
    let daemon = Daemon::start(folder.path(), "", &text);
    daemon.await_line(&[
        "the configuration has a warning",
        "identity.workload_api_socket: every user of this node can write to ",
        "put another socket there",
    ]);
}

/// Returns a configuration in which this file has the certificate of the STS.
fn trusting(ca_file: &Path) -> String {
    let sts = format!("[sts]\nendpoint = \"https://127.0.0.1:9\"\nca_file = {ca_file:?}\n");
    let text = configuration(0).replace("[sts]\nregion = \"eu-central-1\"\n", &sts);
    text.replace("[identity]\n", "[identity]\naudience = \"minio\"\n")
}

fn certificate() -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    rcgen::CertificateParams::new(Vec::new())
        .unwrap()
        .self_signed(&key)
        .unwrap()
        .pem()
}

/// The user that writes the file decides which server gets the workloads' tokens and which
/// credentials they get.
#[test]
fn exposed_ca_file_ends_start_and_reload() {
    if !root() {
        return;
    }
    for (words, prepare) in cases("CA file") {
        let folder = folder();
        let of_ca = folder.path().join("ca");
        fs::create_dir(&of_ca).unwrap();
        let file = of_ca.join("ca.pem");
        fs::write(&file, certificate()).unwrap();
        // With safe permissions it is used. A reload with a file that another user could have
        // written is rejected.
        let daemon = Daemon::start(folder.path(), "", &trusting(&file));
        prepare(&of_ca, &file);
        assert!(
            !daemon.reload_text(&daemon.text()),
            "{words}: it took effect"
        );
        assert!(daemon.log().contains(&words), "{words}: {}", daemon.log());
        drop(daemon);
        let (status, log) = Daemon::run_to_exit(&[], folder.path(), &trusting(&file));
        assert_eq!(status, EX_CONFIG, "{words}: {log}");
        assert!(
            log.contains(&words) && log.contains("; ch"),
            "{words}: {log}"
        );
        // The command reports the same without a start.
        let mut check = Command::new(PROGRAM);
        check
            .env_clear()
            .args(["config", "validate"])
            .arg(folder.path().join("awsvid.toml"));
        let checked = run(check, b"", Duration::from_secs(20));
        assert_eq!(checked.status.code(), EX_CONFIG, "{checked:?}");
        assert!(checked.stderr.contains(&words), "{checked:?}");
    }
}

/// The daemon accepts no workload token that another user has chosen.
#[test]
fn exposed_token_is_replaced() {
    if !root() {
        return;
    }
    let planted = "A".repeat(43);
    for owner in [OTHER, 0] {
        let folder = folder();
        let file = folder.path().join("token");
        fs::write(&file, &planted).unwrap();
        chown(&file, Some(owner), None).unwrap();
        let daemon = Daemon::start(
            folder.path(),
            "authorization = \"token\"",
            &configuration(0),
        );
        let is_planted = fs::read_to_string(&file).unwrap() == planted;
        assert_eq!(is_planted, owner == 0, "uid {owner}: {}", daemon.log());
        assert_eq!(
            daemon.log().contains("uid 51001 owns the token file"),
            owner != 0,
            "{}",
            daemon.log()
        );
    }
}

#[test]
fn kubernetes_volume_is_accepted() {
    if !root() {
        return;
    }
    let folder = folder();
    // As the kubelet makes it: mode 0777, links, and read-only in the container.
    let volume = folder.path().join("volume");
    fs::create_dir_all(volume.join("..2026_11_29")).unwrap();
    set_mode(&volume, 0o777);
    symlink("..2026_11_29", volume.join("..data")).unwrap();
    symlink("..data/awsvid.toml", volume.join("awsvid.toml")).unwrap();
    symlink("volume/awsvid.toml", folder.path().join("awsvid.toml")).unwrap();
    fs::write(volume.join("..2026_11_29/ca.pem"), certificate()).unwrap();
    symlink("..data/ca.pem", volume.join("ca.pem")).unwrap();
    let configuration = trusting(&volume.join("ca.pem"));
    let mount = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";
    let volume = volume.to_str().unwrap();
    let words = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-euc",
        mount,
        volume,
    ];
    Daemon::start_behind(&words, folder.path(), "", &configuration);
    // The same volume, but writable.
    let (status, log) = Daemon::run_to_exit(&[], folder.path(), &configuration);
    assert_eq!(status, EX_CONFIG, "{log}");
    assert!(
        log.contains(&format!("every user of this node can write to {volume}")),
        "{log}"
    );
}
