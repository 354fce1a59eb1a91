//! Colours, for terminals whose people want them.

/// Whether there are colours.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Style {
    colours: bool,
}

pub(super) const BOLD: &str = "1";
pub(super) const RED: &str = "31";
pub(super) const GREEN: &str = "32";
pub(super) const YELLOW: &str = "33";

impl Style {
    /// Colours only on a terminal, and only if nobody has said otherwise (<https://no-color.org>).
    pub(super) fn new(terminal: bool, env: impl Fn(&str) -> Option<String>) -> Self {
        let unwanted = env("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colours: terminal && !unwanted && env("TERM").as_deref() != Some("dumb"),
        }
    }

    /// Without any.
    #[cfg(test)]
    pub(super) fn plain() -> Self {
        Self::default()
    }

    /// The text in one of the colours above.
    pub(super) fn paint(self, code: &str, text: &str) -> String {
        if self.colours && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_and_who_wants_them() {
        let colours = |terminal, variable: (&str, &str)| {
            let style = Style::new(terminal, |name| {
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
