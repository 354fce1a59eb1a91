//! For the fuzz targets: the paths and the tokens, with their properties.

use std::time::UNIX_EPOCH;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use super::{KEY_BYTES, MetadataPath, TokenKey, is_metadata};
use crate::netns::NamespaceId;

/// Returns whether the path is served. Asserts that it has one spelling.
pub(crate) fn path(text: &str) -> bool {
    let (path, query) = text
        .split_once('?')
        .map_or((text, None), |(path, query)| (path, Some(query)));
    let parsed = MetadataPath::parse(path, query);
    let list = |extended| match extended {
        true => "security-credentials-extended",
        false => "security-credentials",
    };
    let canonical = match parsed {
        MetadataPath::Unknown => return false,
        MetadataPath::Token => "/latest/api/token".to_owned(),
        MetadataPath::RoleName => {
            let lists =
                [false, true].map(|extended| format!("/latest/meta-data/iam/{}", list(extended)));
            let [plain, extended] = lists;
            match path.contains("extended") {
                true => extended,
                false => plain,
            }
        }
        MetadataPath::Role { name, extended } => {
            assert!((1..=64).contains(&name.len()), "{name}");
            format!("/latest/meta-data/iam/{}/{name}", list(extended))
        }
        MetadataPath::Region => "/latest/meta-data/placement/region".to_owned(),
        MetadataPath::Zone => "/latest/meta-data/placement/availability-zone".to_owned(),
        MetadataPath::Document => "/latest/dynamic/instance-identity/document".to_owned(),
    };
    assert!(is_metadata(path), "{path}");
    let segments: Vec<&str> = path
        .split('/')
        .filter(|segment| !segment.is_empty())
        .collect();
    assert_eq!(format!("/{}", segments.join("/")), canonical);
    assert_eq!(MetadataPath::parse(&canonical, None), parsed);
    true
}

/// Returns whether the text is a token of a certain key and namespace. Asserts that an accepted one
/// has one spelling, and a lifetime within the bounds.
pub(crate) fn token(text: &[u8]) -> bool {
    let key = TokenKey::new(Zeroizing::new([7; KEY_BYTES]));
    let netns = |number| NamespaceId::from_bytes([number; NamespaceId::LENGTH]);
    let Some(left) = key.verify(text, netns(1), UNIX_EPOCH) else {
        return false;
    };
    assert!((1..=21_600).contains(&left.as_secs()), "{left:?}");
    let bytes = URL_SAFE_NO_PAD.decode(text).unwrap_or_default();
    assert_eq!(URL_SAFE_NO_PAD.encode(bytes).as_bytes(), text);
    assert_eq!(key.verify(text, netns(2), UNIX_EPOCH), None);
    true
}
