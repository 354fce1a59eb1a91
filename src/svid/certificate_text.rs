//! Texts of errors about certificates, for the log.

use std::error::Error;
use std::io;
use std::time::{Duration, UNIX_EPOCH};

use rustls::CertificateError;
use rustls::pki_types::UnixTime;

/// Returns the text of an error about a server's certificate. It does not have the time of the
/// check, so that errors of one cause have one text, by which the log counts them.
pub(crate) fn certificate_text(error: &CertificateError) -> String {
    let date = |time: &UnixTime| {
        let seconds = Duration::from_secs(time.as_secs());
        httpdate::fmt_http_date(UNIX_EPOCH + seconds)
    };
    match error {
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("certificate expired on {}", date(not_after))
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("certificate is not valid before {}", date(not_before))
        }
        other => other.to_string(),
    }
}

/// Returns the text of an error of a connection, like [`certificate_text`] if it is about a
/// certificate.
pub(crate) fn connection_text(error: &(dyn Error + 'static)) -> String {
    match certificate_error(error) {
        Some(bad) => format!("invalid peer certificate: {}", certificate_text(bad)),
        None => error.to_string(),
    }
}

/// Finds an error about a certificate in the errors of I/O around it. `source` skips what they
/// wrap.
fn certificate_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a CertificateError> {
    if let Some(inner) = error.downcast_ref().and_then(io::Error::get_ref) {
        return certificate_error(inner);
    }
    match error.downcast_ref()? {
        rustls::Error::InvalidCertificate(bad) => Some(bad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_no_time_of_the_check() {
        let bad = |now: u64| CertificateError::ExpiredContext {
            time: UnixTime::since_unix_epoch(Duration::from_secs(now)),
            not_after: UnixTime::since_unix_epoch(Duration::from_secs(1_580_515_200)),
        };
        let text = "certificate expired on Sat, 01 Feb 2020 00:00:00 GMT";
        let early = CertificateError::NotValidYetContext {
            time: UnixTime::now(),
            not_before: UnixTime::since_unix_epoch(Duration::from_secs(253_402_300_799)),
        };
        assert!(certificate_text(&early).ends_with("before Fri, 31 Dec 9999 23:59:59 GMT"));
        for now in [1_796_071_764, 1_796_071_765] {
            assert_eq!(certificate_text(&bad(now)), text);
            let tls = rustls::Error::InvalidCertificate(bad(now));
            let whole = format!("invalid peer certificate: {text}");
            assert_eq!(connection_text(&tls), whole);
            let wrapped = io::Error::other(io::Error::other(tls));
            assert_eq!(connection_text(&wrapped), whole);
        }
        assert_eq!(connection_text(&io::Error::other("refused")), "refused");
    }
}
