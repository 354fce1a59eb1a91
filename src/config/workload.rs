//! `[[workload]]`: rules that map a caller to a SPIFFE ID.

use std::path::Path;

use toml::de::DeValue;

use super::config_line::ConfigLine;
use super::error::InvalidValue;
use super::toml_reader::{Location, Table, absolute};
use crate::cgroup::CgroupPath;
use crate::identity::SpiffeId;
use crate::workload_rule::{AccountName, ExeMatcher, NamedRule, OVERFLOW_ID, WorkloadRule};

/// Programs that run the text of other programs. A rule for one of them matches every such text.
const INTERPRETERS: [&str; 27] = [
    "sh", "bash", "dash", "ash", "zsh", "ksh", "fish", "busybox", "env", "python", "pypy", "perl",
    "ruby", "node", "nodejs", "deno", "bun", "java", "php", "lua", "luajit", "tclsh", "awk",
    "gawk", "mawk", "Rscript", "dotnet",
];
/// The keys that a caller has to match.
const MATCH_KEYS: [&str; 8] = [
    "uid",
    "user",
    "gid",
    "group",
    "supplementary_group",
    "exe",
    "systemd_unit",
    "cgroup",
];
const UID_FIX: &str = "write the name of a user, or its number as `uid`";
const GID_FIX: &str = "write the name of a group, or its number";

/// A rule, and its location in the file.
#[derive(Debug, Clone)]
pub struct ParsedWorkload {
    /// The rule with names, before they are resolved.
    pub rule: NamedRule,
    /// Line of the rule's table.
    pub line: Option<ConfigLine>,
    /// Users and groups that the rule names, each with its key and line.
    pub accounts: Vec<(AccountName, WorkloadRuleKey)>,
}

/// A key of a rule, and its line.
pub type WorkloadRuleKey = (String, Option<ConfigLine>);

impl ParsedWorkload {
    pub(super) fn at(&self) -> Location {
        Location {
            line: self.line.clone(),
            key: "workload".to_owned(),
        }
    }

    pub(super) fn spiffe_id(&self) -> &SpiffeId {
        self.rule.spiffe_id()
    }
}

/// Reads all `[[workload]]`, and leaves out each one with an error.
pub(super) fn read(root: &Table<'_>) -> Vec<ParsedWorkload> {
    root.tables("workload").iter().filter_map(rule).collect()
}

fn rule(table: &Table<'_>) -> Option<ParsedWorkload> {
    table.require("spiffe_id", "add the SPIFFE ID that these callers have");
    let spiffe_id = table.parse(
        "spiffe_id",
        "write an ID as in \"spiffe://example.org/billing\"",
        SpiffeId::parse,
    );
    let (uid, user) = account(table, "uid", "user", UID_FIX);
    let (gid, group) = account(table, "gid", "group", GID_FIX);
    let (supplementary_gid, supplementary_group) = supplementary_group(table);
    let rule = WorkloadRule {
        // A stand-in, to find the other errors. Without a valid ID the rule is dropped below.
        spiffe_id: spiffe_id
            .clone()
            .or_else(|| SpiffeId::parse("spiffe://invalid/invalid").ok())?,
        uid,
        gid,
        supplementary_group: supplementary_gid,
        exe: table
            .parse(
                "exe",
                "write the whole path of the program's file",
                absolute,
            )
            .map(ExeMatcher::new),
        systemd_unit: table.parse(
            "systemd_unit",
            "write a unit's name as in \"billing.service\"",
            systemd_unit,
        ),
        cgroup: table.parse(
            "cgroup",
            "write a path as in \"/system.slice/billing.service\"",
            cgroup,
        ),
    };
    check_keys(table, &rule, user.as_deref());
    let rule = NamedRule {
        rule,
        user: user.map(AccountName::User),
        group: group.map(AccountName::Group),
        supplementary_group: supplementary_group.map(AccountName::Group),
    };
    // A rule without its wrong key would match other callers than intended.
    let sound = spiffe_id.is_some() && !MATCH_KEYS.iter().any(|key| table.is_wrong(key));
    sound.then(|| ParsedWorkload {
        line: table.at().line,
        accounts: accounts(table, &rule),
        rule,
    })
}

/// Returns the users and groups that a rule names, each with its key and line.
fn accounts(table: &Table<'_>, rule: &NamedRule) -> Vec<(AccountName, WorkloadRuleKey)> {
    let names = [
        ("user", &rule.user),
        ("group", &rule.group),
        ("supplementary_group", &rule.supplementary_group),
    ];
    let located = |(key, name): (&str, &Option<AccountName>)| {
        let Location { line, key } = table.location(key);
        Some((name.clone()?, (key, line)))
    };
    names.into_iter().filter_map(located).collect()
}

/// Reads an ID under one key, or a name under another.
fn account(
    table: &Table<'_>,
    number: &'static str,
    name: &'static str,
    fix: &str,
) -> (Option<u32>, Option<String>) {
    if table.contains(number) && table.contains(name) {
        table.error(
            name,
            format!("`{name}` and `{number}` mean the same"),
            "keep one of them",
        );
    }
    let by_number = table.number(number, 0..=u32::MAX - 1);
    (
        by_number.filter(|id| exists(table, number, *id)),
        account_name(table, (name, number), fix),
    )
}

fn supplementary_group(table: &Table<'_>) -> (Option<u32>, Option<String>) {
    const KEY: &str = "supplementary_group";
    match table.value(KEY) {
        None => (None, None),
        Some(DeValue::Integer(_)) => (
            table
                .number(KEY, 0..=u32::MAX - 1)
                .filter(|id| exists(table, KEY, *id)),
            None,
        ),
        Some(_) => (None, account_name(table, (KEY, KEY), GID_FIX)),
    }
}

/// Reads the name of a user or group, and rejects a number, which belongs to the key `number`.
/// Whether the account exists depends on the node and on the time.
fn account_name(
    table: &Table<'_>,
    (name, number): (&'static str, &str),
    fix: &str,
) -> Option<String> {
    let id = match table.value(name)? {
        DeValue::Integer(id) => Some(id.to_string()),
        DeValue::String(text) if !text.is_empty() => Some(text.to_string()),
        _ => None,
    };
    if let Some(id) = id.filter(|id| id.bytes().all(|c| c.is_ascii_digit())) {
        let what = format!("{id} is a number, where a name is wanted");
        table.error(name, what, format!("write {number} = {id}"));
        return None;
    }
    // The C library reads a NUL as the end of a name. A colon separates the fields of /etc/passwd.
    let is_wrong =
        |text: &str| text.is_empty() || text.contains(|c: char| c.is_control() || c == ':');
    table.parse(name, fix, |text| match is_wrong(text) {
        true => Err("it is not a name"),
        false => Ok(text.to_owned()),
    })
}

fn exists(table: &Table<'_>, key: &str, id: u32) -> bool {
    if id == OVERFLOW_ID {
        let what = format!(
            "{id} is what the kernel shows for an id that it cannot map, so no caller matches it"
        );
        table.error(key, what, "give the workload a user or group of its own");
    }
    id != OVERFLOW_ID
}

fn systemd_unit(text: &str) -> Result<String, InvalidValue> {
    let allowed =
        |c: u8| c.is_ascii_alphanumeric() || matches!(c, b':' | b'-' | b'_' | b'.' | b'\\' | b'@');
    let name = text
        .strip_suffix(".service")
        .or_else(|| text.strip_suffix(".scope"));
    match name {
        None => Err(format!(
            "processes live in a .service or .scope; did you mean {text}.service?"
        )
        .into()),
        Some(name) if name.is_empty() || !text.bytes().all(allowed) => {
            Err("it is not the name of a unit".into())
        }
        Some(name) if name.ends_with('@') => {
            Err("a template is never started itself; name an instance".into())
        }
        _ if CgroupPath::parse(&format!("/system.slice/{text}"))
            .is_some_and(|path| path.names_container()) =>
        {
            Err("that is a container's unit, which only `cgroup` can name".into())
        }
        _ => Ok(text.to_owned()),
    }
}

fn cgroup(text: &str) -> Result<glob::Pattern, InvalidValue> {
    if CgroupPath::parse(text).is_none()
        || text.contains("//")
        || (text.ends_with('/') && text != "/")
    {
        return Err(
            "no cgroup has such a path: it begins with `/`, without `..`, `//` or a `/` at the end"
                .into(),
        );
    }
    if text != "/" && text.bytes().all(|c| matches!(c, b'/' | b'*' | b'?')) {
        return Err("it names no cgroup: all processes would match, in containers too".into());
    }
    glob::Pattern::new(text).map_err(|error| error.msg.into())
}

/// Checks the keys of one rule against each other.
fn check_keys(table: &Table<'_>, rule: &WorkloadRule, user: Option<&str>) {
    let allow_exe_only = table.flag("allow_exe_only").unwrap_or(false);
    let others = MATCH_KEYS
        .iter()
        .any(|key| *key != "exe" && table.contains(key));
    let at = table.at();
    if !others && !table.contains("exe") {
        table.report.error(
            &at,
            "without a key this rule matches every caller",
            "add `user`, `systemd_unit` or `cgroup`",
        );
    }
    if !others && table.contains("exe") && !allow_exe_only {
        let what = "any user that runs this program, with any code that it loads, would have this identity";
        table.error(
            "exe",
            what,
            "add `user` or `systemd_unit`, or set `allow_exe_only = true`",
        );
    }
    if let Some(path) = rule
        .exe
        .as_ref()
        .map(ExeMatcher::path)
        .filter(|path| is_interpreter(path))
    {
        let what = format!(
            "{} runs any text that its caller gives it, so this does not separate programs",
            path.display()
        );
        table.warn("exe", what, "use `user` or `systemd_unit`");
    }
    let is_roots = rule.uid == Some(0) || user.is_some_and(|user| user == "root");
    if is_roots && rule.systemd_unit.is_none() && rule.cgroup.is_none() && rule.exe.is_none() {
        let what = "every process of root matches, and so every service that does not run as a user of its own";
        table.report.warn(&at, what, "add `systemd_unit`");
    }
    if let (Some(unit), Some(cgroup)) = (&rule.systemd_unit, rule.cgroup.as_ref().and_then(literal))
        && CgroupPath::parse(cgroup)
            .as_ref()
            .and_then(CgroupPath::systemd_unit)
            != Some(unit)
    {
        table.error(
            "cgroup",
            format!("this rule can never match: {cgroup} is not in {unit}"),
            "keep one of them",
        );
    }
}

/// Returns the path of a pattern without wildcards.
pub(super) fn literal(pattern: &glob::Pattern) -> Option<&str> {
    Some(pattern.as_str()).filter(|text| !text.contains(['*', '?', '[']))
}

fn is_interpreter(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.' || c == '-');
    INTERPRETERS.contains(&name) || name.starts_with("ld-linux") || name.starts_with("qemu-")
}
