//! When the daemon is ready: each listener, the identity source and STS have answered once.
//!
//! A listener whose callers this kernel lets nobody attest is left out, with a line in the log: the others serve, and waiting does
//! not change a kernel. Without any other listener the daemon is not ready.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use crate::admin::Readiness;
use crate::attest::Attestor;
use crate::config::{self, Config};
use crate::metrics::Metrics;
use crate::pods::TakeoverGate;
use crate::role::StsTarget;
use crate::sts::Sts;
use crate::svid::IdentitySource;
use crate::telemetry::LogQuota;

/// Between rounds of questions.
const AGAIN: Duration = Duration::from_secs(1);
/// For one answer of a listener.
const ANSWER: Duration = Duration::from_secs(5);
/// The longest answer, in bytes. What awsvid says of a refusal is shorter.
const ANSWER_MAX: u64 = 4096;
/// The reason that a refused caller gets where the kernel lacks something.
const UNSUPPORTED: &str = "unsupported_kernel";
const NOTHING_SERVED: &str =
    "this kernel lets nobody attest the callers of any listener in [listen] (unsupported_kernel)";
/// So many reasons may follow each other and have a line of the log each.
const LINES: u32 = 5;
/// After that.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// What has to answer.
#[derive(Debug)]
pub struct ReadinessProbes {
    unix: Option<PathBuf>,
    token_file: PathBuf,
    source: Arc<dyn IdentitySource>,
    audience: String,
    sts: Arc<Sts>,
    targets: Vec<StsTarget>,
    metrics: Metrics,
}

impl ReadinessProbes {
    /// Takes what is to be asked from the configuration.
    pub fn new(
        config: &Config,
        source: Arc<dyn IdentitySource>,
        sts: Arc<Sts>,
        metrics: Metrics,
    ) -> Self {
        // That of `allow_requested_roles` too: STS answers without a role, so none has to be known.
        let targets = config.roles.sts_targets().into_iter().cloned().collect();
        let audience = config
            .roles
            .defined
            .first()
            .map_or(&config.identity.audience, |role| &role.audience)
            .clone();
        let config::Listen {
            unix, token_file, ..
        } = config.listen.clone();
        Self {
            unix,
            token_file,
            source,
            audience,
            sts,
            targets,
            metrics,
        }
    }

    /// Asks until all have answered that can.
    pub async fn until_ready(
        mut self,
        tcp: Vec<SocketAddr>,
        mut pods: Option<TakeoverGate>,
        attestor: Arc<Attestor>,
        readiness: Arc<Readiness>,
    ) {
        let mut told = LoggedReason::default();
        let mut listeners = ProbedListeners {
            unanswered: self
                .unix
                .take()
                .map(ProbeTarget::Unix)
                .into_iter()
                .chain(tcp.into_iter().map(ProbeTarget::Tcp))
                .collect(),
            ..ProbedListeners::default()
        };
        loop {
            let missing = self
                .missing(&mut listeners, &attestor, pods.is_some())
                .await;
            if missing.is_empty() {
                listeners.warn_of_unsupported(&attestor);
                if let Some(pods) = &mut pods {
                    pods.pass().await;
                }
                readiness.set_ready();
                tracing::info!("ready");
                return;
            }
            let missing = one_line(&missing.join("; "));
            readiness.missing(&missing);
            if told.is_news(&missing) {
                tracing::warn!("not ready: {missing}");
            }
            sleep(AGAIN).await;
        }
    }

    /// What has not answered yet, all of it. Each listener is asked until it has answered once: its requests are audited like
    /// others.
    async fn missing(
        &self,
        listeners: &mut ProbedListeners,
        attestor: &Attestor,
        has_pods: bool,
    ) -> Vec<String> {
        let mut missing = Vec::new();
        if let Some(listener) = listeners.probe_all(&self.token_file).await {
            missing.push(format!(
                "the listener {listener} does not answer the daemon itself"
            ));
        } else {
            let for_tcp = attestor.missing_for_tcp();
            if listeners.serve_nobody(has_pods.then_some(for_tcp.is_none())) {
                // The listener's answer does not have the reason.
                missing.push(format!("{NOTHING_SERVED}: {}", for_tcp.unwrap_or_default()));
            }
        }
        let source = self.source.ready(&self.audience).await;
        let is_up = source.as_ref().err().is_none_or(|error| !error.is_outage());
        self.metrics.set_source_up(is_up);
        if let Err(error) = source {
            missing.push(format!("the identity source: {error}"));
        }
        for target in &self.targets {
            let sts = self.sts.probe(target).await;
            self.metrics.set_sts_up(target.to_string(), sts.is_ok());
            if let Err(error) = sts {
                missing.push(format!("STS: {error}"));
            }
        }
        missing
    }
}

/// Which reasons the log has: each when it comes, and no line while it stays. Reasons that alternate, or that contain another
/// number each time, would be a line in each round, so their lines are bounded.
#[derive(Debug)]
struct LoggedReason {
    last: String,
    lines: LogQuota,
}

impl Default for LoggedReason {
    fn default() -> Self {
        Self {
            last: String::new(),
            lines: LogQuota::new(LINES, LINE_EVERY),
        }
    }
}

impl LoggedReason {
    /// Whether the log gets a line for this. A reason that stays has one as soon as there may be one again.
    fn is_news(&mut self, missing: &str) -> bool {
        let is_news = self.last != missing && self.lines.take().is_some();
        if is_news {
            missing.clone_into(&mut self.last);
        }
        is_news
    }
}

/// Joins the lines of a reason: errors of the agent and of STS may contain line breaks.
fn one_line(text: &str) -> String {
    let words = text
        .split(|c: char| c.is_control() || c.is_whitespace())
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// The daemon's own listeners, by how they have answered it.
#[derive(Debug, Default)]
struct ProbedListeners {
    unanswered: Vec<ProbeTarget>,
    /// They refuse everybody. The kernel may come to support them later, so they are asked again until the daemon is ready.
    unsupported: Vec<ProbeTarget>,
    serves: bool,
}

impl ProbedListeners {
    /// Asks those that have not answered yet; one that still does not.
    async fn probe_all(&mut self, token_file: &Path) -> Option<&ProbeTarget> {
        self.unanswered.append(&mut self.unsupported);
        while let Some(listener) = self.unanswered.pop() {
            match listener.answer(token_file).await {
                Some(ProbeAnswer::Attested) => self.serves = true,
                Some(ProbeAnswer::Absent) => {}
                Some(ProbeAnswer::Unsupported) => self.unsupported.push(listener),
                None => {
                    self.unanswered.push(listener);
                    return self.unanswered.last();
                }
            }
        }
        None
    }

    /// Whether this kernel supports none of them. `pods`: whether it supports listeners in pods, if there are to be some.
    fn serve_nobody(&self, pods: Option<bool>) -> bool {
        let is_unsupported = pods == Some(false) || !self.unsupported.is_empty();
        is_unsupported && !self.serves && pods != Some(true)
    }

    fn warn_of_unsupported(&self, attestor: &Attestor) {
        if self.unsupported.is_empty() {
            return;
        }
        let listeners: Vec<_> = self.unsupported.iter().map(ToString::to_string).collect();
        let missing = attestor.missing_for_tcp();
        let missing = missing
            .as_deref()
            .or(attestor.missing_for_unix())
            .unwrap_or("see the lines above");
        tracing::warn!(
            "readiness leaves out {}: this kernel lets nobody attest the callers there (unsupported_kernel): {missing}",
            listeners.join(", ")
        );
    }
}

/// How a listener has answered the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProbeAnswer {
    /// It attests this process.
    Attested,
    /// Nobody can reach it: systemd binds an address of a family that is switched off.
    Absent,
    /// It refuses this process because of what the kernel lacks.
    Unsupported,
}

/// One of the daemon's own listeners.
#[derive(Debug)]
enum ProbeTarget {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for ProbeTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

impl ProbeTarget {
    /// Asks it. `None`: it does not answer, or refuses for another reason.
    async fn answer(&self, token_file: &Path) -> Option<ProbeAnswer> {
        // Where any value will do, the token does as well.
        let token = Zeroizing::new(std::fs::read_to_string(token_file).unwrap_or_default());
        let probe = probe(&token);
        let asked = timeout(ANSWER, async {
            match self {
                Self::Unix(path) => probe_listener(UnixStream::connect(path).await?, &probe).await,
                Self::Tcp(address) => {
                    probe_listener(TcpStream::connect(address).await?, &probe).await
                }
            }
        });
        match asked.await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                let absent = matches!(
                    error.kind(),
                    ErrorKind::AddrNotAvailable | ErrorKind::NetworkUnreachable
                );
                if absent {
                    tracing::warn!(listener = %self, "this machine has no such address; clients use the others");
                }
                absent.then_some(ProbeAnswer::Absent)
            }
            Err(_) => None,
        }
    }
}

/// For a path that does not exist: whoever asks for it is attested, and then gets 404 whatever the rules say.
fn probe(token: &str) -> Zeroizing<String> {
    Zeroizing::new(format!(
        "GET /probe HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n"
    ))
}

/// Whether the other end attests this process and finds nothing at the path: 403 is a refusal to attest it.
async fn probe_listener<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    probe: &str,
) -> io::Result<Option<ProbeAnswer>> {
    stream.write_all(probe.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer).await?;
    Ok(judge(&answer))
}

fn judge(answer: &[u8]) -> Option<ProbeAnswer> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let (head, body) = answer.split_at(end + 4);
    if head.starts_with(b"HTTP/1.1 404 ") {
        return Some(ProbeAnswer::Attested);
    }
    let body: serde_json::Value = serde_json::from_slice(body).ok()?;
    let is_unsupported = head.starts_with(b"HTTP/1.1 403 ") && body["code"] == UNSUPPORTED;
    is_unsupported.then_some(ProbeAnswer::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::sts::{NetworkSettings, Settings};
    use crate::svid::WorkloadApi;

    #[tokio::test(start_paused = true)]
    async fn a_reason_is_told_when_it_comes_and_never_once_a_second() {
        let mut told = LoggedReason::default();
        let mut lines = Vec::new();
        let mut seconds = async |reasons: &[&'static str], count: usize| {
            for reason in reasons.iter().cycle().take(count) {
                lines.extend(told.is_news(reason).then_some(*reason));
                sleep(AGAIN).await;
            }
        };
        // One that stays, and another one after it.
        seconds(&["the listener"], 100).await;
        seconds(&["the source"], 100).await;
        // Two that alternate, for ten minutes.
        seconds(&["STS", "the source"], 600).await;
        // The one that stays in the end.
        seconds(&["STS: last"], 100).await;
        assert_eq!(lines[..3], ["the listener", "the source", "STS"]);
        assert!(
            lines.len() <= 2 + 5 + 600 / 30 + 1,
            "{} lines: {lines:?}",
            lines.len()
        );
        assert_eq!(lines.last(), Some(&"STS: last"), "{lines:?}");
    }

    #[test]
    fn answer_tells_an_attested_caller_from_an_unsupported_kernel() {
        let refused =
            |code: &str| format!("HTTP/1.1 403 Forbidden\r\na: b\r\n\r\n{{\"code\":\"{code}\"}}");
        let table = [
            (
                "HTTP/1.1 404 Not Found\r\n\r\n".to_owned(),
                Some(ProbeAnswer::Attested),
            ),
            (refused(UNSUPPORTED), Some(ProbeAnswer::Unsupported)),
            (refused("no_holder"), None),
            (refused(UNSUPPORTED).replace("403", "503"), None),
            (refused(UNSUPPORTED).replace("\r\n\r\n", "\r\n"), None),
            (String::new(), None),
        ];
        for (text, expected) in table {
            assert_eq!(judge(text.as_bytes()), expected, "{text:?}");
        }
    }

    #[test]
    fn kernel_that_supports_no_listener_serves_nobody() {
        let unix = || ProbeTarget::Unix(PathBuf::from("/a"));
        let with = |unsupported: Vec<ProbeTarget>, serves| ProbedListeners {
            unanswered: Vec::new(),
            unsupported,
            serves,
        };
        let table = [
            // TCP alone, and TCP beside the unix socket.
            (with(vec![unix()], false), None, true),
            (with(vec![unix()], true), None, false),
            // Pods alone, and pods beside the unix socket.
            (with(vec![], false), Some(false), true),
            (with(vec![], true), Some(false), false),
            (with(vec![], false), Some(true), false),
            // A unix socket that refuses this process, which is in a container.
            (with(vec![unix()], false), Some(true), false),
            // An address of a family that is switched off.
            (with(vec![], false), None, false),
        ];
        for (listeners, pods, expected) in table {
            assert_eq!(
                listeners.serve_nobody(pods),
                expected,
                "{listeners:?} {pods:?}"
            );
        }
    }

    #[test]
    fn sts_of_requested_roles_is_asked_without_any_role() {
        let requested = "allow_requested_roles = [\"arn:aws:iam::123456789012:role/*\"]\n";
        let rest = "[identity]\nsocket = \"unix:///a\"\naudience = \"a\"\n[sts]\nregion = \"eu-central-1\"\n\
                    [[workload]]\nspiffe_id = \"spiffe://t/a\"\nuid = 1\n";
        let role = "[[role]]\nname = \"a\"\nspiffe_id = \"spiffe://t/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n";
        let other = "region = \"eu-north-1\"\n";
        for (text, regions) in [
            (format!("{requested}{rest}"), &["eu-central-1"][..]),
            (format!("{rest}{role}"), &["eu-central-1"]),
            (format!("{rest}{role}{other}"), &["eu-north-1"]),
            (
                format!("{requested}{rest}{role}{other}"),
                &["eu-north-1", "eu-central-1"],
            ),
        ] {
            let config = Config::parse(&text, &|_| None)
                .unwrap_or_else(|problems| panic!("{problems:?}"))
                .config;
            let (clock, metrics) = (Clock::system(), Metrics::default());
            let source = WorkloadApi::new(
                config.identity.socket.clone(),
                Vec::new(),
                clock.clone(),
                metrics.clone(),
            );
            let network = NetworkSettings::from_env(|_| None);
            let settings = Settings {
                timeout: ANSWER,
                max_concurrent: 4,
                ca_file: None,
                network,
            };
            let probes = ReadinessProbes::new(
                &config,
                Arc::new(source),
                Arc::new(Sts::new(settings, clock)),
                metrics,
            );
            let asked: Vec<_> = probes
                .targets
                .iter()
                .map(|target| target.region.as_str())
                .collect();
            assert_eq!(
                (asked, probes.audience.as_str()),
                (regions.to_vec(), "a"),
                "{text}"
            );
        }
    }

    #[test]
    fn whatever_others_say_is_one_line() {
        assert_eq!(
            one_line("STS:\n  \u{1b}[31mno\r\n\tmore\n"),
            "STS: [31mno more"
        );
    }
}
