//! The manual page awsvid.toml(5), made from the list of keys.

use std::fmt::Write;

use super::keys::{KeySpec, TABLES};

const INTRODUCTION: [&str; 3] = [
    "The daemon reads a TOML file: `/etc/awsvid/awsvid.toml`, or the file that `--config` or \
     `AWSVID_CONFIG` names. It may include others. The daemon reports all mistakes of a file at once, each with its line and its \
     fix. An unknown key is a mistake.",
    "Paths are absolute. A duration is a number with a unit, as in `\"90s\"`, `\"5m\"`, `\"1h\"`. \
     An address is an IP address with a port, as in `\"127.0.0.1:974\"` or `\"[::1]:974\"`. A \
     socket URI is `\"unix:///path/of/the/socket\"` or `\"tcp://IP:port\"`.",
    "`[[workload]]` and `[[role]]` may occur several times. Their order counts.",
];

/// Renders awsvid.toml(5) as roff.
pub fn manual_page() -> String {
    let mut page = format!(
        ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n.TH awsvid.toml 5 \"\" \"awsvid {}\"\n\
         .SH NAME\nawsvid.toml \\- configuration of awsvid\n.SH DESCRIPTION\n",
        env!("CARGO_PKG_VERSION")
    );
    for text in INTRODUCTION {
        let _ = writeln!(page, "{}\n.PP", roff(text));
    }
    for table in TABLES {
        let header = roff(&capital(&table.header()));
        let _ = writeln!(page, ".SH \"{header}\"\n{}.", roff(&capital(table.meaning)));
        for key in table.keys {
            page.push_str(&entry(key));
        }
    }
    page.push_str(
        ".SH SEE ALSO\nawsvid(1), awsvid\\-serve(1), awsvid\\-config(1)\n.PP\n\
         \\fBawsvid config show\\fR prints the effective configuration.\n",
    );
    page
}

fn entry(key: &KeySpec) -> String {
    format!(
        ".TP\n\\fB{}\\fR = {}\n{}. Default: {}.\n",
        roff(key.name),
        roff(key.value),
        roff(&capital(key.meaning)),
        roff(key.default)
    )
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|first| first.to_ascii_uppercase());
    first.into_iter().chain(chars).collect()
}

/// Escapes a text for roff, with what stands in backticks as bold.
fn roff(text: &str) -> String {
    let mut escaped = String::new();
    let mut is_code = false;
    for c in text.chars() {
        match c {
            '`' => {
                escaped.push_str(if is_code { "\\fR" } else { "\\fB" });
                is_code = !is_code;
            }
            '\\' => escaped.push_str("\\e"),
            '-' => escaped.push_str("\\-"),
            '\'' => escaped.push_str("\\*(Aq"),
            c => escaped.push(c),
        }
    }
    // A line that begins with a dot would be a request. An empty escape prevents that.
    match escaped.starts_with('.') {
        true => format!("\\&{escaped}"),
        false => escaped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_each_key_with_its_default() {
        let page = manual_page();
        assert!(page.contains(".TH awsvid.toml 5 "), "{page}");
        for table in TABLES {
            assert!(
                page.contains(&format!(".SH \"{}\"\n", capital(&table.header()))),
                "{page}"
            );
            for key in table.keys {
                assert!(page.contains(&entry(key)), "{}: {page}", key.name);
            }
        }
        let handover = ".TP\n\\fBhandover_socket\\fR = path\nUnix socket over which";
        assert!(page.contains(handover), "{page}");
    }

    #[test]
    fn texts_are_escaped() {
        assert_eq!(roff("`a-b` isn't \\"), "\\fBa\\-b\\fR isn\\*(Aqt \\e");
        assert_eq!(roff(".TH"), "\\&.TH");
    }
}
