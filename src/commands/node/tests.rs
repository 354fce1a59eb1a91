use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use nix::errno::Errno;

use super::*;
use crate::accounts::LocalAccounts;
use crate::config::ConfigLine;

/// A name service with `alice` as 1001, `nobody` as usual, and failing lookups of `away`.
struct NodeService;

impl NameService for NodeService {
    fn id(&self, name: &AccountName) -> nix::Result<Option<u32>> {
        match name.as_str() {
            "alice" => Ok(Some(1001)),
            "nobody" => Ok(Some(OVERFLOW_ID)),
            "absent" => Err(Errno::EIO),
            _ => Ok(None),
        }
    }

    fn name(&self, _: &AccountName, _: u32) -> nix::Result<Option<String>> {
        Ok(None)
    }

    fn local(&self, previous: &Arc<LocalAccounts>) -> Arc<LocalAccounts> {
        previous.clone()
    }
}

const REST: &str = "[sts]\nregion = \"eu-central-1\"\n\
    [[role]]\nname = \"all\"\nspiffe_id = \"spiffe://example.org/**\"\nrole_arn = \"arn:aws:iam::123456789012:role/all\"\n";

/// Returns the warnings of rules with these keys. The first key is in line 9, and each next rule
/// begins after it.
#[track_caller]
fn warnings_of(rules: &[&str], rest: &str) -> Vec<String> {
    let rules: String = rules
        .iter()
        .map(|keys| format!("[[workload]]\nspiffe_id = \"spiffe://example.org/a\"\n{keys}\n"))
        .collect();
    let loaded = Config::parse(&format!("{REST}{rules}{rest}"), &|_| None);
    let config = loaded
        .unwrap_or_else(|problems| panic!("{problems:?}"))
        .config;
    let shown = |problem: &Problem| {
        format!(
            "{}: {problem}",
            problem.line.as_ref().map_or(0, ConfigLine::number)
        )
    };
    warnings(&config, &NodeService).iter().map(shown).collect()
}

#[track_caller]
fn assert_warning(rules: &[&str], rest: &str, words: &[&str]) {
    let warnings = warnings_of(rules, rest);
    let fits = warnings.len() == 1 && words.iter().all(|word| warnings[0].contains(word));
    assert!(fits, "{rules:?} {rest}\ngave {warnings:#?}\nnot {words:?}");
}

#[test]
fn missing_accounts_are_reported() {
    assert_eq!(warnings_of(&["user = \"alice\""], ""), [] as [&str; 0]);
    assert_warning(
        &["user = \"ghost\""],
        "",
        &["9: workload.user: the user \"ghost\" does not exist on this node"],
    );
    assert_warning(
        &["uid = 7\ngroup = \"ghosts\""],
        "",
        &["10: workload.group: the group \"ghosts\" does not exist on this node"],
    );
    assert_warning(
        &["uid = 7\nsupplementary_group = \"absent\""],
        "",
        &["10: workload.supplementary_group", "I/O error"],
    );
    assert_warning(
        &["user = \"nobody\""],
        "",
        &["9: workload.user", "no caller matches"],
    );
}

#[test]
fn rules_with_equal_numbers_hide_later_ones() {
    let hidden = "this rule can never match on this node: the one in line 7 matches all of its callers first";
    assert_warning(
        &["uid = 1001", "user = \"alice\""],
        "",
        &["10: workload: ", hidden],
    );
    assert_warning(
        &["user = \"alice\"", "uid = 1001\ngid = 7"],
        "",
        &["10: workload: ", hidden],
    );
    assert_eq!(
        warnings_of(&["uid = 1002", "user = \"alice\""], ""),
        [] as [&str; 0]
    );
    // Without a number nothing can be compared.
    assert_eq!(
        warnings_of(&["user = \"absent\"", "user = \"alice\""], "").len(),
        1
    );
}

#[test]
fn missing_programs_are_reported() {
    assert_eq!(
        warnings_of(&["uid = 7\nexe = \"/usr/bin/env\""], ""),
        [] as [&str; 0]
    );
    assert_warning(
        &["uid = 7\nexe = \"/nonexistent\""],
        "",
        &["7: workload.exe", "/nonexistent does not exist"],
    );
    assert_warning(&["uid = 7\nexe = \"/usr\""], "", &["is not a file"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o777)).unwrap();
    assert_warning(
        &[&format!("uid = 7\nexe = {:?}", file.path())],
        "",
        &["changed by users other than root"],
    );
    // A user that can write to the directory can put another program there.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program");
    fs::copy("/usr/bin/env", &program).unwrap();
    let rule = format!("uid = 7\nexe = {program:?}");
    if crate::skip::root() {
        assert_eq!(warnings_of(&[&rule], ""), [] as [&str; 0]);
    }
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert_warning(&[&rule], "", &["changed by users other than root"]);
}

#[test]
fn missing_and_exposed_sockets_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let config = |identity: &str| {
        let rules = match identity.contains("delegated") {
            true => "",
            false => "[[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = 7\n",
        };
        let text = format!("{REST}{rules}[identity]\n{identity}\n");
        Config::parse(&text, &|_| None).unwrap().config
    };
    let endpoint = format!("\"unix://{}\"", socket.display());
    let shown = |problems: Vec<Problem>| -> Vec<String> {
        problems.iter().map(ToString::to_string).collect()
    };
    for (key, identity) in [
        (
            "workload_api_socket",
            format!("workload_api_socket = {endpoint}"),
        ),
        (
            "admin_socket",
            format!("source = \"spire-delegated\"\nadmin_socket = {endpoint}"),
        ),
    ] {
        let config = config(&identity);
        let missing = format!(
            "identity.{key}: {} does not exist; start the SPIFFE agent, or correct the path",
            socket.display()
        );
        assert_eq!(shown(missing_sockets(&config)), [missing]);
        assert_eq!(shown(warnings(&config, &NodeService)), [""; 0]);
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(shown(missing_sockets(&config)), [""; 0]);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let exposed = format!(
            "identity.{key}: every user of this node can write to {} and put another socket there; move it to a directory of root's",
            folder.path().display()
        );
        assert_eq!(shown(warnings(&config, &NodeService)), [exposed]);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::remove_file(&socket).unwrap();
    }
    let over_tcp = config("workload_api_socket = \"tcp://127.0.0.1:1\"");
    assert_eq!(shown(warnings(&over_tcp, &NodeService)), [""; 0]);
    assert_eq!(shown(missing_sockets(&over_tcp)), [""; 0]);
}

#[test]
fn missing_files_are_reported() {
    let rest = "[audit]\nfile = \"/nonexistent/audit.log\"\n";
    assert_warning(
        &["uid = 7"],
        rest,
        &["audit.file: the directory /nonexistent does not exist"],
    );
    assert_eq!(
        warnings_of(&["uid = 7"], "[audit]\nfile = \"/dev/null\"\n"),
        [] as [&str; 0]
    );
    let private = REST.replace(
        "region = \"eu-central-1\"",
        "endpoint = \"https://minio\"\nca_file = \"/nonexistent\"",
    );
    let text = format!(
        "{private}[identity]\naudience = \"minio\"\n[[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = 7\n"
    );
    let config = Config::parse(&text, &|_| None).unwrap().config;
    assert!(
        warnings(&config, &NodeService)[0]
            .to_string()
            .starts_with("sts.ca_file: /nonexistent cannot be read")
    );
    assert_eq!(exposed(&config), []);
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = Config::parse(
        &text.replace("/nonexistent", file.path().to_str().unwrap()),
        &|_| None,
    )
    .unwrap()
    .config;
    assert_eq!(exposed(&config), []);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o646)).unwrap();
    let found: Vec<String> = exposed(&config).iter().map(ToString::to_string).collect();
    let words = "sts.ca_file: every user of this node can write the CA file; chmod o-w ";
    assert!(found.len() == 1 && found[0].starts_with(words), "{found:?}");
}
