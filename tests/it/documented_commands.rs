//! Runs the command blocks of all documents, here or by a test that this file names. Every other
//! block is read by the program that it is for.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::spire::Spire;
use crate::harness::counterparts::{folder, root, skip, tool};
use crate::harness::daemon::PROGRAM;
use crate::harness::documents::{Block, block, blocks, pages};

mod filters;
mod formats;

const TIMEOUT: Duration = Duration::from_secs(60);
/// The parent of entries in the documents, whose last part depends on the installation.
const PARENT: &str = "spiffe://example.org/spire/agent/...";
const AUDIT_LOG: &str = "/var/log/awsvid/audit.log";

/// How a block is tested.
#[derive(Debug, Clone, Copy)]
enum TestMethod {
    /// By a shell with a configuration, an audit log and `awsvid`.
    ByShell,
    /// By a real SPIRE server.
    BySpire,
    /// By the AWS CLI, which parses the command and calls nothing.
    ByAwsCli,
    /// By this function of this file of tests/it.
    In(&'static str, &'static str),
    /// Not at all, for this reason.
    Not(&'static str),
}

use TestMethod::{ByAwsCli, ByShell, BySpire, In, Not};

const INSTALLATION: TestMethod = In("systemd.rs", "documented_installation_works");
const FIRST_WORKLOAD: TestMethod = In(
    "systemd/documented.rs",
    "documented_first_workload_gets_credentials",
);
const UPGRADE: TestMethod = In(
    "systemd/documented.rs",
    "documented_upgrade_interrupts_no_caller",
);
const ROLLBACK: TestMethod = In("systemd.rs", "documented_rollback_interrupts_no_caller");
const EXISTING_SPIRE: TestMethod = In(
    "kubernetes/existing_spire.rs",
    "helm_installs_and_removes_awsvid",
);
const NODE: TestMethod = In("kubernetes/documented.rs", "documented_commands_work");
const DEV: TestMethod = In("dev.rs", "dev_gives_cli_its_role_despite_other_settings");
const AT_AWS: TestMethod = Not(
    "only AWS's own STS answers it; tests/it/dev.rs runs the same command at that of awsvid dev",
);

/// Each command block: its page, its first words, how it is tested.
const COMMANDS: &[(&str, &str, TestMethod)] = &[
    ("install-vm.md", "cargo build --release", INSTALLATION),
    ("install-vm.md", "spire-server entry create", BySpire),
    ("install-vm.md", "awsvid trust-policy", ByShell),
    ("install-vm.md", "aws iam attach-role-policy", ByAwsCli),
    (
        "install-vm.md",
        "sudo awsvid config validate",
        FIRST_WORKLOAD,
    ),
    (
        "install-vm.md",
        "sudo systemctl enable --now",
        FIRST_WORKLOAD,
    ),
    ("install-vm.md", "sudo awsvid check", FIRST_WORKLOAD),
    (
        "install-vm.md",
        "sudo -u billing awsvid exec -- aws sts",
        AT_AWS,
    ),
    ("install-vm.md", "sudo awsvid status", FIRST_WORKLOAD),
    (
        "install-vm.md",
        "sudo systemctl disable --now",
        INSTALLATION,
    ),
    (
        "install-vm.md",
        "sudo -u billing awsvid check --workload",
        FIRST_WORKLOAD,
    ),
    (
        "install-kubernetes.md",
        "spire-server entry create",
        BySpire,
    ),
    ("install-kubernetes.md", "kubectl apply -k", NODE),
    (
        "install-kubernetes.md",
        "kubectl --namespace awsvid rollout",
        NODE,
    ),
    ("install-kubernetes.md", "awsvid trust-policy", ByShell),
    (
        "install-kubernetes.md",
        "aws iam attach-role-policy",
        ByAwsCli,
    ),
    (
        "kubernetes-with-spire.md",
        "helm upgrade spire",
        Not(
            "it fetches SPIRE's chart; tests/it/kubernetes/existing_spire.rs has objects with its names",
        ),
    ),
    (
        "kubernetes-with-spire.md",
        "kubectl create namespace",
        EXISTING_SPIRE,
    ),
    (
        "kubernetes-with-spire.md",
        "kubectl --namespace awsvid rollout",
        EXISTING_SPIRE,
    ),
    ("kubernetes-with-spire.md", "helm uninstall", EXISTING_SPIRE),
    (
        "spire-setup.md",
        "spire-server entry create -parentID spiffe://example.org/spire/agent/... \\\n  -spiffeID spiffe://example.org/awsvid",
        BySpire,
    ),
    (
        "spire-setup.md",
        "spire-server entry create -parentID spiffe://example.org/spire/agent/... \\\n  -spiffeID spiffe://example.org/billing -selector unix:uid",
        BySpire,
    ),
    (
        "spire-setup.md",
        "spire-server entry create -parentID spiffe://example.org/spire/agent/... \\\n  -spiffeID spiffe://example.org/billing -selector unix:user",
        BySpire,
    ),
    ("cli.md", "awsvid config validate awsvid.toml", ByShell),
    ("cli.md", "awsvid config validate - --offline", ByShell),
    ("cli.md", "awsvid config show", ByShell),
    ("cli.md", "sudo awsvid status", FIRST_WORKLOAD),
    ("cli.md", "sudo awsvid probe live", FIRST_WORKLOAD),
    ("cli.md", "sudo awsvid check", FIRST_WORKLOAD),
    ("cli.md", "awsvid trust-policy", ByShell),
    ("cli.md", "awsvid exec", ByShell),
    ("cli.md", "curl --unix-socket", FIRST_WORKLOAD),
    ("cli.md", "awsvid dev", DEV),
    ("cli.md", "sudo awsvid man", INSTALLATION),
    ("cli.md", "awsvid completions", INSTALLATION),
    (
        "metrics-and-alerts.md",
        "curl --silent http://127.0.0.1:975/metrics",
        FIRST_WORKLOAD,
    ),
    ("audit-log.md", "# By default, on a VM", ByShell),
    ("audit-log.md", "jq -n", ByShell),
    ("audit-log.md", "jq -c", ByShell),
    ("audit-log.md", "jq -r", ByShell),
    ("audit-log.md", "aws cloudtrail", ByAwsCli),
    (
        "packages.md",
        "sudo apt-get install",
        Not("no release is published yet; tests/it/systemd/packages.rs installs both packages"),
    ),
    (
        "packages.md",
        "identity=",
        Not("only the workflow of a release can sign, and Sigstore is outside this network"),
    ),
    (
        "packages.md",
        "tests/counterparts/get release",
        Not("tests/it/packages.rs runs each step of the script, the builds in the slow form"),
    ),
    ("upgrade.md", "awsvid.previous config validate", ROLLBACK),
    ("upgrade.md", "cp --preserve /usr/bin", UPGRADE),
    ("upgrade.md", "cp --preserve /etc/systemd", UPGRADE),
    ("upgrade.md", "install -m 0644", ROLLBACK),
    ("upgrade.md", "kubectl apply -k .", NODE),
    ("migrate.md", "awsvid exec", ByShell),
    ("migrate.md", "awsvid trust-policy", ByShell),
    ("migrate.md", "aws iam get-role ", ByAwsCli),
    ("migrate.md", "aws iam update-assume-role-policy", ByAwsCli),
    ("migrate.md", "awsvid check --workload", FIRST_WORKLOAD),
    ("migrate.md", "aws iam get-access-key-last-used", ByAwsCli),
    ("migrate.md", "aws iam update-access-key", ByAwsCli),
    ("migrate.md", "aws rolesanywhere", ByAwsCli),
    ("revoke.md", "# By default, on a VM", ByShell),
    ("revoke.md", "jq -r", ByShell),
    ("revoke.md", "aws iam put-role-policy", ByAwsCli),
    ("revoke.md", "spire-server entry show", FIRST_WORKLOAD),
    ("revoke.md", "sudo awsvid config validate", FIRST_WORKLOAD),
    ("revoke.md", "jq -c", ByShell),
    ("revoke.md", "sudo awsvid status", FIRST_WORKLOAD),
    ("revoke.md", "aws cloudtrail", ByAwsCli),
    ("revoke.md", "aws iam delete-role-policy", ByAwsCli),
    ("revoke.md", "spire-server agent ban", BySpire),
];

const POD_RECIPE: TestMethod = In(
    "kubernetes/documented.rs",
    "documented_recipe_explains_a_403",
);
const README_OUTPUT: TestMethod = In("dev.rs", "dev_prints_the_output_of_the_readme");

/// The same for README.md, troubleshooting.md, and the pages of other folders.
const MORE_COMMANDS: &[(&str, &str, TestMethod)] = &[
    (
        "deploy/helm/awsvid/README.md",
        "kubectl create namespace",
        EXISTING_SPIRE,
    ),
    (
        "deploy/helm/awsvid/README.md",
        "helm uninstall",
        EXISTING_SPIRE,
    ),
    (
        "tests/bench/README.md",
        "cargo bench",
        In("bench.rs", "documented_commands_run_the_bench"),
    ),
    ("README.md", "cargo run --release", README_OUTPUT),
    (
        "README.md",
        "tests/run",
        Not("it is the run that this test is part of"),
    ),
    ("README.md", "kubectl apply -k", NODE),
    ("README.md", "sudo systemctl enable", FIRST_WORKLOAD),
    ("troubleshooting.md", "kubectl -n shop debug", POD_RECIPE),
    ("troubleshooting.md", "uid=$(kubectl", POD_RECIPE),
    ("troubleshooting.md", "kubectl -n awsvid exec", POD_RECIPE),
    (
        "troubleshooting.md",
        "sudo -u billing awsvid credential-process",
        FIRST_WORKLOAD,
    ),
    (
        "troubleshooting.md",
        "kubectl -n shop exec billing-0",
        POD_RECIPE,
    ),
    ("troubleshooting.md", "sudo systemd-run", FIRST_WORKLOAD),
    ("troubleshooting.md", "sudo journalctl", ByShell),
];

const SPIRE_CONFIGURATIONS: TestMethod = In(
    "documented_commands/formats.rs",
    "documented_configurations_of_spire_are_valid",
);
const VALUES: TestMethod = In("helm/environment.rs", "page_has_the_values_of_the_examples");
const EXTRA_VARIABLES: TestMethod = In(
    "helm/environment.rs",
    "documented_patch_adds_extra_variables_to_the_component",
);
const README_VALUES: TestMethod = In("helm/values.rs", "values_of_the_readme_are_rendered");
const SYSCTL: TestMethod = In(
    "helm/environment.rs",
    "pages_have_the_sysctl_and_the_capability_of_the_component",
);
const PROFILE: TestMethod = In("credential_process.rs", "output_is_accepted_by_cli");

/// Every other block that is not JSON, a configuration of awsvid or a synopsis.
const OTHER_BLOCKS: &[(&str, &str, TestMethod)] = &[
    ("install-kubernetes.md", "environment:", EXTRA_VARIABLES),
    ("install-kubernetes.md", "patches:", EXTRA_VARIABLES),
    ("README.md", " ┌ node", Not("a picture of the node's parts")),
    (
        "role-chaining.md",
        "JWT-SVID ──",
        Not("a picture of the calls of a chain"),
    ),
    ("install-vm.md", "[Service]", FIRST_WORKLOAD),
    (
        "install-vm.md",
        "[Socket]",
        In(
            "systemd.rs",
            "unconfigured_socket_of_unit_is_rejected_and_others_are_served",
        ),
    ),
    ("install-kubernetes.md", "apiVersion: kustomize", NODE),
    (
        "install-kubernetes.md",
        "securityContext:",
        In("kubernetes/cluster.rs", "install_seccomp_profile"),
    ),
    (
        "deploy/helm/awsvid/README.md",
        "config:\n  sts:\n    region: eu-central-1\n  role:",
        README_VALUES,
    ),
    (
        "deploy/helm/awsvid/README.md",
        "config:\n  sts:\n    region: eu-central-1\n  roles_anywhere:",
        In(
            "helm/values.rs",
            "chain_and_roles_anywhere_of_the_readme_are_a_valid_configuration",
        ),
    ),
    (
        "deploy/helm/awsvid/README.md",
        "config:\n  include:",
        README_VALUES,
    ),
    ("imds.md", "securityContext:", SYSCTL),
    ("imds.md", "spec:", SYSCTL),
    ("install-kubernetes.md", "spec:", SYSCTL),
    (
        "kubernetes-with-spire.md",
        "spire-agent:\n  sockets:\n    broker",
        VALUES,
    ),
    ("kubernetes-with-spire.md", "spire:", VALUES),
    (
        "kubernetes-with-spire.md",
        "apiVersion: kustomize",
        In(
            "kubernetes/existing_spire.rs",
            "kustomize_installs_and_removes_awsvid",
        ),
    ),
    (
        "kubernetes-with-spire.md",
        "spire-agent:\n  sockets:\n    admin",
        Not("only SPIRE's chart reads these values, and it is not here"),
    ),
    (
        "spire-setup.md",
        "agent {\n  admin_socket_path",
        SPIRE_CONFIGURATIONS,
    ),
    (
        "spire-setup.md",
        "agent {\n  experimental",
        SPIRE_CONFIGURATIONS,
    ),
    (
        "spire-setup.md",
        "WorkloadAttestor \"k8s\"",
        SPIRE_CONFIGURATIONS,
    ),
    (
        "spire-setup.md",
        "WorkloadAttestor \"unix\"",
        SPIRE_CONFIGURATIONS,
    ),
    ("spire-setup.md", "server {", SPIRE_CONFIGURATIONS),
    ("spire-setup.md", "domains =", SPIRE_CONFIGURATIONS),
    ("cli.md", "[profile billing]", PROFILE),
    ("migrate.md", "[profile billing]", PROFILE),
    (
        "metrics-and-alerts.md",
        "groups:",
        In(
            "contract/alerts.rs",
            "rules_use_existing_metrics_and_labels",
        ),
    ),
    (
        "audit-log.md",
        "/var/log/awsvid/audit.log {",
        In(
            "documented_commands/formats.rs",
            "documented_rotation_loses_no_record",
        ),
    ),
    (
        "audit-log.md",
        "SELECT",
        In(
            "documented_commands/formats.rs",
            "documented_query_joins_records_and_events",
        ),
    ),
];

fn all_rows() -> impl Iterator<Item = &'static (&'static str, &'static str, TestMethod)> {
    COMMANDS.iter().chain(MORE_COMMANDS).chain(OTHER_BLOCKS)
}

/// Returns whether a test reads all blocks of this kind: JSON, awsvid's configuration, a synopsis.
fn is_read_by_kind(page: &str, block: &Block) -> bool {
    match block.language.as_str() {
        "json" | "toml" => true,
        "" => page == "cli.md" && block.text.starts_with("awsvid "),
        _ => false,
    }
}

/// Returns all blocks that need a row, in the order of the pages.
fn blocks_with_rows() -> Vec<(String, Block)> {
    let mut found = Vec::new();
    for page in pages() {
        let blocks = blocks(&page).into_iter();
        let needing_rows = blocks.filter(|block| !is_read_by_kind(&page, block));
        found.extend(needing_rows.map(|block| (page.clone(), block)));
    }
    found
}

/// Returns the blocks that are tested in this way.
fn commands(is_meant: impl Fn(TestMethod) -> bool) -> Vec<(String, String)> {
    blocks_with_rows()
        .into_iter()
        .filter(|(page, block)| is_meant(tested(page, block)))
        .map(|(page, block)| (page, block.text))
        .collect()
}

fn tested(page: &str, block: &Block) -> TestMethod {
    let fits =
        |(of, begin, _): &&(&str, &str, TestMethod)| *of == page && block.text.starts_with(begin);
    let found: Vec<_> = all_rows().filter(fits).collect();
    let [(_, _, tested)] = &found[..] else {
        panic!("{page}: in the table {} times: {}", found.len(), block.text)
    };
    *tested
}

/// Replaces the placeholders of a block by names of this machine.
fn with_names(text: &str, log: &Path) -> String {
    text.replace(AUDIT_LOG, log.to_str().unwrap())
}

/// Returns whether a test's file names this block as [`block`] finds it: by the page, the heading
/// and the beginning, one after the other. `block` itself makes sure that they fit one block alone.
fn reads_block(source: &str, page: &str, begin: &str) -> bool {
    let source = source.replace("\\\"", "'");
    let parts: Vec<&str> = source.split('"').collect();
    let candidate = blocks(page)
        .into_iter()
        .find(|block| !is_read_by_kind(page, block) && block.text.starts_with(begin))
        .unwrap_or_else(|| panic!("{page} has no block {begin:?}"));
    let is_comma = |text: &str| text.trim() == ",";
    let text = candidate.text.replace('"', "'");
    parts.windows(5).any(|parts| {
        let [of, comma, heading, other_comma, words] = parts else {
            return false;
        };
        *of == page
            && *heading == candidate.heading
            && is_comma(comma)
            && is_comma(other_comma)
            && !words.is_empty()
            && text.starts_with(&words.replace("\\n", "\n"))
    })
}

#[test]
fn every_block_is_tested_or_excused() {
    let count = commands(|_| true).len();
    assert_eq!(count, all_rows().count(), "a row of the table has no block");
    for &(page, begin, tested) in all_rows() {
        match tested {
            In(file, function) => {
                let file = Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("tests/it")
                    .join(file);
                let source = fs::read_to_string(&file)
                    .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
                assert!(
                    source.contains(&format!("fn {function}(")),
                    "{page}, {begin}: {function}"
                );
                assert!(
                    reads_block(&source, page, begin),
                    "{page}, {begin}: {} reads no such block",
                    file.display()
                );
            }
            Not(reason) => assert!(reason.len() > 20, "{page}, {begin}: {reason}"),
            ByShell | BySpire | ByAwsCli => {}
        }
    }
}

#[test]
fn block_is_read_only_if_it_is_named_exactly() {
    let source = "block(\"cli.md\", \"`awsvid check`\", \"sudo awsvid\")";
    assert!(reads_block(source, "cli.md", "sudo awsvid check"));
    assert!(!reads_block(source, "cli.md", "sudo awsvid status"));
    let apart = "let page = \"cli.md\"; block(page, \"`awsvid check`\", \"sudo awsvid\")";
    assert!(!reads_block(apart, "cli.md", "sudo awsvid check"));
}

/// The audit log of the daemon, as [`stage`] writes it.
const STAGED_LOG: &str = "daemon.log";

/// A program that prints the endpoint from which an SDK would fetch credentials.
const PRINT_ENDPOINT: &str = "echo \"$AWS_CONTAINER_CREDENTIALS_FULL_URI\"";
/// Writes a script to this path below the folder, instead of a program that is not here.
fn stand_in(folder: &Path, path: &str, script: &str) {
    let program = folder.join(path);
    fs::write(&program, format!("#!/bin/sh\nset -eu\n{script}\n")).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
}

/// Fills a folder with the files that the commands need: `awsvid` in `bin`, a configuration, and
/// the records of audit-log.md. Stand-ins for journalctl and kubectl print the same records.
fn stage(folder: &Path) {
    fs::create_dir(folder.join("bin")).unwrap();
    symlink(PROGRAM, folder.join("bin/awsvid")).unwrap();
    fs::copy(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/awsvid.toml"),
        folder.join("awsvid.toml"),
    )
    .unwrap();
    let records: String = blocks("audit-log.md")
        .into_iter()
        .filter(|block| block.language == "json")
        .map(|block| block.text)
        .collect();
    let log = folder.join(STAGED_LOG);
    fs::write(&log, records).unwrap();
    for source in ["journalctl", "kubectl"] {
        stand_in(
            folder,
            &format!("bin/{source}"),
            &format!("cat {}", log.display()),
        );
    }
    fs::write(
        folder.join("revoke.json"),
        block("revoke.md", "1. Deny the sessions in AWS", "{"),
    )
    .unwrap();
    fs::write(
        folder.join("trust.json"),
        block(
            "install-vm.md",
            "4. Let AWS trust your SPIFFE provider",
            "{",
        ),
    )
    .unwrap();
}

fn shell(folder: &Path, script: &str) -> Output {
    let mut command = Command::new("sh");
    let path = format!(
        "{}:/usr/sbin:/usr/bin:/sbin:/bin",
        folder.join("bin").display()
    );
    command
        .env_clear()
        .env("PATH", path)
        .env("AWSVID_CONFIG", folder.join("awsvid.toml"))
        .env("HOME", folder);
    command
        .current_dir(folder)
        .args(["-euc", &format!("sudo() {{ \"$@\"; }}\n{script}")]);
    run(command, b"", TIMEOUT)
}

#[test]
fn documented_commands_work_in_a_shell() {
    if !root() {
        return;
    }
    if !Path::new("/usr/bin/jq").exists() {
        return skip("jq is missing: run tests/counterparts/get shells");
    }
    let folder = folder();
    let folder = folder.path();
    stage(folder);
    for program in ["bin/aws", "bin/restic", "server"] {
        stand_in(folder, program, PRINT_ENDPOINT);
    }
    let log = folder.join(STAGED_LOG);
    for (page, text) in commands(|tested| matches!(tested, ByShell)) {
        let output = shell(folder, &with_names(&text, &log));
        let is_file = text.contains(" > ");
        assert!(output.status.success(), "{page}: {text}{output:?}");
        assert!(
            is_file || !output.stdout.trim().is_empty(),
            "{page}: it prints nothing: {text}{output:?}"
        );
    }
    // Of three records, one stands for many requests.
    let sum = block(
        "audit-log.md",
        "Which requests have a record of their own",
        "jq",
    );
    assert_eq!(
        shell(folder, &with_names(&sum, &log))
            .success("the sum")
            .trim(),
        "1202"
    );
    let examples = block("cli.md", "`awsvid exec`", "awsvid exec -- ");
    let endpoints = shell(folder, &examples).success("the examples of exec");
    assert_eq!(
        endpoints.lines().collect::<Vec<_>>(),
        ["", "/backup", ""].map(|role| format!("http://127.0.0.1:974/v1/credentials{role}"))
    );
    for written in ["iam.sh", "awsvid.tf", "awsvid.json"] {
        let text = fs::read_to_string(folder.join(written)).unwrap();
        assert!(
            text.contains("oidc.example.org") && text.contains("role"),
            "{written}: {text}"
        );
    }
}

#[test]
fn documented_commands_are_right_for_the_aws_cli() {
    let folder = folder();
    let Some(aws) = tool("aws") else { return };
    let folder = folder.path();
    stage(folder);
    symlink(aws, folder.join("bin/aws")).unwrap();
    for (page, text) in commands(|tested| matches!(tested, ByAwsCli)) {
        // With this option the CLI parses a command, calls nothing and prints an example.
        let script = text.trim_end().to_owned() + " --generate-cli-skeleton";
        let output = shell(folder, &script);
        assert!(
            output.status.success() && output.stdout.trim_start().starts_with('{'),
            "{page}: {text}{output:?}"
        );
        let wrong = shell(folder, &(script + " --no-such-option"));
        assert!(
            !wrong.status.success(),
            "the CLI parses its options: {wrong:?}"
        );
    }
}

#[test]
fn documented_commands_work_with_spire() {
    let folder = folder();
    let Some(spire) = Spire::start(folder.path()) else {
        return;
    };
    let mut created = 0;
    for (page, text) in commands(|tested| matches!(tested, BySpire)) {
        let text = text.replace("\\\n", " ").replace(PARENT, spire.agent_id());
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let output = spire.server_command(&words[1..]);
            // Two pages create the same entry.
            let is_known =
                output.stderr.contains("AlreadyExists") || output.stdout.contains("AlreadyExists");
            assert!(
                output.status.success() || is_known,
                "{page}: {line}: {output:?}"
            );
            created += usize::from(output.stdout.contains("Entry ID"));
        }
    }
    assert!(created >= 4, "{created} entries");
}

#[test]
fn documented_json_can_be_parsed() {
    for page in pages() {
        for block in blocks(&page)
            .iter()
            .filter(|block| block.language == "json")
        {
            let parsed: Result<Value, _> = serde_json::from_str(&block.text);
            assert!(parsed.is_ok(), "{page}: {parsed:?}: {}", block.text);
        }
    }
}

/// Adds the rest of the smallest configuration to a block that shows a part of one.
fn completed(page: &str, text: &str) -> String {
    let mut text = text.to_owned();
    if page == "install-kubernetes.md" && !text.contains("[identity]") {
        text.push_str(
            "\n[identity]\nsource = \"spiffe-broker\"\n\
             broker_socket = \"unix:///run/spire/broker/api.sock\"\n",
        );
    }
    let sources_of_spire = ["spire-delegated", "spiffe-broker"];
    if !text.contains("[[workload]]")
        && !sources_of_spire.iter().any(|source| text.contains(source))
    {
        text.push_str(
            "\n[[workload]]\nuser = \"billing\"\nspiffe_id = \"spiffe://example.org/billing\"\n",
        );
    }
    if !text.contains("[sts]") {
        text.push_str("\n[sts]\nregion = \"eu-central-1\"\n");
    }
    if !text.contains("[[role]]") {
        text.push_str(
            "\n[[role]]\nname = \"billing\"\nspiffe_id = \"spiffe://example.org/billing\"\n\
             role_arn = \"arn:aws:iam::123456789012:role/billing\"\n",
        );
    }
    text
}

#[test]
fn documented_configurations_have_no_mistakes() {
    let mut count = 0;
    for page in pages() {
        for block in blocks(&page)
            .iter()
            .filter(|block| block.language == "toml")
        {
            let mut command = Command::new(PROGRAM);
            command
                .env_clear()
                .args(["config", "validate", "-", "--offline"]);
            let output = run(command, completed(&page, &block.text).as_bytes(), TIMEOUT);
            assert!(
                output.status.success() && output.stderr.is_empty(),
                "{page}: {output:?}: {}",
                block.text
            );
            count += 1;
        }
    }
    assert!(count >= 8, "{count} configurations");
}
