//! Colours of output on terminals.

use anstyle::{AnsiColor, Style};

/// Whether output is coloured.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TerminalStyle {
    colours: bool,
}

pub(super) const BOLD: Style = Style::new().bold();
pub(super) const RED: Style = AnsiColor::Red.on_default();
pub(super) const GREEN: Style = AnsiColor::Green.on_default();
pub(super) const YELLOW: Style = AnsiColor::Yellow.on_default();

impl TerminalStyle {
    /// Enables colours only on a terminal, and only if the user did not disable them
    /// (<https://no-color.org>).
    pub(super) fn new(terminal: bool, env: impl Fn(&str) -> Option<String>) -> Self {
        let unwanted = env("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colours: terminal && !unwanted && env("TERM").as_deref() != Some("dumb"),
        }
    }

    /// Returns a style without colours.
    #[cfg(test)]
    pub(super) fn plain() -> Self {
        Self::default()
    }

    /// Returns the text in one of the styles above.
    pub(super) fn paint(self, style: Style, text: &str) -> String {
        if self.colours && !text.is_empty() {
            format!("{style}{text}{style:#}")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_need_a_terminal_and_no_opt_out() {
        let colours = |terminal, variable: (&str, &str)| {
            let style = TerminalStyle::new(terminal, |name| {
                (name == variable.0).then(|| variable.1.to_owned())
            });
            style.paint(RED, "text").contains('\x1b')
        };
        assert!(colours(true, ("TERM", "xterm")));
        assert!(colours(true, ("NO_COLOR", "")));
        assert!(!colours(true, ("NO_COLOR", "1")));
        assert!(!colours(true, ("TERM", "dumb")));
        assert!(!colours(false, ("TERM", "xterm")));
    }
}
