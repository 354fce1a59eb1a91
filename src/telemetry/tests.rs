use std::sync::Mutex;

use tracing_subscriber::fmt::MakeWriter;

use super::*;
use crate::caller::ListenerKind;
use crate::cgroup::PodUid;

/// Collects the lines of a log.
#[derive(Clone, Default)]
struct LogBuffer(Arc<Mutex<Vec<u8>>>);

impl Write for LogBuffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogBuffer {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl LogBuffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn request() -> RequestScope {
    RequestScope {
        id: RequestId {
            boot: 0x9f2c_41aa,
            number: 7,
        },
        listener: ListenerKind::Pod,
        uid: Some(1000),
        pod: PodUid::parse("2d1ac4b0-7c0e-4a43-8dc4-4b0d4b2a7f10"),
    }
}

#[tokio::test]
async fn json_line_has_the_fields_of_its_request() {
    let lines = LogBuffer::default();
    let layer = fmt::layer()
        .with_writer(lines.clone())
        .event_format(JsonLines);
    let _log = tracing_subscriber::registry().with(layer).set_default();
    tracing::warn!(missed = 3_u64, error = %"no answer", "credentials were not issued");
    let work = async {
        tracing::info!(uid = 5, "inside");
        tokio::spawn(in_current_request(async { tracing::info!("in a task") }))
            .await
            .unwrap();
        tokio::spawn(async { tracing::info!("in another task") })
            .await
            .unwrap();
    };
    request().run(work).await;
    let lines: Vec<serde_json::Value> = lines
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let [outside, inside, task, other] = &lines[..] else {
        panic!("{lines:?}")
    };
    humantime::parse_rfc3339(outside["time"].as_str().unwrap()).unwrap();
    assert_eq!(outside["level"], "WARN");
    assert_eq!(outside["target"], "awsvid::telemetry::tests");
    assert_eq!(outside["message"], "credentials were not issued");
    assert_eq!(
        (&outside["missed"], &outside["error"]),
        (&3.into(), &"no answer".into())
    );
    for line in [outside, other] {
        assert!(line.get("request_id").is_none(), "{line}");
    }
    for line in [inside, task] {
        assert_eq!(line["request_id"], "9f2c41aa-7");
        assert_eq!(line["listener"], "pod");
        assert_eq!(line["pod_uid"], "2d1ac4b0-7c0e-4a43-8dc4-4b0d4b2a7f10");
    }
    // The event's own field has precedence.
    assert_eq!((&inside["uid"], &task["uid"]), (&5.into(), &1000.into()));
}

#[tokio::test]
async fn text_line_ends_with_the_fields_of_its_request() {
    let lines = LogBuffer::default();
    let layer = fmt::layer()
        .with_writer(lines.clone())
        .fmt_fields(TextFields)
        .with_ansi(false);
    let _log = tracing_subscriber::registry().with(layer).set_default();
    tracing::info!("outside");
    request()
        .run(async { tracing::info!(missed = 3, "inside") })
        .await;
    let text = lines.text();
    let (outside, inside) = text.trim_end().split_once('\n').unwrap();
    assert!(outside.ends_with(": outside"), "{text}");
    let end = "inside missed=3 request_id=9f2c41aa-7 listener=pod uid=1000 \
               pod_uid=2d1ac4b0-7c0e-4a43-8dc4-4b0d4b2a7f10";
    assert!(inside.ends_with(end), "{text}");
}
