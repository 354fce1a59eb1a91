//! The common part of all clients in Rust: their arguments and their output.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

/// The arguments that each client is started with: ENDPOINT BUCKET KEY TIMES PAUSE.
pub struct Arguments {
    pub endpoint: String,
    pub bucket: String,
    pub key: String,
    times: u32,
    pause: Duration,
}

impl Arguments {
    pub fn parse() -> anyhow::Result<Arguments> {
        let arguments: [String; 5] = std::env::args()
            .skip(1)
            .collect::<Vec<_>>()
            .try_into()
            .ok()
            .context("usage: ENDPOINT BUCKET KEY TIMES PAUSE")?;
        let [endpoint, bucket, key, times, pause] = arguments;
        Ok(Arguments { endpoint, bucket, key, times: times.parse()?, pause: Duration::from_secs_f64(pause.parse()?) })
    }

    /// Reads the object TIMES times, and prints one line with each result.
    pub async fn run(&self, read: impl AsyncFn() -> anyhow::Result<String>) -> ExitCode {
        let mut status = ExitCode::FAILURE;
        for i in 0..self.times {
            if i > 0 {
                tokio::time::sleep(self.pause).await;
            }
            match read().await {
                Ok(content) => {
                    println!("read {}", content.strip_suffix('\n').unwrap_or(&content));
                    status = ExitCode::SUCCESS;
                }
                Err(error) => {
                    println!("failed {}", format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" "));
                    status = ExitCode::FAILURE;
                }
            }
        }
        status
    }
}
