//! A cgroup of a node's own in every cgroup hierarchy of this computer, be they v1, v2 or both.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::cgroup::CgroupTree;

/// The directory in which they are mounted.
const DIRECTORY: &str = "/sys/fs/cgroup";

/// The same cgroup in all hierarchies.
pub(super) struct Hierarchies {
    cgroups: Vec<CgroupTree>,
    mounts: String,
}

impl Hierarchies {
    pub(super) fn create(number: u32) -> io::Result<Self> {
        let all = Mount::all();
        // Several are mounted side by side in a directory of their own.
        let in_subdirectories = all.iter().all(|mount| mount.point != Path::new(DIRECTORY));
        let mounts = if in_subdirectories {
            "tmpfs mode=0755,nosuid,nodev .\n"
        } else {
            ""
        };
        let mut created = Self {
            cgroups: Vec::new(),
            mounts: mounts.to_owned(),
        };
        for mount in all {
            let parent = mount.own_cgroup();
            created
                .cgroups
                .push(CgroupTree::create(&parent, &format!("node-{number}"))?);
            let cgroup = created.cgroups.last().expect("the new one").path();
            created.mounts.push_str(&mount.line());
            // A new cgroup of v1's cpuset accepts a process only after these files are set.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if mount.kind == "cgroup" && cgroup.join(file).exists() {
                    fs::write(cgroup.join(file), fs::read(parent.join(file))?)?;
                }
            }
        }
        Ok(created)
    }

    /// Returns for each the file that a process writes to in order to enter it.
    pub(super) fn procs(&self) -> impl Iterator<Item = PathBuf> {
        self.cgroups
            .iter()
            .map(|cgroup| cgroup.path().join("cgroup.procs"))
    }

    /// Returns the mounts that `boot.sh` makes, so that these are the roots.
    pub(super) fn mounts(&self) -> &str {
        &self.mounts
    }
}

/// A cgroup file system that is mounted on this computer.
struct Mount {
    point: PathBuf,
    /// The directory of the hierarchy at which the mount begins.
    root: String,
    kind: String,
    options: String,
}

impl Mount {
    fn all() -> Vec<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
        let parse = |line: &str| {
            let (mount, source) = line.split_once(" - ")?;
            let (mount, source): (Vec<_>, Vec<_>) =
                (mount.split(' ').collect(), source.split(' ').collect());
            let options = source
                .get(2)?
                .split(',')
                .filter(|option| *option != "rw")
                .collect::<Vec<_>>()
                .join(",");
            source[0].starts_with("cgroup").then(|| Self {
                point: mount[4].into(),
                root: mount[3].to_owned(),
                kind: source[0].to_owned(),
                options,
            })
        };
        let mut found: Vec<Self> = mounts.lines().filter_map(parse).collect();
        // A hierarchy that is mounted twice is one.
        found.dedup_by(|a, b| (&a.kind, &a.options) == (&b.kind, &b.options));
        found
    }

    /// Returns the parent of new cgroups. v1: the one that this process is in, with the limits that
    /// it has. v2: the root, which alone may have both processes and cgroups with controllers.
    fn own_cgroup(&self) -> PathBuf {
        let own = fs::read_to_string("/proc/self/cgroup").expect("/proc");
        let path = own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let same = |option: &str| {
                controllers
                    .split(',')
                    .any(|controller| controller == option)
            };
            (self.kind == "cgroup" && self.options.split(',').any(same)).then(|| path.to_owned())
        });
        let path = path.unwrap_or_else(|| self.root.clone());
        let below = path
            .strip_prefix(self.root.trim_end_matches('/'))
            .unwrap_or_default();
        self.point.join(below.trim_start_matches('/'))
    }

    fn line(&self) -> String {
        let directory = self
            .point
            .strip_prefix(DIRECTORY)
            .unwrap_or(Path::new(""))
            .display()
            .to_string();
        let options = match &*self.options {
            "" => "rw".to_owned(),
            options => options.replace("name=", "none,name="),
        };
        format!(
            "{} {options} {}\n",
            self.kind,
            if directory.is_empty() {
                "."
            } else {
                &directory
            }
        )
    }
}
