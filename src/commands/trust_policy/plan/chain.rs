//! Both ends of each step in a chain of roles: the trust policy of the role that is assumed, and
//! the permission of the role before it.

use serde_json::{Value, json};

use super::{Plan, PlannedAccount, PlannedAccountName, PlannedRole};
use crate::identity::{AttestedFacts, RoleArn, SessionName, SpiffeId, TemplateValues};
use crate::role::{ChainedRole, Role, required_actions};

/// Name of the inline policy that permits a role to assume others.
pub(in crate::commands::trust_policy) const PERMISSION_NAME: &str = "awsvid-chain";

/// A statement of a trust policy that admits the sessions of another role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::commands::trust_policy) struct ChainedStatement {
    pub(in crate::commands::trust_policy) principal: RoleArn,
    pub(in crate::commands::trust_policy) actions: Vec<&'static str>,
    pub(in crate::commands::trust_policy) external_id: Option<String>,
}

/// A statement that permits a role to assume another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::commands::trust_policy) struct Permission {
    role_arn: RoleArn,
    actions: Vec<&'static str>,
}

impl ChainedStatement {
    pub(in crate::commands::trust_policy) fn json(&self) -> Value {
        let mut statement = json!({
            "Effect": "Allow",
            "Principal": { "AWS": self.principal.as_str() },
            "Action": self.actions,
        });
        if let Some(id) = &self.external_id {
            statement["Condition"] = json!({ "StringEquals": { "sts:ExternalId": id } });
        }
        statement
    }
}

impl PlannedRole {
    /// Returns the inline policy for the next roles of chains; `None` if there are none.
    pub(in crate::commands::trust_policy) fn permission_policy(&self) -> Option<Value> {
        let statement = |permission: &Permission| {
            json!({
                "Effect": "Allow",
                "Action": permission.actions,
                "Resource": permission.role_arn.as_str(),
            })
        };
        let statements: Vec<Value> = self.permissions.iter().map(statement).collect();
        (!statements.is_empty())
            .then(|| json!({ "Version": "2012-10-17", "Statement": statements }))
    }
}

impl PlannedAccount {
    /// Returns the planned role with this ARN, which is added if it is missing.
    pub(super) fn role_of(&mut self, arn: &RoleArn) -> &mut PlannedRole {
        let role = self.roles.entry(arn.as_str().to_owned());
        role.or_insert_with(|| PlannedRole::of(arn))
    }
}

/// One step of a chain for one SPIFFE ID.
struct Step {
    previous: RoleArn,
    next: RoleArn,
    actions: Vec<&'static str>,
    external_id: Option<String>,
}

impl Plan {
    /// Adds both ends of each step of a role's chain. `ids` are the known IDs that the role covers.
    pub(super) fn add_chain(&mut self, role: &Role, ids: &[SpiffeId]) {
        if role.chain.is_empty() {
            return;
        }
        let depends =
            role.role_arn.highest_segment().is_some() || role.chain.iter().any(depends_on_caller);
        // Steps that depend on no ID are the same for any.
        let any = SpiffeId::parse("spiffe://any/any").ok();
        let ids: Vec<SpiffeId> = match depends {
            true => ids.to_vec(),
            false => any.into_iter().collect(),
        };
        if ids.is_empty() {
            self.warnings.push(format!(
                "the chain of role {:?} is left out: it depends on the SPIFFE ID, and no ID that it covers is known; \
                 give them with --spiffe-id",
                role.name
            ));
        }
        for id in &ids {
            for step in steps(role, id) {
                self.add_step(step);
            }
        }
        self.warn_of_facts(role);
    }

    fn add_step(&mut self, step: Step) {
        let permission = Permission {
            role_arn: step.next.clone(),
            actions: step.actions.clone(),
        };
        if let Some(previous) = self.role_of(&step.previous)
            && !previous.permissions.contains(&permission)
        {
            previous.permissions.push(permission);
        }
        let statement = ChainedStatement {
            principal: step.previous,
            actions: step.actions,
            external_id: step.external_id,
        };
        match self.role_of(&step.next) {
            Some(next) if !next.chained.contains(&statement) => next.chained.push(statement),
            Some(_) => {}
            None => self
                .warnings
                .push(format!("{} is left out: not a role at AWS", step.next)),
        }
    }

    /// Returns the planned account of this role, which is added if it is missing. `None` if
    /// the role is not one at AWS.
    pub(super) fn account_of(&mut self, arn: &RoleArn) -> Option<&mut PlannedAccount> {
        let name = PlannedAccountName {
            partition: arn.partition()?.to_owned(),
            number: arn.account()?.to_owned(),
        };
        Some(self.accounts.entry(name).or_default())
    }

    fn role_of(&mut self, arn: &RoleArn) -> Option<&mut PlannedRole> {
        Some(self.account_of(arn)?.role_of(arn))
    }

    fn warn_of_facts(&mut self, role: &Role) {
        let has_facts = |chained: &ChainedRole| {
            let id = chained.external_id.as_ref();
            id.is_some_and(|id| id.placeholders().any(|value| value.is_fact()))
        };
        if role.chain.iter().any(has_facts) {
            self.warnings.push(format!(
                "role {:?}: `external_id` depends on a fact about the caller, so the trust policy does not compare it",
                role.name
            ));
        }
    }
}

fn depends_on_caller(chained: &ChainedRole) -> bool {
    let id = chained.external_id.as_ref();
    chained.role_arn.highest_segment().is_some() || id.is_some_and(|id| !id.is_constant())
}

/// Returns the steps of a chain for an ID, up to one whose ARN cannot be rendered.
fn steps(role: &Role, id: &SpiffeId) -> Vec<Step> {
    let mut steps = Vec::new();
    let Some(mut previous) = role.role_arn.render(id) else {
        return steps;
    };
    let name = role.session_name.clone();
    let name = name.unwrap_or_else(|| SessionName::of(id));
    let values = TemplateValues {
        id,
        session_name: name.as_str(),
        facts: &AttestedFacts::default(),
    };
    for (chained, count) in role.chain.iter().zip(1..) {
        let Some(next) = chained.role_arn.render(id) else {
            break;
        };
        let external_id = chained.external_id.as_ref();
        steps.push(Step {
            external_id: external_id.and_then(|id| id.render(&values).ok()),
            previous,
            next: next.clone(),
            actions: required_actions(&role.exchange, &role.chain[..count]),
        });
        previous = next;
    }
    steps
}
