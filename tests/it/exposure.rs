//! A configuration that another user could change is not used (attack 38).

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::client::ask;
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;

const OTHER: u32 = 51_001;
const EX_CONFIG: Option<i32> = Some(78);

/// For `uid` alone.
fn configuration(uid: u32) -> String {
    format!(
        "[identity]\nsocket = \"unix:///nonexistent/agent.sock\"\n[sts]\nregion = \"eu-central-1\"\n\
         [[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = {uid}\n\
         [[role]]\nname = \"a\"\nspiffe_id = \"spiffe://example.org/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n"
    )
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

type Prepare = fn(&Path, &Path);

#[test]
fn a_file_or_folder_of_another_user_ends_the_start() {
    if !root() {
        return;
    }
    let cases: [(&str, Prepare); 5] = [
        ("uid 51001 owns the configuration", |_, file| chown(file, Some(OTHER), None).unwrap()),
        ("every user of this node can write the configuration", |_, file| set_mode(file, 0o666)),
        ("gid 51001 can write the configuration", |_, file| {
            chown(file, None, Some(OTHER)).unwrap();
            set_mode(file, 0o664);
        }),
        ("uid 51001 owns ", |folder, _| chown(folder, Some(OTHER), None).unwrap()),
        ("every user of this node can write to ", |folder, _| set_mode(folder, 0o777)),
    ];
    for (words, prepare) in cases {
        let folder = folder();
        let file = folder.path().join("awsvid.toml");
        fs::write(&file, "").unwrap();
        prepare(folder.path(), &file);
        let (status, log) = Daemon::refused(&[], folder.path(), &configuration(0));
        assert_eq!(status, EX_CONFIG, "{log}");
        assert!(log.contains(words) && log.contains("; ch"), "{words}: {log}");
    }
}

#[test]
fn what_another_user_has_written_does_not_take_effect() {
    if !root() {
        return;
    }
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", &configuration(54_321));
    let file = folder.path().join("awsvid.toml");
    // Somebody has made it writable, and another user makes itself root's workload.
    set_mode(&file, 0o666);
    let write = format!("text=$(sed 's/uid = 54321/uid = 0/' {0}); printf '%s\\n' \"$text\" >{0}", file.display());
    let mut other = Command::new("setpriv");
    other.env_clear().env("PATH", "/usr/bin:/bin").args(["--reuid", "51001", "--clear-groups", "sh", "-euc", &write]);
    run(other, b"", Duration::from_secs(20)).success("another user's change");
    let changed = daemon.text();
    assert!(changed.contains("uid = 0\n"), "{changed}");
    assert!(!daemon.reload_text(&changed), "it took effect");
    assert!(daemon.log().contains("every user of this node can write the configuration"), "{}", daemon.log());
    let unix = || std::os::unix::net::UnixStream::connect(daemon.unix()).unwrap();
    assert_eq!(ask(unix()).1["code"], "no_identity");
    set_mode(&file, 0o644);
    assert!(daemon.reload_text(&changed));
    assert_ne!(ask(unix()).1["code"], "no_identity");
}

#[test]
fn a_volume_of_kubernetes_is_taken() {
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
    let mount = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";
    let volume = volume.to_str().unwrap();
    let words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", mount, volume];
    Daemon::start_behind(&words, folder.path(), "", &configuration(0));
    // The same where it can be written to.
    let (status, log) = Daemon::refused(&[], folder.path(), &configuration(0));
    assert_eq!(status, EX_CONFIG, "{log}");
    assert!(log.contains(&format!("every user of this node can write to {volume}")), "{log}");
}
