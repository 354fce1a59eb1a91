use aws_smithy_runtime_api::http::StatusCode;
use aws_smithy_types::body::SdkBody;

use super::*;

fn response(body: &str) -> HttpResponse {
    HttpResponse::new(StatusCode::try_from(400).unwrap(), SdkBody::from(body))
}

fn of(body: &str) -> Option<(String, String)> {
    let StsErrorResponse { code, message } = read(&response(body))?;
    Some((code.unwrap_or_default(), message))
}

#[test]
fn code_is_found_in_every_form() {
    const XMLNS: &str = "xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"";
    let aws = format!(
        "<ErrorResponse {XMLNS}>\n  <Error>\n    <Type>Sender</Type>\n    <Code>AccessDenied</Code>\n    <Message>No</Message>\n  </Error>\n  \
         <RequestId>r</RequestId>\n</ErrorResponse>\n"
    );
    let table = [
        (aws.as_str(), "No"),
        (
            "<ErrorResponse><Error><Code>AccessDenied</Code><Message>No</Message></Error></ErrorResponse>",
            "No",
        ),
        // The form of an S3: Ceph, RustFS.
        (
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>AccessDenied</Code><Message>No</Message></Error>",
            "No",
        ),
        (
            "<Error><Code>AccessDenied</Code><RequestId>tx1</RequestId><HostId>h</HostId></Error>",
            "",
        ),
        ("<Error><Message/><Code>AccessDenied</Code></Error>", ""),
        (
            "<Error><Code>AccessDenied</Code><Message></Message></Error>",
            "",
        ),
        (
            "<Error><Message>No</Message><Code> AccessDenied\n</Code></Error>",
            "No",
        ),
        (
            "<Response><Errors><Error><Code>AccessDenied</Code><Message>No</Message></Error></Errors></Response>",
            "No",
        ),
        (
            "<s:ErrorResponse xmlns:s=\"x\"><s:Error><s:Code>AccessDenied</s:Code></s:Error></s:ErrorResponse>",
            "",
        ),
        ("\u{feff}<Error><Code>AccessDenied</Code></Error>", ""),
        (
            "<Error><Code>AccessDenied</Code><Message>A &lt;b&gt; &amp; c</Message></Error>",
            "A <b> & c",
        ),
        (
            "<Error><Message><![CDATA[No]]></Message><Code>AccessDenied</Code></Error>",
            "",
        ),
        // A response that ends after the code.
        ("<Error><Code>AccessDenied</Code><Mess", ""),
        (
            r#"{"Error":{"Code":"AccessDenied","Message":"No"},"RequestId":"r"}"#,
            "No",
        ),
        (
            r#"{"ErrorResponse":{"Error":{"Code":"AccessDenied","Message":null}}}"#,
            "",
        ),
        (
            r#"{"__type":"com.amazonaws.sts#AccessDenied","message":"No"}"#,
            "No",
        ),
        (
            r#"{"__type":"AccessDenied:http://internal/","message":"No"}"#,
            "No",
        ),
        (r#"{"code":"AccessDenied","message":"No"}"#, "No"),
        (r#"{"error":"AccessDenied","error_description":"No"}"#, "No"),
        (r#"{"error":{"code":"AccessDenied","message":"No"}}"#, "No"),
        ("  {\"code\": 403, \"error\": \"AccessDenied\"}", ""),
    ];
    for (body, message) in table {
        assert_eq!(
            of(body),
            Some(("AccessDenied".to_owned(), message.to_owned())),
            "{body}"
        );
    }
}

#[test]
fn response_of_another_service_has_no_code() {
    let deep = format!("{}{{\"code\":\"X\"}}{}", "{\"a\":".repeat(9), "}".repeat(9));
    let table = [
        "",
        "upstream request timeout",
        "<html><head><title>403 Forbidden</title></head><body><h1>403 Forbidden</h1><hr><center>nginx</center></body></html>",
        "<!DOCTYPE HTML PUBLIC \"-//IETF//DTD HTML 2.0//EN\"><html><p>no</p><code>AccessDenied</code></html>",
        "<html><body><p>Secret page<br></body></html>",
        "<Error><Code>Access denied by the proxy, call Bob</Code></Error>",
        "<Error><Code></Code><Message>No</Message></Error>",
        "<Error><Message>No</Message></Error>",
        "<AssumeRoleWithWebIdentityResponse><Credentials/></AssumeRoleWithWebIdentityResponse>",
        "<",
        "{",
        "{}",
        r#"{"message":"Forbidden"}"#,
        r#"{"code":403,"message":"Forbidden"}"#,
        r#"{"error":"no route to host: x"}"#,
        r#"["AccessDenied"]"#,
        &deep,
    ];
    for body in table {
        let found = of(body);
        // One word before a colon has the form of a code. No table has that code, so the status
        // decides.
        assert!(
            found.is_none() || body.contains("no route"),
            "{body}: {found:?}"
        );
    }
    let mut response = response("");
    response
        .headers_mut()
        .insert(CODE_HEADER, "AccessDeniedException:http://internal/");
    assert_eq!(
        read(&response)
            .and_then(|rejection| rejection.code)
            .as_deref(),
        Some("AccessDeniedException")
    );
}

/// A response may be any bytes that the other end sends.
#[test]
fn mutated_answer_is_read_without_a_panic() {
    let seeds = [
        "<ErrorResponse xmlns=\"x\"><Error><Code>AccessDenied</Code><Message>A &lt;b&gt;</Message></Error></ErrorResponse>",
        "<?xml version=\"1.0\"?><!DOCTYPE a [<!ENTITY b \"c\">]><Error><Code><![CDATA[x]]></Code><Message/></Error>",
        r#"{"Error":{"Code":"AccessDenied","Message":["x",{"code":"y"}]},"error":"z"}"#,
    ];
    let mut random = fastrand::Rng::with_seed(15);
    for number in 0..20_000 {
        let mut body = seeds[number % seeds.len()].as_bytes().to_vec();
        for _ in 0..random.usize(1..6) {
            let at = random.usize(..body.len());
            match random.u8(..4) {
                0 => body[at] = random.u8(..),
                1 => drop(body.remove(at)),
                2 => body.insert(at, *random.choice(b"<>/&;\"{}[]:,!?-").unwrap()),
                _ => body.truncate(at.max(16)),
            }
        }
        let code = read(&HttpResponse::new(
            StatusCode::try_from(400).unwrap(),
            SdkBody::from(body),
        ));
        assert!(
            code.and_then(|rejection| rejection.code)
                .is_none_or(|code| code.len() <= MAX_CODE_BYTES)
        );
    }
}
