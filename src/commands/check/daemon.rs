//! The running daemon, where its state can differ from that of this process.

use std::time::Duration;

use serde_json::Value;

use super::report::CheckReport;
use crate::commands::trusted_socket;
use crate::config::Config;

const STEP: &str = "daemon";
const DAEMON_TIMEOUT: Duration = Duration::from_secs(5);

/// Queries the daemon at the configuration's status socket. Without one the daemon does not run,
/// which is not a failure: `check` also runs before the first start.
pub(super) async fn check(config: &Config, report: &mut CheckReport) {
    let Some(socket) = config.listen.status.as_deref() else {
        return;
    };
    if socket.try_exists().is_ok_and(|exists| !exists) {
        let saw = format!(
            "awsvid does not run here ({} is missing), so its attestation was not checked",
            socket.display()
        );
        return report.info(STEP, saw, "if it is to run: systemctl status awsvid");
    }
    match trusted_socket::get_status(socket, DAEMON_TIMEOUT).await {
        Ok(status) => report_state(&status, report),
        Err(error) => {
            let (path, cause) = (error.path.display(), &error.cause);
            let saw = format!("the running daemon does not answer: {path}: {cause}");
            report.info(STEP, saw, error.fix());
        }
    }
}

/// Reports whether the daemon counts executions. An older daemon lacks the field, and one that
/// refers no process to an agent has null.
fn report_state(status: &Value, report: &mut CheckReport) {
    match status["counts_executions"].as_bool() {
        None => {}
        Some(true) => report.ok(STEP, "the running daemon counts executions of programs"),
        Some(false) => report.failed(
            STEP,
            "the running daemon does not count executions of programs, so callers are rejected (unseen_program)",
            "restart awsvid; if that does not help, read the start of its log for the missing privilege",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::doc_tables::assert_documented;
    use super::super::report::Verdict;
    use super::*;
    use serde_json::json;

    #[tokio::test]
    async fn daemon_that_does_not_run_is_a_note() {
        let folder = tempfile::tempdir().unwrap();
        let text = |status: &str| {
            format!(
                "[listen]\nstatus = \"{status}\"\n[sts]\nregion = \"eu-central-1\"\n\
                 [[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = 7\n\
                 [[role]]\nname = \"a\"\nspiffe_id = \"spiffe://example.org/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n"
            )
        };
        let missing = folder.path().join("status.sock").display().to_string();
        for (socket, verdicts) in [(missing.as_str(), &[Verdict::Note][..]), ("", &[])] {
            let mut report = CheckReport::new(true);
            let loaded = Config::parse(&text(socket), &|_| None).unwrap();
            check(&loaded.config, &mut report).await;
            let found = report.findings().iter();
            let found: Vec<_> = found.map(|finding| finding.verdict).collect();
            assert_eq!(found, verdicts, "{socket}");
            for finding in report.findings() {
                assert!(finding.saw.contains(&missing), "{}", finding.saw);
                assert_documented(STEP, &finding.saw, finding.fix.as_ref().unwrap());
            }
        }
    }

    #[test]
    fn daemon_that_does_not_count_executions_is_a_failure() {
        let table = [
            (json!({ "counts_executions": true }), Some(Verdict::Pass)),
            (json!({ "counts_executions": false }), Some(Verdict::Failed)),
            (json!({ "counts_executions": null }), None),
            (json!({}), None),
        ];
        for (status, expected) in table {
            let mut report = CheckReport::new(true);
            report_state(&status, &mut report);
            assert_eq!(
                report.findings().first().map(|finding| finding.verdict),
                expected,
                "{status}"
            );
            if let Some(fix) = report
                .findings()
                .first()
                .and_then(|finding| finding.fix.as_ref())
            {
                assert_documented(STEP, &report.findings()[0].saw, fix);
            }
        }
    }
}
