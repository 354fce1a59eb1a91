//! The machines on which the tests try awsvid, and the table of them in the documents.

use serde_json::Value;

use super::stock_machine::StockMachine;
use super::unit_caller::{ExpectedAnswer, UnitCaller};
use crate::harness::documents;
use crate::harness::machine::MachineStart;

/// A kind of machine: a row of the table.
#[derive(Debug)]
pub(super) struct Distribution {
    /// The first cell of its row.
    pub(super) name: &'static str,
    pub(super) suite: &'static str,
    /// Words on the kernel's command line.
    pub(super) boot: &'static str,
    /// Whether its kernel and its cgroups let awsvid attest callers over TCP.
    pub(super) attests_tcp: bool,
}

/// All machines. The words for systemd select v1 cgroups, in addition to v2 or alone.
pub(super) const DISTRIBUTIONS: [Distribution; 6] = [
    Distribution {
        name: "Debian 13",
        suite: "trixie",
        boot: "",
        attests_tcp: true,
    },
    Distribution {
        name: "Debian 12",
        suite: "bookworm",
        boot: "",
        attests_tcp: true,
    },
    Distribution {
        name: "Debian 11",
        suite: "bullseye",
        boot: "",
        attests_tcp: true,
    },
    Distribution {
        name: "Debian testing",
        suite: "forky",
        boot: "",
        attests_tcp: true,
    },
    Distribution {
        name: "Debian 12, cgroup v1 and v2",
        suite: "bookworm",
        boot: "systemd.unified_cgroup_hierarchy=0",
        attests_tcp: true,
    },
    Distribution {
        name: "Debian 12, cgroup v1 only",
        suite: "bookworm",
        boot: "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1",
        attests_tcp: false,
    },
];

/// The facts of one row, as the daemon on that machine reports them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServedCallers {
    kernel: String,
    systemd: String,
    pub(super) unix: &'static str,
    pub(super) tcp: bool,
    pub(super) by_process: bool,
    /// Whether awsvid sees cgroups, which is not a column.
    pub(super) cgroups: bool,
}

impl ServedCallers {
    /// Reads them from a daemon whose source attests processes.
    pub(super) fn read(stock: &mut StockMachine) -> Self {
        let status = stock
            .read("curl --silent --unix-socket /run/awsvid/status.sock http://localhost/status");
        let status: Value =
            serde_json::from_str(&status).unwrap_or_else(|error| panic!("{error} in {status}"));
        let missing = status["unsupported_kernel"].to_string();
        let unix = match () {
            () if missing.contains("all callers are rejected on the unix socket") => "no",
            () if missing.contains("callers in containers are rejected") => "outside containers",
            () => "yes",
        };
        let version = stock.read("uname --kernel-release; systemctl --version | head -n 1");
        let mut words = version.split([' ', '\n', '.']);
        let kernel: Vec<&str> = words.by_ref().take(2).collect();
        let systemd = words.skip_while(|word| *word != "systemd").nth(1);
        Self {
            kernel: kernel.join("."),
            systemd: systemd.expect("systemd's version").to_owned(),
            unix,
            tcp: !missing.contains("callers over TCP are rejected"),
            by_process: status["counts_executions"] == true,
            cgroups: !missing.contains("no cgroup v2 tree is mounted"),
        }
    }

    /// Returns what this machine's daemon answers the caller on the unix socket.
    pub(super) fn unix_answer(&self, caller: &UnitCaller) -> Option<ExpectedAnswer> {
        match self.unix {
            "outside containers" if caller.in_container => {
                Some(ExpectedAnswer::Rejected("unsupported_kernel"))
            }
            _ => caller.unix.map(|answer| self.known(caller, answer)),
        }
    }

    /// Returns what it answers the caller over TCP.
    pub(super) fn tcp_answer(&self, caller: &UnitCaller) -> Option<ExpectedAnswer> {
        match self.tcp {
            true => caller.tcp,
            false => caller
                .tcp
                .map(|_| ExpectedAnswer::Rejected("unsupported_kernel")),
        }
    }

    /// Returns the answer where awsvid may not see cgroups.
    fn known(&self, caller: &UnitCaller, answer: ExpectedAnswer) -> ExpectedAnswer {
        match caller.by_cgroup && !self.cgroups {
            true => ExpectedAnswer::Rejected("no_identity"),
            false => answer,
        }
    }

    /// Returns the row of the documents' table.
    fn row(&self, name: &str) -> String {
        let word = |served: bool| if served { "yes" } else { "no" };
        let Self {
            kernel,
            systemd,
            unix,
            tcp,
            by_process,
            ..
        } = self;
        // A pod's listener needs the same of the kernel as TCP on the host.
        let [tcp, by_process] = [*tcp, *by_process].map(word);
        format!("| {name} | {kernel} | {systemd} | {unix} | {tcp} | {tcp} | {by_process} |")
    }

    pub(super) fn assert_documented(&self, distribution: &Distribution) {
        assert_eq!(self.tcp, distribution.attests_tcp, "{self:?}");
        let page = std::fs::read_to_string(documents::path("install-vm.md")).unwrap();
        let row = self.row(distribution.name);
        assert!(page.lines().any(|line| line == row), "{row}");
    }
}

impl Distribution {
    /// Returns how the machine starts. Another command line needs a boot.
    pub(super) fn start(&self) -> MachineStart<'static> {
        match self.boot {
            "" => MachineStart::Resumed,
            words => MachineStart::Booted(words),
        }
    }

    /// Returns the machine with this name.
    pub(super) fn named(name: &str) -> &'static Self {
        let found = DISTRIBUTIONS.iter().find(|one| one.name == name);
        found.unwrap_or_else(|| panic!("{name} is not in the list"))
    }
}

/// Each row of the documents is one of these machines, and each machine has a row.
#[test]
fn documented_machines_are_those_of_the_tests() {
    let page = std::fs::read_to_string(documents::path("install-vm.md")).unwrap();
    let (_, section) = page.split_once("### Tried machines").expect("the heading");
    let rows: Vec<&str> = section
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .filter_map(|row| row.trim_start_matches("| ").split(" |").next())
        .collect();
    let names: Vec<&str> = DISTRIBUTIONS.iter().map(|one| one.name).collect();
    assert_eq!(rows, names);
}
