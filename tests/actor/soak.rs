//! An honest workload that sends requests continuously, for long, and checks each response.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::{Value, json};

use crate::process::become_user;
use crate::raw_http::{self, Address};

const KEYS: [&str; 4] = ["AccessKeyId", "SecretAccessKey", "Token", "Expiration"];
/// The number of bad responses that are shown whole.
const SHOWN: usize = 3;

#[derive(Default)]
struct SoakResults {
    answers: usize,
    errors: usize,
    expired: usize,
    empty: usize,
    key: String,
}

/// Sends requests as `uid` until SIGTERM, with this many milliseconds between. Prints lines of
/// JSON: each access key id that differs from the previous one, the first bad responses, and at the
/// end the counts.
pub(crate) fn fetch(uid: &str, to: &Address, pause: &str) {
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.thread_block().unwrap();
    let ended = SignalFd::with_flags(&end, SfdFlags::SFD_CLOEXEC).unwrap();
    become_user(uid.parse().unwrap());
    let pause = PollTimeout::from(pause.parse::<u8>().unwrap());
    let mut results = SoakResults::default();
    while poll(&mut [PollFd::new(ended.as_fd(), PollFlags::POLLIN)], pause).unwrap() == 0 {
        results.add(&answer(to));
    }
    let SoakResults {
        answers,
        errors,
        expired,
        empty,
        ..
    } = results;
    println!(
        "{}",
        json!({ "answers": answers, "errors": errors, "expired": expired, "empty": empty })
    );
}

fn answer(to: &Address) -> io::Result<String> {
    Ok(raw_http::fetch(&to.try_connect()?))
}

impl SoakResults {
    fn add(&mut self, answer: &io::Result<String>) {
        self.answers += 1;
        let body: Option<Value> = answer.as_ref().ok().and_then(|answer| {
            let (head, body) = answer.split_once("\r\n\r\n")?;
            head.starts_with("HTTP/1.1 200 ")
                .then(|| serde_json::from_str(body).ok())?
        });
        let bad = match &body {
            None => &mut self.errors,
            Some(body)
                if KEYS
                    .iter()
                    .any(|key| body[key].as_str().is_none_or(str::is_empty)) =>
            {
                &mut self.empty
            }
            Some(body) if remaining(body).is_zero() => &mut self.expired,
            Some(body) => {
                let key = body["AccessKeyId"].as_str().unwrap();
                if key != self.key {
                    println!("{}", json!({ "key": key }));
                    self.key = key.to_owned();
                }
                return;
            }
        };
        *bad += 1;
        if self.errors + self.expired + self.empty <= SHOWN {
            // A bad response may hold secrets of these tests, which are worthless.
            println!("{}", json!({ "bad": format!("{answer:?}") }));
        }
    }
}

fn remaining(body: &Value) -> Duration {
    let expiration = humantime::parse_rfc3339(body["Expiration"].as_str().unwrap_or_default());
    expiration
        .ok()
        .and_then(|at| at.duration_since(SystemTime::now()).ok())
        .unwrap_or_default()
}
