use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

/// Less than the interval without events, so that only an event is in time.
const IN_TIME: Duration = Duration::from_secs(30);

/// A volume of a ConfigMap as the kubelet writes it: each file is a link through `..data`.
struct ConfigMapVolume {
    directory: TempDir,
    versions: usize,
}

impl ConfigMapVolume {
    fn new(text: &str) -> Self {
        let mut volume = Self {
            directory: tempfile::tempdir().unwrap(),
            versions: 0,
        };
        volume.write(&[("awsvid.toml", text), ("conf.d/a.toml", "")]);
        for name in ["awsvid.toml", "conf.d"] {
            symlink(format!("..data/{name}"), volume.path(name)).unwrap();
        }
        volume
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces all files at once, and removes the old ones.
    fn write(&mut self, files: &[(&str, &str)]) {
        self.versions += 1;
        let version = format!("..version_{}", self.versions);
        for (name, text) in files {
            let path = self.path(&version).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let old = fs::read_link(self.path("..data"));
        symlink(&version, self.path("..data_tmp")).unwrap();
        fs::rename(self.path("..data_tmp"), self.path("..data")).unwrap();
        if let Ok(old) = old {
            fs::remove_dir_all(self.path(old.to_str().unwrap())).unwrap();
        }
    }
}

const INCLUDE: &str = "include = \"conf.d/*.toml\"\n";

fn watch_on(path: &Path) -> ConfigWatch {
    ConfigWatch::new(path, FileThreads::default())
}

/// Changes files, of which the watch has read the content, and waits.
async fn reported(watch: &mut ConfigWatch, change: impl FnOnce()) -> bool {
    watch.skip_current().await;
    change();
    timeout(IN_TIME, watch.changed()).await.is_ok()
}

#[tokio::test]
async fn new_version_of_a_config_map_is_reported() {
    let mut volume = ConfigMapVolume::new(INCLUDE);
    let mut watch = watch_on(&volume.path("awsvid.toml"));
    let main = format!("{INCLUDE}[sts]\n");
    let versions: [&[(&str, &str)]; 3] = [
        &[("awsvid.toml", &main), ("conf.d/a.toml", "")],
        &[("awsvid.toml", &main), ("conf.d/a.toml", "# one role\n")],
        &[("awsvid.toml", &main), ("conf.d/b.toml", "# one role\n")],
    ];
    for files in versions {
        let is_reported = reported(&mut watch, || volume.write(files)).await;
        assert!(is_reported, "{files:?}");
    }
}

#[tokio::test]
async fn event_without_other_content_is_not_reported() {
    let mut volume = ConfigMapVolume::new(INCLUDE);
    let mut watch = watch_on(&volume.path("awsvid.toml"));
    watch.skip_current().await;
    volume.write(&[("awsvid.toml", INCLUDE), ("conf.d/a.toml", "")]);
    let brief = 5 * SETTLE_TIME;
    assert!(timeout(brief, watch.changed()).await.is_err());
    // The cancelled wait does not lose the next change.
    volume.write(&[("awsvid.toml", INCLUDE)]);
    assert!(timeout(IN_TIME, watch.changed()).await.is_ok());
}

#[tokio::test]
async fn files_of_an_editor_are_reported() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("awsvid.toml"), INCLUDE).unwrap();
    let mut watch = watch_on(&path("awsvid.toml"));
    let create = || {
        fs::create_dir(path("conf.d")).unwrap();
        fs::write(path("conf.d/a.toml"), "# a\n").unwrap();
    };
    assert!(reported(&mut watch, create).await);
    let rewrite = || fs::write(path("conf.d/a.toml"), "# b\n").unwrap();
    assert!(reported(&mut watch, rewrite).await);
    let replace = || {
        fs::write(path("new"), "# c\n").unwrap();
        fs::rename(path("new"), path("awsvid.toml")).unwrap();
    };
    assert!(reported(&mut watch, replace).await);
    assert!(reported(&mut watch, || fs::remove_file(path("awsvid.toml")).unwrap()).await);
}

#[tokio::test]
async fn ca_file_is_reported_and_loaded_content_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("awsvid.toml"), "").unwrap();
    let mut watch = watch_on(&path("awsvid.toml"));
    watch.follow_ca_file(Some(path("ca.pem")));
    let write = || fs::write(path("ca.pem"), "another certificate").unwrap();
    assert!(reported(&mut watch, write).await);
    fs::write(path("awsvid.toml"), "# loaded by SIGHUP\n").unwrap();
    watch.skip_current().await;
    assert!(timeout(5 * SETTLE_TIME, watch.changed()).await.is_err());
}

#[tokio::test]
async fn files_in_one_directory_keep_its_watch() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("awsvid.toml"), "").unwrap();
    fs::write(path("ca.pem"), "").unwrap();
    let mut watch = watch_on(&path("awsvid.toml"));
    watch.follow_ca_file(Some(path("ca.pem")));
    watch.skip_current().await;
    watch.follow_ca_file(None);
    let write = || fs::write(path("awsvid.toml"), "# a\n").unwrap();
    assert!(reported(&mut watch, write).await);
}
