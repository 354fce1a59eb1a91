//! The required IAM resources of each account, computed from the configuration and the issuer
//! without I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::anywhere::{self, PlannedAnywhere};
use crate::config::is_aws_sts;
use crate::identity::{RoleArn, SpiffeId, SpiffeIdPattern};
use crate::role::{Role, Roles};

mod chain;
mod issuer;

pub(super) use chain::{ChainedStatement, PERMISSION_NAME};
#[cfg(any(test, fuzzing))]
pub(in crate::commands) use issuer::fuzzing;
pub(super) use issuer::{InvalidIssuer, PlannedIssuer};

use chain::Permission;

/// IAM's default: sessions of a role last at most an hour.
const DEFAULT_SESSION: Duration = Duration::from_secs(3600);
/// IAM's default quota for a trust policy, in characters without white space.
const MAX_POLICY_LENGTH: usize = 2048;

/// IAM's limit for an OIDC provider.
const MAX_AUDIENCES: usize = 100;

/// The resources of all accounts.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) issuer: PlannedIssuer,
    pub(super) provider: PlannedProvider,
    pub(super) anywhere: Option<PlannedAnywhere>,
    pub(super) accounts: BTreeMap<PlannedAccountName, PlannedAccount>,
    pub(super) warnings: Vec<String>,
}

/// The OIDC provider in IAM. An account has at most one for an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PlannedProvider {
    /// It exists, and only gets further audiences.
    Existing,
    /// It is created, with this thumbprint if IAM needs one.
    New { thumbprint: Option<String> },
}

/// Name of an account, with its partition, because several partitions may have the same number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PlannedAccountName {
    pub(super) partition: String,
    pub(super) number: String,
}

impl PlannedAccountName {
    /// Returns whether `--account` names it, as `123456789012` or `aws-cn:123456789012`.
    pub(super) fn is(&self, text: &str) -> bool {
        match text.split_once(':') {
            Some((partition, number)) => partition == self.partition && number == self.number,
            None => text == self.number,
        }
    }
}

impl fmt::Display for PlannedAccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.partition, self.number)
    }
}

/// Resources of one AWS account.
#[derive(Debug, Default)]
pub(super) struct PlannedAccount {
    pub(super) audiences: BTreeSet<String>,
    pub(super) roles: BTreeMap<String, PlannedRole>,
}

/// A role, and the statements of its trust policy.
#[derive(Debug)]
pub(super) struct PlannedRole {
    pub(super) name: String,
    /// IAM path: `/`, or `/team/` and the like.
    pub(super) path: String,
    pub(super) max_session: Duration,
    pub(super) statements: Vec<Statement>,
    /// Subjects that IAM Roles Anywhere may assume the role for.
    pub(super) certified: Vec<SpiffeIdPattern>,
    /// The statements that admit sessions of other roles.
    pub(super) chained: Vec<ChainedStatement>,
    permissions: Vec<Permission>,
}

/// A statement of a trust policy: the subject and the audience that it admits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Statement {
    pub(super) audience: String,
    pub(super) subject: SpiffeIdPattern,
    /// Set if the role's ARN was made from the subject.
    pub(super) is_rendered: bool,
}

/// A condition operator with its keys and values.
pub(super) type Condition = Vec<(&'static str, Vec<(String, String)>)>;

impl Statement {
    /// Returns the condition that admits the subject, by a token for the audience.
    pub(super) fn condition(&self, issuer: &PlannedIssuer) -> Condition {
        let audience = (format!("{}:aud", issuer.key()), self.audience.clone());
        let mut condition = subject_condition(&self.subject, &format!("{}:sub", issuer.key()));
        match condition.first_mut() {
            Some(("StringEquals", keys)) => keys.insert(0, audience),
            _ => condition.insert(0, ("StringEquals", vec![audience])),
        }
        condition
    }
}

/// Returns the condition that admits a subject. `key` holds the SPIFFE ID.
///
/// It excludes other IDs as far as IAM's language allows. There `*` matches any characters, `/`
/// too, so a second pattern rejects IDs with more segments.
pub(super) fn subject_condition(subject: &SpiffeIdPattern, key: &str) -> Condition {
    let (key, text) = (key.to_owned(), subject.as_str());
    if subject.exact().is_some() {
        return vec![("StringEquals", vec![(key, text.to_owned())])];
    }
    if let Some(before) = text.strip_suffix("**") {
        return vec![("StringLike", vec![(key, format!("{before}*"))])];
    }
    let deeper = format!(
        "spiffe://{}{}",
        subject.trust_domain(),
        "/*".repeat(subject.least_segments() + 1)
    );
    vec![
        ("StringLike", vec![(key.clone(), text.to_owned())]),
        ("StringNotLike", vec![(key, deeper)]),
    ]
}

/// Describes the IDs that the policy admits and the rule does not.
fn excess(subject: &SpiffeIdPattern) -> Option<String> {
    let text = subject.as_str();
    let before = text.strip_suffix("/**")?;
    before.contains('*').then(|| {
        format!(
            "{text}: in IAM's `StringLike` each `*` also matches `/`, so the policy lets in more than awsvid does, for \
             instance {}; where that matters, write the role for fewer wildcards",
            before.replacen('*', "any/thing", 1) + "/x"
        )
    })
}

/// Returns the JSON of a condition.
pub(super) fn condition_json(condition: Condition) -> serde_json::Map<String, Value> {
    condition
        .into_iter()
        .map(|(operator, keys)| {
            let keys = keys
                .into_iter()
                .map(|(key, value)| (key, Value::from(value)));
            (operator.to_owned(), Value::Object(keys.collect()))
        })
        .collect()
}

impl PlannedRole {
    /// Returns a role at AWS without any statement.
    fn of(arn: &RoleArn) -> Self {
        let full = arn
            .as_str()
            .split_once(":role")
            .map_or("", |(_, resource)| resource);
        let (path, name) = full.rsplit_once('/').unwrap_or(("", full));
        Self {
            name: name.to_owned(),
            path: format!("{path}/"),
            max_session: DEFAULT_SESSION,
            statements: Vec::new(),
            certified: Vec::new(),
            chained: Vec::new(),
            permissions: Vec::new(),
        }
    }

    /// Returns the trust policy. `provider` and `anchor` are the ARNs of the OIDC provider and of
    /// the trust anchor, or expressions for them.
    pub(super) fn policy(&self, issuer: &PlannedIssuer, provider: &Value, anchor: &Value) -> Value {
        let certified = self.certified.iter();
        let certified = certified.map(|subject| anywhere::statement(subject, anchor));
        let chained = self.chained.iter().map(ChainedStatement::json);
        let statements: Vec<Value> = self
            .statements
            .iter()
            .map(|statement| {
                json!({
                    "Effect": "Allow",
                    "Principal": { "Federated": provider },
                    "Action": "sts:AssumeRoleWithWebIdentity",
                    "Condition": condition_json(statement.condition(issuer)),
                })
            })
            .chain(certified)
            .chain(chained)
            .collect();
        json!({ "Version": "2012-10-17", "Statement": statements })
    }
}

impl Plan {
    /// Computes the plan. `ids` are the known IDs, for ARNs with `{path[N]}`.
    pub(super) fn new(
        roles: &Roles,
        ids: &[SpiffeId],
        issuer: PlannedIssuer,
        provider: PlannedProvider,
        anywhere: Option<PlannedAnywhere>,
    ) -> Self {
        let warnings = issuer.warnings();
        let mut plan = Self {
            issuer,
            provider,
            anywhere,
            accounts: BTreeMap::new(),
            warnings,
        };
        roles.defined.iter().for_each(|role| plan.add(role, ids));
        if roles.requested.is_some() {
            plan.warnings.push(
                "[requested_roles] allow: workloads name these roles themselves, so each needs a trust policy like the ones \
                 here, with the SPIFFE IDs of its workloads"
                    .to_owned(),
            );
        }
        plan.check_meeting();
        plan.check_names();
        plan.check_limits();
        plan
    }

    /// Returns the ARN that IAM gives the provider in this account.
    pub(super) fn provider_arn(&self, account: &PlannedAccountName) -> String {
        format!(
            "arn:{}:iam::{}:oidc-provider/{}",
            account.partition,
            account.number,
            self.issuer.key()
        )
    }

    /// Returns the trust anchor's ARN, for trust policies.
    pub(super) fn anchor_arn(&self) -> Value {
        let anchor = self.anywhere.as_ref();
        Value::from(anchor.map_or("", |anywhere| &anywhere.target.trust_anchor_arn))
    }

    fn add(&mut self, role: &Role, ids: &[SpiffeId]) {
        let name = &role.name;
        let by_token = role.exchange.uses_jwt();
        if let Some(endpoint) = role
            .sts
            .endpoint
            .as_deref()
            .filter(|url| by_token && !is_aws_sts(Some(url)))
        {
            self.warnings.push(format!(
                "role {name:?} is left out: {endpoint} is not AWS, and has policies of its own"
            ));
            return;
        }
        let subjects: Vec<SpiffeIdPattern> = match role.role_arn.highest_segment() {
            None => vec![role.spiffe_id.clone()],
            // Each ID has an ARN of its own.
            Some(_) => {
                let exact = role.spiffe_id.exact();
                let known = ids
                    .iter()
                    .chain(&exact)
                    .filter(|id| role.spiffe_id.matches(id));
                let known: BTreeSet<&SpiffeId> = known.collect();
                known
                    .into_iter()
                    .filter_map(|id| SpiffeIdPattern::parse(id.as_str()).ok())
                    .collect()
            }
        };
        if subjects.is_empty() {
            self.warnings.push(format!(
                "role {name:?} is left out: the ARN of {} depends on the SPIFFE ID, and no ID that it covers is \
                 known; give them with --spiffe-id",
                role.role_arn.as_str()
            ));
        }
        for subject in subjects {
            // A pattern's ARN has no `{path[N]}`, so any ID gives it.
            let id = subject
                .exact()
                .or_else(|| SpiffeId::parse("spiffe://any/any").ok());
            let Some(arn) = id.and_then(|id| role.role_arn.render(&id)) else {
                continue;
            };
            let is_rendered = role.role_arn.highest_segment().is_some();
            let statement = Statement {
                audience: role.audience.clone(),
                subject,
                is_rendered,
            };
            let excess = excess(&statement.subject);
            self.warnings
                .extend(excess.map(|text| format!("role {name:?}: {text}")));
            self.trust(&arn, role, statement);
        }
        let exact = role.spiffe_id.exact();
        let known = ids
            .iter()
            .chain(&exact)
            .filter(|id| role.spiffe_id.matches(id));
        let known: BTreeSet<SpiffeId> = known.cloned().collect();
        self.add_chain(role, &known.into_iter().collect::<Vec<_>>());
    }

    fn trust(&mut self, arn: &RoleArn, by: &Role, statement: Statement) {
        let Some(account) = self.account_of(arn) else {
            self.warnings
                .push(format!("{arn} is left out: not a role at AWS"));
            return;
        };
        if by.exchange.uses_jwt() {
            account.audiences.insert(statement.audience.clone());
        }
        let role = account.role_of(arn);
        role.max_session = role.max_session.max(by.duration);
        let subject = &statement.subject;
        if by.exchange.roles_anywhere().is_some() && !role.certified.contains(subject) {
            role.certified.push(subject.clone());
        }
        if by.exchange.uses_jwt() && !role.statements.contains(&statement) {
            role.statements.push(statement);
        }
    }

    /// Warns about a role that several IDs share by a placeholder. Without a placeholder the
    /// sharing is intended.
    fn check_meeting(&mut self) {
        for (arn, role) in self.accounts.values().flat_map(|account| &account.roles) {
            let subjects: BTreeSet<&str> = role
                .statements
                .iter()
                .map(|statement| statement.subject.as_str())
                .collect();
            if subjects.len() > 1
                && role
                    .statements
                    .iter()
                    .any(|statement| statement.is_rendered)
            {
                let subjects: Vec<&str> = subjects.into_iter().collect();
                self.warnings.push(format!(
                    "{arn}: `role_arn` gives this one role to {}; to separate them, write into it every {{path[N]}} \
                     in which they differ",
                    subjects.join(" and ")
                ));
            }
        }
    }

    /// Warns about roles that IAM cannot create side by side: IAM's names are unique without regard
    /// to path and case.
    fn check_names(&mut self) {
        for (account, content) in &self.accounts {
            let mut names: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            for (arn, role) in &content.roles {
                names
                    .entry(role.name.to_ascii_lowercase())
                    .or_default()
                    .push(arn);
            }
            for arns in names.values().filter(|arns| arns.len() > 1) {
                self.warnings.push(format!(
                    "account {account}: IAM creates only one of {}: its role names differ neither by path nor by case",
                    arns.join(" and ")
                ));
            }
        }
    }

    fn check_limits(&mut self) {
        for (name, account) in &self.accounts {
            if account.audiences.len() > MAX_AUDIENCES {
                self.warnings.push(format!(
                    "account {name}: an IAM provider takes at most {MAX_AUDIENCES} audiences"
                ));
            }
            let provider = Value::from(self.provider_arn(name));
            let anchor = self.anchor_arn();
            for (arn, role) in &account.roles {
                let policy = role.policy(&self.issuer, &provider, &anchor);
                let length = policy.to_string().len();
                if length > MAX_POLICY_LENGTH {
                    self.warnings.push(format!(
                        "{arn}: its trust policy has {length} characters, and IAM takes {MAX_POLICY_LENGTH} unless the quota was \
                         raised (to 4096 at most)"
                    ));
                }
            }
        }
    }
}
