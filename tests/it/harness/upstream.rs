//! The Workload API and the verifying STS of `awsvid dev`, for tests of the daemon alone.

use std::path::{Path, PathBuf};

use awsvid::dev::local_users::User;
use awsvid::dev::{Dev, DevNames};
use tokio::runtime::Runtime;

use super::cgroup::own_rule;
use super::client::TCP_USER;

/// The identity of the user of this test, by [`Upstream::start_for_me`] and [`my_rule`].
pub(crate) const ME: &str = "spiffe://example.org/user/me";

/// Returns the rules by which the user of this test has the identity [`ME`], in its own cgroup. One
/// is for its TCP sockets (see [`connect`](super::client::connect)).
pub(crate) fn my_rule() -> String {
    own_rules(ME, own_uid())
}

/// Returns such rules for a user and an identity.
pub(crate) fn own_rules(id: &str, uid: u32) -> String {
    let cgroup = own_rule();
    [uid, TCP_USER]
        .map(|uid| format!("\n[[workload]]\nspiffe_id = \"{id}\"\nuid = {uid}\n{cgroup}"))
        .concat()
}

fn own_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// Both servers, which run until this is dropped.
pub(crate) struct Upstream {
    dev: Dev,
    _runtime: Runtime,
}

impl Upstream {
    /// Serves the identities `spiffe://example.org/user/<name>` of these users (uid, name). `serve`
    /// accepts none of `dev`'s own names.
    pub(crate) fn start(users: &[(u32, &str)]) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let users = users.iter().map(|(uid, name)| User {
            uid: *uid,
            spiffe_id: awsvid::identity::SpiffeId::parse(&format!(
                "spiffe://example.org/user/{name}"
            ))
            .expect("an ID"),
        });
        let names = DevNames {
            trust_domain: "example.org".to_owned(),
            account: "123456789012".to_owned(),
        };
        let dev = runtime
            .block_on(Dev::start_for(users.collect(), names))
            .expect("the servers of dev");
        Self {
            dev,
            _runtime: runtime,
        }
    }

    /// Serves the identity [`ME`] of the user of this test.
    pub(crate) fn start_for_me() -> Self {
        Self::start(&[(own_uid(), "me")])
    }

    /// Returns the socket of the Workload API.
    pub(crate) fn socket(&self) -> PathBuf {
        let configuration = self.configuration();
        let (_, rest) = configuration
            .split_once("\"unix://")
            .expect("a unix socket");
        rest.split_once('"').expect("a string").0.into()
    }

    /// Returns the URL of the STS.
    pub(crate) fn sts(&self) -> &str {
        self.dev.sts().url()
    }

    /// Returns the text of `configuration`, with another path for that socket.
    pub(crate) fn configuration_at(&self, path: &Path) -> String {
        self.configuration().replace(
            &self.socket().display().to_string(),
            &path.display().to_string(),
        )
    }

    /// Returns `[identity]`, `[sts]` and the role, without rules.
    pub(crate) fn configuration(&self) -> String {
        let all = self.dev.configuration(0, true);
        let section = |name: &str| {
            let from = all.find(name).expect("the section is there");
            let rest = &all[from..];
            rest[..rest.find("\n\n").unwrap_or(rest.len())].to_owned()
        };
        [section("[identity]"), section("[sts]"), section("[[role]]")].join("\n\n")
    }
}
