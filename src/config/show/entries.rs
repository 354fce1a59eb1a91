//! The lists of tables: `[[workload]]` and `[[role]]`.

use toml::Value;

use super::{ConfigWriter, DEFAULT, duration, shown};
use crate::identity::Template;
use crate::role::{ChainedRole, Role, StsTarget};
use crate::workload_rule::{NamedRule, WorkloadRule};

impl ConfigWriter<'_> {
    pub(super) fn workload(&mut self, index: usize, named: &NamedRule) {
        let NamedRule {
            rule,
            user,
            group,
            supplementary_group: supplementary,
        } = named;
        let WorkloadRule {
            spiffe_id,
            uid,
            gid,
            supplementary_group,
            exe,
            systemd_unit,
            cgroup,
        } = rule;
        self.entry_header("workload", index);
        self.line("spiffe_id", spiffe_id.as_str(), "");
        for (key, id) in [
            ("uid", uid),
            ("gid", gid),
            ("supplementary_group", supplementary_group),
        ] {
            if let Some(id) = id {
                self.line(key, i64::from(*id), "");
            }
        }
        for (key, name) in [
            ("user", user),
            ("group", group),
            ("supplementary_group", supplementary),
        ] {
            if let Some(name) = name {
                self.line(key, name.as_str(), "");
            }
        }
        if let Some(exe) = exe {
            self.line("exe", shown(exe.path()), "");
        }
        if let Some(unit) = systemd_unit {
            self.line("systemd_unit", unit.as_str(), "");
        }
        if let Some(cgroup) = cgroup {
            self.line("cgroup", cgroup.as_str(), "");
        }
        // It permits a rule, and is not part of it.
        let entry = self.entry("workload", index);
        if let Some(allow) = entry.get("allow_exe_only").and_then(Value::as_bool) {
            self.line("allow_exe_only", allow, "");
        }
    }

    pub(super) fn role(&mut self, index: usize, role: &Role) {
        let Role {
            name,
            spiffe_id,
            role_arn,
            audience,
            duration: lasts,
            session_name,
            sts,
            policy,
            policy_arns,
            exchange,
            chain,
        } = role;
        let entry = self.entry("role", index);
        self.entry_header("role", index);
        self.line("name", name.as_str(), "");
        self.line("spiffe_id", spiffe_id.as_str(), "");
        self.line("role_arn", role_arn.as_str(), "");
        self.entry_key(&entry, "exchange", exchange.word());
        match exchange.uses_jwt() {
            true => {
                let origin = origin(&entry, "audience", "from [identity] audience");
                self.line("audience", audience.as_str(), origin);
            }
            false => self.unset("audience", "not used: no JWT-SVID is fetched"),
        }
        self.entry_key(&entry, "duration", duration(*lasts));
        match session_name {
            Some(name) => self.line("session_name", name.as_str(), ""),
            None => self.unset("session_name", "default: from the SPIFFE ID"),
        }
        match exchange.uses_jwt() || !chain.is_empty() {
            true => self.sts_target(&entry, sts),
            false => {
                let origin = origin(&entry, "region", "that of the trust anchor");
                self.line("region", sts.region.as_str(), origin);
            }
        }
        if let Some(policy) = policy {
            self.line("policy", policy.as_str(), "");
        }
        if !policy_arns.is_empty() {
            self.line("policy_arns", texts(policy_arns), "");
        }
        let shared = entry
            .get("allow_shared_audience")
            .and_then(Value::as_bool)
            .unwrap_or_default();
        self.entry_key(&entry, "allow_shared_audience", shared);
        let chained = entry.get("chain").and_then(Value::as_array);
        for (number, role) in chain.iter().enumerate() {
            let entry = chained.and_then(|chained| chained.get(number));
            let entry = entry.and_then(Value::as_table);
            self.chained_role(&entry.cloned().unwrap_or_default(), role);
        }
    }

    fn chained_role(&mut self, entry: &toml::Table, role: &ChainedRole) {
        let ChainedRole {
            role_arn,
            external_id,
            session_name,
            source_identity,
            tags,
            transitive_tags,
            policy,
            policy_arns,
            duration: lasts,
        } = role;
        self.table("[[role.chain]]");
        self.line("role_arn", role_arn.as_str(), "");
        self.entry_key(entry, "duration", duration(*lasts));
        self.entry_key(entry, "session_name", session_name.as_str());
        for (key, template) in [
            ("external_id", external_id),
            ("source_identity", source_identity),
            ("policy", policy),
        ] {
            if let Some(template) = template {
                self.line(key, template.as_str(), "");
            }
        }
        if !tags.is_empty() {
            let tags = tags
                .iter()
                .map(|(key, value)| (key.clone(), Value::from(value.as_str())));
            self.line("tags", tags.collect::<toml::Table>(), "");
        }
        if !transitive_tags.is_empty() {
            self.line("transitive_tags", transitive_tags.clone(), "");
        }
        if !policy_arns.is_empty() {
            self.line("policy_arns", texts(policy_arns), "");
        }
    }

    fn sts_target(&mut self, entry: &toml::Table, StsTarget { region, endpoint }: &StsTarget) {
        let default = if self.has("sts", "region") {
            "from [sts] region"
        } else {
            DEFAULT
        };
        self.line("region", region.as_str(), origin(entry, "region", default));
        if let Some(endpoint) = endpoint {
            let origin = origin(entry, "sts_endpoint", "from [sts] endpoint");
            self.line("sts_endpoint", endpoint.as_str(), origin);
        }
    }

    /// Writes a key of a list's table, marked if it is a default.
    fn entry_key(&mut self, entry: &toml::Table, key: &str, value: impl Into<Value>) {
        self.line(key, value, origin(entry, key, DEFAULT));
    }

    /// Returns one of the tables of this name, and the path of its file if that is included. The
    /// included files continue the list of the main file.
    fn find(&self, name: &str, index: usize) -> (Option<&str>, Option<&toml::Table>) {
        let included = self.included.iter();
        let files = std::iter::once((None, &self.file))
            .chain(included.map(|(path, file)| (Some(path.as_str()), file)));
        let mut entries = files.flat_map(|(path, file)| {
            let list = file.get(name).and_then(Value::as_array);
            list.into_iter()
                .flatten()
                .map(move |entry| (path, entry.as_table()))
        });
        entries.nth(index).unwrap_or_default()
    }

    fn entry(&self, name: &str, index: usize) -> toml::Table {
        self.find(name, index).1.cloned().unwrap_or_default()
    }

    /// Writes the header of such a table.
    fn entry_header(&mut self, name: &str, index: usize) {
        let header = format!("[[{name}]]");
        let with_path = self
            .find(name, index)
            .0
            .map(|path| format!("{header:<56} # {path}"));
        self.table(with_path.as_deref().unwrap_or(&header));
    }
}

fn texts(templates: &[Template]) -> Vec<&str> {
    templates.iter().map(Template::as_str).collect()
}

/// Returns the mark of a key: none if `entry` has it, else `otherwise`.
fn origin(entry: &toml::Table, key: &str, otherwise: &'static str) -> &'static str {
    if entry.contains_key(key) {
        ""
    } else {
        otherwise
    }
}
