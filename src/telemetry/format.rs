//! The formats of a line: JSON with the names of audit records, and text for a terminal.

use std::fmt;
use std::io;

use serde::Serializer;
use serde::ser::SerializeMap;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::request::RequestScope;
use crate::clock::{Clock, printable};

/// One JSON object a line. `time` and the fields of the request have the names that they have in
/// audit records.
pub(super) struct JsonLines;

/// The fields of an event, in their order.
#[derive(Default)]
struct EventFields(Vec<(&'static str, Value)>);

/// The name of the module in events that come from the crate `log`.
const LOG_TARGET: &str = "log.target";
/// Its fields, which repeat what other fields have.
const LOG_FIELDS: &str = "log.";

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let line = json(event).map_err(|_| fmt::Error)?;
        writeln!(writer, "{}", String::from_utf8_lossy(&line))
    }
}

fn json(event: &Event<'_>) -> io::Result<Vec<u8>> {
    let mut fields = EventFields::default();
    event.record(&mut fields);
    let target = fields.text(LOG_TARGET).unwrap_or(event.metadata().target());
    let mut line = Vec::with_capacity(512);
    let mut serializer = serde_json::Serializer::new(&mut line);
    let mut map = serializer.serialize_map(None)?;
    let time = humantime::format_rfc3339_micros(printable(Clock::system().now()));
    map.serialize_entry("time", &time.to_string())?;
    map.serialize_entry("level", event.metadata().level().as_str())?;
    map.serialize_entry("target", target)?;
    for (name, value) in fields
        .0
        .iter()
        .filter(|(name, _)| !name.starts_with(LOG_FIELDS))
    {
        map.serialize_entry(name, value)?;
    }
    for (name, value) in request_fields() {
        if !fields.has(name) {
            map.serialize_entry(name, &value)?;
        }
    }
    map.end()?;
    Ok(line)
}

impl EventFields {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(field, _)| *field == name)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(field, _)| *field == name)?.1.as_str()
    }

    fn push(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.push((field.name(), value.into()));
    }
}

impl Visit for EventFields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, value);
    }
}

/// Returns the fields of the current request; none outside of one.
fn request_fields() -> Vec<(&'static str, Value)> {
    let fields = RequestScope::with_current(|request| {
        let pod = request.pod.as_ref().map(|pod| pod.as_str().into());
        [
            ("request_id", Some(request.id.to_string().into())),
            ("listener", Some(request.listener.name().into())),
            ("uid", request.uid.map(Value::from)),
            ("pod_uid", pod),
        ]
    });
    let fields = fields.into_iter().flatten();
    fields
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
}

/// The fields of a line of text, followed by those of the request.
pub(super) struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: R,
    ) -> fmt::Result {
        DefaultFields::new().format_fields(writer.by_ref(), fields)?;
        for (name, value) in request_fields() {
            match value {
                Value::String(text) => write!(writer, " {name}={text}")?,
                value => write!(writer, " {name}={value}")?,
            }
        }
        Ok(())
    }
}
