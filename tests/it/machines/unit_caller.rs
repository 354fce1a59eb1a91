//! Processes that request credentials on a stock machine, and how each is started.

use super::stock_machine::AUDIT;

/// The port of a socket unit that starts a caller for each connection.
const ACTIVATED_PORT: u16 = 9740;

/// The configuration of LXC's containers. They have the machine's network.
const LXC: &str = "\
lxc.rootfs.path = dir:/srv/root
lxc.net.0.type = none
lxc.mount.auto = proc
lxc.mount.entry = /usr usr none bind,ro 0 0
lxc.mount.entry = /etc/alternatives etc/alternatives none bind,ro,create=dir 0 0
lxc.mount.entry = /run/awsvid run/awsvid none bind,create=dir 0 0
lxc.mount.entry = /run/requests run/requests none bind,ro,create=file 0 0
";

/// The way in which a process is started.
#[derive(Debug, Clone, Copy)]
pub(super) enum Launch {
    /// The system's manager, with these options of systemd-run(1).
    Service(&'static str),
    /// The user's own manager, `user@UID.service`.
    UserService,
    /// A login session of PAM's.
    Session,
    /// A socket unit, for a connection.
    Socket,
    /// podman without a daemon, with these options. The user's own manager is its parent.
    RootlessPodman(&'static str),
    /// podman as root, with these options. The container's user is root or has a user namespace.
    Podman(&'static str),
    /// Docker's daemon, with these options.
    Docker(&'static str),
    /// LXC as root, with these lines of its configuration.
    Lxc(&'static str),
}

/// The answer that awsvid has to give: an identity, or a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExpectedAnswer {
    Identity(&'static str),
    Rejected(&'static str),
}

/// A process that requests credentials, with its expected identity.
#[derive(Debug)]
pub(super) struct UnitCaller {
    pub(super) user: &'static str,
    /// The outermost unit. A name that ends with `*` is the beginning of one.
    pub(super) unit: &'static str,
    pub(super) slice: &'static str,
    pub(super) launch: Launch,
    /// The answers on the listeners. `None` if the caller does not reach it.
    pub(super) unix: Option<ExpectedAnswer>,
    pub(super) tcp: Option<ExpectedAnswer>,
    /// Whether it has its identity by its cgroup or by its unit, in a rule of awsvid's.
    pub(super) by_cgroup: bool,
    /// Whether its process lives in another namespace of pids or of users than the daemon. Old
    /// kernels cannot attest it on the unix socket.
    pub(super) in_container: bool,
}

impl UnitCaller {
    /// Returns an ordinary service of this user, which gets this identity or none.
    pub(super) const fn new(
        user: &'static str,
        unit: &'static str,
        spiffe_id: Option<&'static str>,
    ) -> Self {
        let answer = match spiffe_id {
            Some(spiffe_id) => ExpectedAnswer::Identity(spiffe_id),
            None => ExpectedAnswer::Rejected("no_identity"),
        };
        Self {
            user,
            unit,
            slice: "system.slice",
            launch: Launch::Service(""),
            unix: Some(answer),
            tcp: Some(answer),
            by_cgroup: false,
            in_container: false,
        }
    }

    /// Returns the one that awsvid knows by its cgroup or its unit.
    pub(super) const fn by_cgroup(self) -> Self {
        Self {
            by_cgroup: true,
            ..self
        }
    }

    /// Returns the one that is started so.
    pub(super) const fn launched(self, launch: Launch) -> Self {
        Self { launch, ..self }
    }

    /// Returns the one in namespaces of its own.
    pub(super) const fn in_container(self) -> Self {
        Self {
            in_container: true,
            ..self
        }
    }

    /// Returns the one without the machine's loopback.
    pub(super) const fn without_network(self) -> Self {
        Self { tcp: None, ..self }
    }

    /// Returns a script that lets it request credentials over the unix socket, TCP, and TCP over
    /// IPv6, and that prints the audit records. curl retries what may pass, as SDKs do.
    pub(super) fn script(&self) -> String {
        let get = "curl --silent --output /dev/null --max-time 60 --retry 30 --retry-delay 1 \
                   --header 'Authorization: any'";
        // One after another: the exit status of one does not end the others.
        let requests = format!(
            "{get} --unix-socket /run/awsvid/awsvid.sock http://localhost/v1/credentials
             {get} http://127.0.0.1:974/v1/credentials
             {get} http://[::1]:974/v1/credentials
             true"
        );
        format!(
            "cat >/run/requests <<'EOF'\n{requests}\nEOF
             before=$(wc -l <{AUDIT})
             {}
             tail -n +$((before + 1)) {AUDIT}\n",
            self.start("sh /run/requests")
        )
    }

    /// Returns the command that starts the caller and waits for its end.
    fn start(&self, requests: &str) -> String {
        let Self {
            user, unit, slice, ..
        } = self;
        let run = "systemd-run --quiet --collect --wait --pipe";
        let own_manager = format!(
            "loginctl enable-linger {user}
             uid=$(id --user {user})
             systemctl start user@$uid.service
             {run} --uid={user} --property=PAMName=login --setenv=XDG_RUNTIME_DIR=/run/user/$uid --"
        );
        // The machine's own programs, and awsvid's socket.
        let container = "--rm --quiet --volume /usr:/usr:ro --volume /etc/alternatives:/etc/alternatives:ro \
             --volume /run/awsvid:/run/awsvid --volume /run/requests:/run/requests:ro";
        match self.launch {
            Launch::Service(options) => format!(
                "{run} --unit={unit} --slice={slice} --uid={user} {options} -- {requests}"
            ),
            Launch::UserService => format!("{own_manager} {run} --user -- {requests}"),
            Launch::Session => {
                format!("{run} --uid={user} --property=PAMName=login -- {requests}")
            }
            Launch::Socket => format!(
                "cd /run/systemd/system
                 printf '[Socket]\\nListenStream=127.0.0.1:{ACTIVATED_PORT}\\nAccept=yes\\n' >activated.socket
                 printf '[Service]\\nUser={user}\\nStandardOutput=socket\\nExecStart={requests}\\n' >activated@.service
                 systemctl daemon-reload
                 systemctl start activated.socket
                 curl --silent --http0.9 http://127.0.0.1:{ACTIVATED_PORT} || true
                 systemctl stop activated.socket"
            ),
            Launch::RootlessPodman(options) => format!(
                "install -d -o {user} -g {user} /home/{user}
                 {}
                 chown -R {user}:{user} /home/{user}
                 {own_manager} env HOME=/home/{user} podman run {container} {options} --rootfs /home/{user}/root {requests}",
                root_directory(&format!("/home/{user}/root"))
            ),
            Launch::Podman(options) => format!(
                "{}
                 {run} --unit=podman-run -- podman run {container} {options} --rootfs /srv/root {requests}",
                root_directory("/srv/root")
            ),
            Launch::Docker(options) => format!(
                "{}
                 tar --directory /srv/root --create . | docker import - root >/dev/null
                 docker run {container} {options} root {requests}",
                root_directory("/srv/root")
            ),
            Launch::Lxc(lines) => format!(
                "{}
                 grep --quiet root: /etc/subuid || echo root:100000:65536 | tee -a /etc/subuid >>/etc/subgid
                 cat >/run/lxc.conf <<'EOF'
{LXC}{lines}
EOF
                 lxc-execute --name shop --rcfile /run/lxc.conf -- {requests}",
                root_directory("/srv/root")
            ),
        }
    }
}

/// Returns a script that makes a root directory for containers. They get the machine's /usr.
fn root_directory(path: &str) -> String {
    format!(
        "mkdir -p {path}/{{etc,run,tmp,proc,usr}}
         for name in bin lib lib64; do ln -sfn usr/$name {path}/$name; done"
    )
}
