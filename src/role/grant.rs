//! The grant of a role: everything that distinguishes one set of credentials from another.

use std::sync::Arc;
use std::time::Duration;

use super::chain::{ChainedSession, optional, policy_arns};
use super::parameters::check_policy;
use super::{Role, RoleDenied};
use crate::identity::{
    AttestedFacts, InvalidName, RoleArn, SessionName, SpiffeId, SpiffeIdPattern, TemplateValues,
};

/// Everything that distinguishes one set of credentials from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Grant {
    /// The SPIFFE ID that gets the credentials.
    pub spiffe_id: SpiffeId,
    /// The definition that grants them.
    pub role: Arc<Role>,
    /// ARN of the first role.
    pub role_arn: RoleArn,
    /// The `RoleSessionName` of the first session.
    pub session_name: SessionName,
    /// The parts that most roles do not have.
    pub details: Option<Arc<GrantDetails>>,
}

/// The parts of a grant that only roles with session policies, templates or a chain have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct GrantDetails {
    /// The session policy of the first session.
    pub policy: Option<String>,
    /// ARNs of the managed policies of the first session.
    pub policy_arns: Vec<String>,
    /// The attested facts that the role uses.
    pub facts: AttestedFacts,
    /// The sessions after the first one. The credentials are those of the last.
    pub chain: Vec<Arc<ChainedSession>>,
}

const NO_DETAILS: &GrantDetails = &GrantDetails {
    policy: None,
    policy_arns: Vec::new(),
    facts: AttestedFacts {
        pod_uid: None,
        systemd_unit: None,
        user: None,
    },
    chain: Vec::new(),
};

impl GrantDetails {
    /// Returns the parts as a grant has them, which keeps grants without any small.
    fn shared(self) -> Option<Arc<Self>> {
        (self != *NO_DETAILS).then(|| Arc::new(self))
    }
}

impl Grant {
    /// Renders a role for a SPIFFE ID. `None` if the name of its first role cannot be rendered.
    pub(super) fn of(
        role: &Arc<Role>,
        spiffe_id: &SpiffeId,
        facts: &AttestedFacts,
    ) -> Result<Option<Self>, RoleDenied> {
        let Some(role_arn) = role.role_arn.render(spiffe_id) else {
            return Ok(None);
        };
        let session_name = role
            .session_name
            .clone()
            .unwrap_or_else(|| SessionName::of(spiffe_id));
        let facts = facts.only(&role.facts_used());
        let values = TemplateValues {
            id: spiffe_id,
            session_name: session_name.as_str(),
            facts: &facts,
        };
        let denied = |InvalidName(error)| RoleDenied::InvalidParameter(error);
        let policy = optional("policy", &role.policy, &values, check_policy).map_err(denied)?;
        let policy_arns = policy_arns(&role.policy_arns, &values).map_err(denied)?;
        let mut chain = Vec::with_capacity(role.chain.len());
        for (hop, chained) in role.chain.iter().zip(2..) {
            let session = hop_session(hop, &values, chained)?;
            chain.push(Arc::new(session));
        }
        Ok(Some(Self {
            spiffe_id: spiffe_id.clone(),
            role: role.clone(),
            role_arn,
            session_name,
            details: GrantDetails {
                policy,
                policy_arns,
                facts,
                chain,
            }
            .shared(),
        }))
    }

    /// Returns the parts that most roles do not have.
    pub fn details(&self) -> &GrantDetails {
        self.details.as_deref().unwrap_or(NO_DETAILS)
    }

    /// Returns the sessions after the first one.
    pub fn chain(&self) -> &[Arc<ChainedSession>] {
        &self.details().chain
    }

    /// Returns the grant of the session whose credentials start this one; `None` if a token of the
    /// caller does.
    ///
    /// It depends on the definitions up to that session alone. So the roles of one SPIFFE ID with
    /// the same beginning share it.
    pub fn previous(&self) -> Option<Self> {
        let (_, chain) = self.chain().split_last()?;
        let role = self.role.hop(chain.len(), &self.spiffe_id)?;
        let details = GrantDetails {
            facts: self.details().facts.only(&role.facts_used()),
            chain: chain.to_vec(),
            ..self.details().clone()
        };
        Some(Self {
            role: Arc::new(role),
            details: details.shared(),
            ..self.clone()
        })
    }

    /// Returns whether it is that of a session within a chain, which no workload gets.
    pub fn is_hop(&self) -> bool {
        self.role.is_hop()
    }

    /// Returns whether `later` is a grant of the same chain, and comes after this one.
    pub fn comes_before(&self, later: &Self) -> bool {
        let is_longer = self.chain().len() < later.chain().len();
        self.is_hop()
            && is_longer
            && std::iter::successors(later.previous(), Self::previous)
                .any(|previous| previous == *self)
    }

    /// Returns the ARN of the role whose credentials these are.
    pub fn issued_role_arn(&self) -> &RoleArn {
        self.chain()
            .last()
            .map_or(&self.role_arn, |last| &last.role_arn)
    }

    /// Returns the name of the session whose credentials these are, as AWS has it. `chosen` is that
    /// of the first session, where AWS has not used the requested one.
    pub fn issued_session_name<'a>(&'a self, chosen: Option<&'a str>) -> &'a str {
        match self.chain().last() {
            Some(last) => last.session_name.as_str(),
            None => self.first_session_name(chosen),
        }
    }

    /// Returns the name of the first session, likewise.
    pub fn first_session_name<'a>(&'a self, chosen: Option<&'a str>) -> &'a str {
        chosen.unwrap_or(self.session_name.as_str())
    }

    /// Returns the requested duration of the session whose credentials these are.
    pub fn issued_duration(&self) -> Duration {
        self.chain()
            .last()
            .map_or(self.role.duration, |last| last.duration)
    }

    /// Returns the number of the session in its chain, from 1.
    pub fn hop_number(&self) -> usize {
        self.chain().len() + 1
    }

    /// Returns whether it is that of a chain, or of a session within one.
    pub fn is_chained(&self) -> bool {
        self.is_hop() || !self.chain().is_empty()
    }
}

fn hop_session(
    hop: &super::ChainedRole,
    values: &TemplateValues<'_>,
    number: usize,
) -> Result<ChainedSession, RoleDenied> {
    hop.render(values).map_err(|InvalidName(error)| {
        RoleDenied::InvalidParameter(format!("hop {number}, {error}"))
    })
}

impl Role {
    /// Returns the definition of the session in this role's chain after which `chained` others
    /// come, for one SPIFFE ID. It has no name, so that no request selects it.
    pub(super) fn hop(&self, chained: usize, spiffe_id: &SpiffeId) -> Option<Self> {
        Some(Self {
            name: String::new(),
            spiffe_id: SpiffeIdPattern::parse(spiffe_id.as_str()).ok()?,
            chain: self.chain.get(..chained)?.to_vec(),
            ..self.clone()
        })
    }

    fn is_hop(&self) -> bool {
        self.name.is_empty()
    }
}
