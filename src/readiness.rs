//! When the daemon is ready: each listener, the identity source and STS have answered once.

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
use crate::config::{self, Config};
use crate::pods::Gate;
use crate::role::StsTarget;
use crate::sts::Sts;
use crate::svid::IdentitySource;
use crate::telemetry::Quota;

/// Between rounds of questions.
const AGAIN: Duration = Duration::from_secs(1);
/// For one answer of a listener.
const ANSWER: Duration = Duration::from_secs(5);
/// So many reasons may follow each other and have a line of the log each.
const LINES: u32 = 5;
/// After that.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// What has to answer.
#[derive(Debug)]
pub struct Probes {
    unix: Option<PathBuf>,
    token_file: PathBuf,
    source: Arc<dyn IdentitySource>,
    audience: String,
    sts: Arc<Sts>,
    targets: Vec<StsTarget>,
}

impl Probes {
    /// Takes what is to be asked from the configuration.
    pub fn new(config: &Config, source: Arc<dyn IdentitySource>, sts: Arc<Sts>) -> Self {
        let mut targets: Vec<_> = config.roles.defined.iter().map(|role| role.sts.clone()).collect();
        targets.sort_by(|a, b| (&a.endpoint, &a.region).cmp(&(&b.endpoint, &b.region)));
        targets.dedup();
        let audience = config.roles.defined.first().map_or(&config.identity.audience, |role| &role.audience).clone();
        let config::Listen { unix, token_file, .. } = config.listen.clone();
        Self { unix, token_file, source, audience, sts, targets }
    }

    /// Asks until all have answered.
    pub async fn until_ready(mut self, tcp: Vec<SocketAddr>, mut pods: Option<Gate>, readiness: Arc<Readiness>) {
        let mut told = Told::default();
        let mut unanswered: Vec<Listening> = self.unix.take().map(Listening::Unix).into_iter().collect();
        unanswered.extend(tcp.into_iter().map(Listening::Tcp));
        loop {
            let Some(missing) = self.missing(&mut unanswered).await else {
                if let Some(pods) = &mut pods {
                    pods.pass().await;
                }
                readiness.reached();
                tracing::info!("ready");
                return;
            };
            let missing = one_line(&missing);
            readiness.missing(&missing);
            if told.is_news(&missing) {
                tracing::warn!("not ready: {missing}");
            }
            sleep(AGAIN).await;
        }
    }

    /// What has not answered yet. Each listener is asked until it has answered once: its requests are audited like others.
    async fn missing(&self, unanswered: &mut Vec<Listening>) -> Option<String> {
        while let Some(listener) = unanswered.last() {
            if !listener.answers(&self.token_file).await {
                return Some(format!("the listener {listener} does not answer the daemon itself"));
            }
            unanswered.pop();
        }
        if let Err(error) = self.source.ready(&self.audience).await {
            return Some(format!("the identity source: {error}"));
        }
        for target in &self.targets {
            if let Err(error) = self.sts.answers(target).await {
                return Some(format!("STS: {error}"));
            }
        }
        None
    }
}

/// Which reasons the log has: each when it comes, and no line while it stays. Reasons that alternate, or that contain another
/// number each time, would be a line in each round, so their lines are bounded.
#[derive(Debug)]
struct Told {
    last: String,
    lines: Quota,
}

impl Default for Told {
    fn default() -> Self {
        Self { last: String::new(), lines: Quota::new(LINES, LINE_EVERY) }
    }
}

impl Told {
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
    let words = text.split(|c: char| c.is_control() || c.is_whitespace()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// One of the daemon's own listeners.
#[derive(Debug)]
enum Listening {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

impl Listening {
    /// Whether it attests this process, or nobody can reach it: systemd binds an address of a family that is switched off.
    async fn answers(&self, token_file: &Path) -> bool {
        // Where any value will do, the token does as well.
        let token = Zeroizing::new(std::fs::read_to_string(token_file).unwrap_or_default());
        let probe = probe(&token);
        let asked = timeout(ANSWER, async {
            match self {
                Self::Unix(path) => asks(UnixStream::connect(path).await?, &probe).await,
                Self::Tcp(address) => asks(TcpStream::connect(address).await?, &probe).await,
            }
        });
        match asked.await {
            Ok(Ok(recognized)) => recognized,
            Ok(Err(error)) => {
                let absent = matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::NetworkUnreachable);
                if absent {
                    tracing::warn!(listener = %self, "this machine has no such address; clients use the others");
                }
                absent
            }
            Err(_) => false,
        }
    }
}

/// For a path that does not exist: whoever asks for it is attested, and then gets 404 whatever the rules say.
fn probe(token: &str) -> Zeroizing<String> {
    Zeroizing::new(format!("GET /probe HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n"))
}

/// Whether the other end attests this process and finds nothing at the path: 403 would be a refusal to attest it.
async fn asks<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, probe: &str) -> io::Result<bool> {
    stream.write_all(probe.as_bytes()).await?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await?;
    Ok(&head == b"HTTP/1.1 404")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reason_is_told_when_it_comes_and_never_once_a_second() {
        let mut told = Told::default();
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
        assert!(lines.len() <= 2 + 5 + 600 / 30 + 1, "{} lines: {lines:?}", lines.len());
        assert_eq!(lines.last(), Some(&"STS: last"), "{lines:?}");
    }

    #[test]
    fn whatever_others_say_is_one_line() {
        assert_eq!(one_line("STS:\n  \u{1b}[31mno\r\n\tmore\n"), "STS: [31mno more");
    }
}
