//! Templates, compared with a model that replaces texts.

use super::*;
use crate::random_cases::for_random_cases;

const CASES: u64 = 20_000;
/// Texts between placeholders. Those without a letter or a dash cannot be in a segment.
const TEXTS: [&str; 9] = ["", "a", "-", "_b", "=", "+", "/", ",x", "a@"];
const PLACEHOLDERS: [&str; 4] = ["{path[0]}", "{path[1]}", "{path[2]}", "{path[03]}"];
/// Segments that are parts of each other.
const SEGMENTS: [&str; 6] = ["a", "b", "a-b", "-", "a.a", "_b"];
const ROLE: &str = "arn:aws:iam::123456789012:role/x";

/// Returns a template as its texts and the indices between them.
fn parts(random: &mut fastrand::Rng) -> (Vec<&'static str>, Vec<usize>) {
    let used: Vec<usize> = (0..random.usize(..4))
        .map(|_| random.usize(..PLACEHOLDERS.len()))
        .collect();
    let texts = (0..=used.len())
        .map(|_| TEXTS[random.usize(..TEXTS.len())])
        .collect();
    (texts, used)
}

fn join(
    (texts, used): &(Vec<&str>, Vec<usize>),
    filler: impl Fn(usize) -> Option<&'static str>,
) -> Option<String> {
    let mut text = ROLE.to_owned() + texts[0];
    for (index, after) in used.iter().zip(&texts[1..]) {
        text.push_str(filler(*index)?);
        text.push_str(after);
    }
    Some(text)
}

fn segments(random: &mut fastrand::Rng) -> Vec<&'static str> {
    (0..random.usize(1..5))
        .map(|_| SEGMENTS[random.usize(..SEGMENTS.len())])
        .collect()
}

#[test]
fn template_agrees_with_a_model() {
    for_random_cases(CASES, |random| {
        let parts = parts(random);
        let text = join(&parts, |index| Some(PLACEHOLDERS[index])).unwrap();
        let between = parts.0.iter().skip(1).take(parts.1.len().saturating_sub(1));
        let are_separated = between
            .clone()
            .all(|text| text.contains(['=', '+', '/', ',', '@']));
        let filled = join(&parts, |_| Some("x")).unwrap();
        let is_valid = are_separated && RoleArn::parse(&filled).is_ok();
        let parsed = ArnTemplate::parse(&text);
        assert_eq!(parsed.is_ok(), is_valid, "{text}");
        let Ok(template) = parsed else { return };
        assert_eq!(template.segments(), parts.1, "{text}");
        let ids = [segments(random), segments(random)];
        let [one, other] = ids.clone().map(|segments| {
            let id = id(&format!("spiffe://example.org/{}", segments.join("/")));
            let expected = join(&parts, |index| segments.get(index).copied());
            let expected = expected.filter(|arn| RoleArn::parse(arn).is_ok());
            let rendered = template.render(&id);
            assert_eq!(
                rendered.as_ref().map(RoleArn::as_str),
                expected.as_deref(),
                "{text} of {id}"
            );
            rendered
        });
        // No workload gets the role of another by the choice of its segments (T36).
        let used = |segments: &[&'static str]| {
            let used = parts.1.iter().map(|index| segments.get(*index).copied());
            used.collect::<Vec<_>>()
        };
        if one.is_some() && one == other {
            assert_eq!(
                used(&ids[0]),
                used(&ids[1]),
                "{text} renders one name for {ids:?}"
            );
        }
    });
}
