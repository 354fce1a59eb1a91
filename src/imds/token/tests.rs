use hyper::header::HeaderValue;

use super::*;
use crate::random_cases::for_random_cases;

const NOW: SystemTime = UNIX_EPOCH;

fn key(byte: u8) -> TokenKey {
    TokenKey::new(Zeroizing::new([byte; KEY_BYTES]))
}

fn netns(number: u8) -> NamespaceId {
    NamespaceId::from_bytes([number; NamespaceId::LENGTH])
}

fn later(seconds: u64) -> SystemTime {
    NOW + Duration::from_secs(seconds)
}

fn issued(key: &TokenKey, ttl: u16) -> String {
    key.issue(TokenTtl(ttl), netns(1), NOW)
}

#[test]
fn token_is_valid_until_its_expiry_and_in_its_namespace_alone() {
    let key = key(7);
    let token = issued(&key, 60);
    assert_eq!(token.len(), 56);
    let left = |netns, now| key.verify(token.as_bytes(), netns, now);
    assert_eq!(left(netns(1), NOW), Some(Duration::from_secs(60)));
    assert_eq!(left(netns(1), later(59)), Some(Duration::from_secs(1)));
    assert_eq!(left(netns(1), later(60)), None);
    assert_eq!(left(netns(2), NOW), None);
    // Each token differs, and no two are of one request.
    assert_ne!(token, issued(&key, 60));
}

/// Covers T41: each single bit of a token counts, and so does its length.
#[test]
fn damaged_token_is_rejected() {
    let key = key(7);
    let token = issued(&key, 21_600);
    let bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut other = bytes.clone();
        other[bit / 8] ^= 1 << (bit % 8);
        let other = URL_SAFE_NO_PAD.encode(other);
        assert_eq!(key.verify(other.as_bytes(), netns(1), NOW), None, "{bit}");
    }
    for length in 0..token.len() {
        let cut = &token.as_bytes()[..length];
        assert_eq!(key.verify(cut, netns(1), NOW), None, "{length}");
    }
    for other in [format!("{token}="), format!(" {token}"), token.repeat(2)] {
        assert_eq!(key.verify(other.as_bytes(), netns(1), NOW), None, "{other}");
    }
    assert_eq!(
        super::tests::key(8).verify(token.as_bytes(), netns(1), NOW),
        None
    );
}

#[test]
fn random_text_is_not_a_token() {
    let key = key(7);
    for_random_cases(2000, |random| {
        let length = random.usize(..70);
        let text: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
        assert_eq!(key.verify(&text, netns(1), NOW), None);
        let bytes: Vec<u8> = (0..TOKEN_BYTES).map(|_| random.u8(..)).collect();
        let text = URL_SAFE_NO_PAD.encode(bytes);
        assert_eq!(key.verify(text.as_bytes(), netns(1), NOW), None);
    });
}

#[test]
fn adopted_key_issues_and_the_previous_one_still_verifies() {
    let (key, other) = (key(7), key(8));
    let [own, foreign] = [&key, &other].map(|key| issued(key, 60));
    key.adopt(Zeroizing::new([8; KEY_BYTES]));
    key.adopt(Zeroizing::new([8; KEY_BYTES]));
    for token in [&own, &foreign, &issued(&key, 60)] {
        assert!(key.verify(token.as_bytes(), netns(1), NOW).is_some());
    }
    assert!(
        other
            .verify(issued(&key, 60).as_bytes(), netns(1), NOW)
            .is_some()
    );
    assert_eq!(**key.bytes(), [8; KEY_BYTES]);
}

#[test]
fn clock_before_1970_is_its_beginning() {
    let key = key(7);
    let before = NOW - Duration::from_secs(10);
    let token = key.issue(TokenTtl(60), netns(1), before);
    let left = key.verify(token.as_bytes(), netns(1), before);
    assert_eq!(left, Some(Duration::from_secs(60)));
}

#[test]
fn lifetime_is_one_number_within_the_bounds() {
    let parse = |values: &[&str]| {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TTL_HEADER, HeaderValue::from_str(value).unwrap());
        }
        TokenTtl::parse(&headers).map(TokenTtl::seconds)
    };
    for (text, seconds) in [("1", 1), ("60", 60), ("21600", 21_600), ("00060", 60)] {
        assert_eq!(parse(&[text]), Some(seconds), "{text}");
    }
    for text in [
        "", "0", "-1", "+1", "1.0", "1s", "21601", "65537", "000060", "0x10", "1 ",
    ] {
        assert_eq!(parse(&[text]), None, "{text}");
    }
    assert_eq!(parse(&[]), None);
    assert_eq!(parse(&["60", "60"]), None);
}

#[test]
fn debug_shows_no_key() {
    assert_eq!(format!("{:?}", key(7)), "TokenKey");
}
