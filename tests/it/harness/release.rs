//! The files of a release, made by `deploy/release` without the network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::counterparts::process::run;
use super::counterparts::{skip, tool};
use super::kubernetes::root_of;

/// Bounds two builds with all optimizations, on a machine that is busy with other tests.
const BUILD: Duration = Duration::from_secs(3600);
/// The time in all files of a release.
const EPOCH: &str = "1700000000";

/// A folder with results of `deploy/release`.
pub(crate) struct Release {
    out: PathBuf,
    /// The version of packages and image.
    version: String,
    /// The kinds of packages that the step `packages` makes.
    formats: &'static str,
}

/// Returns the path of a program in the folder of an earlier build, if the variable names one.
fn earlier(program: &str) -> Option<PathBuf> {
    let built = std::env::var_os("AWSVID_TEST_RELEASE")?;
    Some(Path::new(&built).join(program))
}

impl Release {
    /// Lays out a release in `out` with this program of the tests, without its symbols, and its
    /// libraries.
    ///
    /// Returns `None` after a printed skip if a tool is missing. In CI that is a panic.
    pub(crate) fn of_tests(out: &Path, program: &Path) -> Option<Self> {
        let release = Self::at(out)?;
        let [linked, image] = ["awsvid", "awsvid-static"].map(|name| out.join(name));
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(&linked).arg(program);
        run(strip, b"", Duration::from_secs(60)).success("strip");
        fs::copy(&linked, &image).expect("a copy of the program");
        let root = root_of(&out.join("linked"), &linked, "/usr/bin/awsvid");
        fs::rename(root, out.join("libraries")).expect("move the libraries");
        Some(release)
    }

    /// Builds the program of the packages into `out`, as the workflow does. The variable
    /// `AWSVID_TEST_RELEASE` names a folder with the program of an earlier build instead.
    pub(crate) fn built(out: &Path) -> Option<Self> {
        if let Some(program) = earlier("awsvid") {
            let release = Self::at(out)?;
            fs::copy(program, out.join("awsvid")).expect("the program of an earlier build");
            return Some(release);
        }
        for name in ["cargo-zigbuild", "cargo-auditable"] {
            tool(name)?;
        }
        let release = Self::at(out)?;
        release.run(&["build"]);
        Some(release)
    }

    fn at(out: &Path) -> Option<Self> {
        tool("nfpm")?;
        for name in ["strip", "buildah", "rpm", "dpkg-deb", "jq"] {
            if !Path::new("/usr/bin").join(name).exists() {
                skip(&format!("{name} is missing: run tests/counterparts/get"));
                return None;
            }
        }
        fs::create_dir_all(out).expect("a folder for a release");
        Some(Self {
            out: out.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            formats: "deb rpm",
        })
    }

    /// Gives packages and image another version.
    pub(crate) fn with_version(self, version: &str) -> Self {
        let version = version.to_owned();
        Self { version, ..self }
    }

    /// Limits packages to this kind.
    pub(crate) fn with_format(self, formats: &'static str) -> Self {
        Self { formats, ..self }
    }

    /// Runs these steps of `deploy/release`. Builds the image's program first if it is needed.
    pub(crate) fn run(&self, steps: &[&str]) {
        let program = self.out.join("awsvid-static");
        if steps.contains(&"image") && !program.exists() {
            match earlier("awsvid-static") {
                Some(built) => drop(fs::copy(built, program).expect("the earlier build")),
                None => self.run(&["static"]),
            }
        }
        self.run_in(Path::new(env!("CARGO_MANIFEST_DIR")), steps);
    }

    /// Runs these steps of the `deploy/release` in another copy of the source.
    pub(crate) fn run_in(&self, source: &Path, steps: &[&str]) {
        let mut command = Command::new(source.join("deploy/release"));
        command.args(steps).env("OUT", &self.out);
        command
            .env("VERSION", &self.version)
            .env("FORMATS", self.formats)
            .env("CARGO_NET_OFFLINE", "true")
            .env("SOURCE_DATE_EPOCH", EPOCH);
        run(command, b"", BUILD).success(&format!("deploy/release {}", steps.join(" ")));
    }

    /// Returns the path of a result.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    /// Returns the path of the only result whose name ends so.
    pub(crate) fn ending(&self, end: &str) -> PathBuf {
        let entries = fs::read_dir(&self.out).expect("the folder of the release");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let is_searched = |path: &PathBuf| path.to_str().is_some_and(|path| path.ends_with(end));
        let mut found: Vec<PathBuf> = paths.filter(is_searched).collect();
        assert!(found.len() == 1, "one result *{end}: {found:?}");
        found.remove(0)
    }
}
