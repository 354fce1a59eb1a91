use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn certificate() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    (
        rcgen::CertificateParams::new(vec![])
            .unwrap()
            .self_signed(&key)
            .unwrap()
            .pem(),
        key.serialize_pem(),
    )
}

#[test]
fn file_is_validated_before_the_sdk_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = certificate();
    let broken: Vec<_> = certificate
        .lines()
        .map(|line| if line.starts_with("MI") { "AAAA" } else { line })
        .collect();
    let table = [
        ("good.pem", certificate.clone(), None),
        (
            "two.pem",
            format!("# ours\n{certificate}{certificate}"),
            None,
        ),
        ("key.pem", key, Some("no certificate")),
        ("empty.pem", String::new(), Some("no certificate")),
        (
            "cut.pem",
            certificate[..certificate.len() / 2].to_owned(),
            Some("not a valid PEM"),
        ),
        ("broken.pem", broken.join("\n"), Some("cannot be read")),
        (
            "half.pem",
            format!("{certificate}-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"),
            Some("not a valid PEM"),
        ),
    ];
    for (name, content, reason) in table {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        match (read_file(&path), reason) {
            (Ok(_), None) => {}
            (Err(NoRoots::Invalid(error)), Some(reason)) => {
                assert!(
                    error.contains(reason) && error.contains(name),
                    "{name}: {error}"
                );
            }
            (result, _) => panic!("{name}: {:?}", result.map(|_| ())),
        }
    }
    // A missing file, or a directory at its path, is not a mistake in the configuration.
    for path in [folder.path().join("absent.pem"), folder.path().to_owned()] {
        assert!(
            matches!(read_file(&path), Err(NoRoots::Missing(_))),
            "{path:?}"
        );
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn file_that_others_can_change_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    fs::write(&path, certificate().0).unwrap();
    assert!(read_file(&path).is_ok());
    for (exposed, mode, fragments) in [
        (
            &*path,
            0o646,
            "every user of this node can write the CA file; chmod o-w ",
        ),
        (
            folder.path(),
            0o777,
            "and put another CA file there; chmod go-w ",
        ),
    ] {
        set_mode(exposed, mode);
        let error = read_file(&path).unwrap_err();
        assert!(
            matches!(&error, NoRoots::Invalid(text) if text.contains(fragments)),
            "{error:?}"
        );
        set_mode(exposed, 0o755);
    }
    assert!(read_file(&path).is_ok());
}

#[test]
fn variable_that_leads_to_a_file_of_others_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pem");
    fs::write(&path, certificate().0).unwrap();
    let found = |name: &str, value: &Path| {
        check_variables(|variable| (variable == name).then(|| value.as_os_str().to_owned()))
            .map_err(|error| {
                let text = error.text();
                assert!(
                    text.starts_with(&format!("{name} leads to {}: every user ", path.display())),
                    "{text}"
                );
            })
    };
    let variables = [("SSL_CERT_FILE", &*path), ("SSL_CERT_DIR", folder.path())];
    for (name, value) in variables {
        assert_eq!(found(name, value), Ok(()));
    }
    set_mode(&path, 0o666);
    for (name, value) in variables {
        assert_eq!(found(name, value), Err(()), "{name}");
    }
    assert_eq!(found("SSL_CERT_FILE", Path::new("/nonexistent")), Ok(()));
}

#[test]
fn system_certificates_become_pem_that_is_read_again() {
    let (certificate, _) = certificate();
    let der = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let pem = to_pem(&der);
    assert_eq!(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap(), der);
    assert!(pem.lines().all(|line| line.len() <= 64), "{pem}");
}

#[tokio::test(start_paused = true)]
async fn late_file_is_loaded_in_the_background() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    let roots = Roots::of_file(&path, FileThreads::default());
    assert!(matches!(roots.store().await, Err(NoRoots::Missing(_))));
    fs::write(&path, certificate().0).unwrap();
    // Within the pause nothing is read.
    assert!(matches!(roots.store().await, Err(NoRoots::Missing(_))));
    // The background task reads it without a call.
    let found = async {
        while roots.state.lock().await.pem.is_none() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    // The paused clock moves only in sleeps like this one.
    tokio::time::timeout(2 * BACKGROUND_PAUSE, found)
        .await
        .expect("it was found");
    fs::remove_file(&path).unwrap();
    roots.store().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn call_after_the_pause_reads_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    let roots = Roots::of_file(&path, FileThreads::default());
    assert!(roots.store().await.is_err());
    // A file without certificates is another error, and is read again as well.
    fs::write(&path, "").unwrap();
    tokio::time::advance(RELOAD_PAUSE).await;
    assert!(matches!(roots.store().await, Err(NoRoots::Invalid(_))));
    fs::write(&path, certificate().0).unwrap();
    tokio::time::advance(RELOAD_PAUSE).await;
    roots.store().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn late_file_is_read_until_it_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    let roots = Roots::of_file(&path, FileThreads::default());
    assert!(roots.store().await.is_err());
    // A part of the file is valid by itself.
    let (first, second) = (certificate().0, certificate().0);
    fs::write(&path, &first).unwrap();
    tokio::time::advance(RELOAD_PAUSE).await;
    roots.store().await.unwrap();
    let until = async |expected: &str| {
        while roots.state.lock().await.pem.as_deref() != Some(expected.as_bytes()) {
            sleep(Duration::from_millis(100)).await;
        }
    };
    until(&first).await;
    assert_eq!(roots.replaced(), 0);
    // What is not valid changes nothing.
    fs::write(&path, format!("{first}{}", &second[..second.len() / 2])).unwrap();
    sleep(BACKGROUND_PAUSE).await;
    until(&first).await;
    let whole = format!("{first}{second}");
    fs::write(&path, &whole).unwrap();
    tokio::time::timeout(2 * BACKGROUND_PAUSE, until(&whole))
        .await
        .expect("it was read again");
    assert_eq!(roots.replaced(), 1);
    // Two reads agree, so the file is not read any more.
    sleep(2 * BACKGROUND_PAUSE).await;
    fs::write(&path, &first).unwrap();
    sleep(10 * BACKGROUND_PAUSE).await;
    until(&whole).await;
    assert_eq!(Arc::weak_count(&roots), 0);
}
