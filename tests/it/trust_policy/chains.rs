//! Both ends of each step of a chain, as the real CLI sends them.

use super::*;

const CHAIN: &str = "\
[[role.chain]]
role_arn = \"arn:aws:iam::123456789012:role/middle\"
external_id = \"shared-id\"
tags = { \"spiffe-id\" = \"{spiffe_id}\" }
transitive_tags = [\"spiffe-id\"]
[[role.chain]]
role_arn = \"arn:aws:iam::123456789012:role/last\"
source_identity = \"{session_name}\"
";

#[test]
fn cli_sends_both_ends_of_each_step() {
    let folder = folder();
    let Some(aws) = tool("aws") else {
        return;
    };
    let config = folder.path().join("awsvid.toml");
    let text = format!(
        "[sts]\nregion = \"eu-central-1\"\n[[workload]]\nspiffe_id = \"{READER}\"\nuid = 1001\n\
         [[role]]\nname = \"app\"\nspiffe_id = \"{READER}\"\nrole_arn = \"arn:aws:iam::123456789012:role/hop\"\n{CHAIN}"
    );
    fs::write(&config, text).unwrap();
    let arguments = ["--issuer", "https://oidc.example.org", "--new-provider"];
    let script = trust_policy(&config, &arguments).stdout;
    let sent = sent_by_cli(&aws, folder.path(), &script);
    let statement = |action: &str, role: &str, key: &str| -> Value {
        let of_role = |form: &&HashMap<String, String>| {
            form["Action"] == action && form.get("RoleName").is_some_and(|name| name == role)
        };
        let form = sent.iter().find(of_role);
        let form = form.unwrap_or_else(|| panic!("{action} {role}: {sent:?}"));
        let policy: Value = serde_json::from_str(&form[key]).unwrap();
        policy["Statement"][0].clone()
    };
    let arn = |name: &str| format!("arn:aws:iam::123456789012:role/{name}");
    let actions = ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"];
    for (previous, next, actions, condition) in [
        (
            "hop",
            "middle",
            &actions[..2],
            json!({ "StringEquals": { "sts:ExternalId": "shared-id" } }),
        ),
        // The tag of the middle session stays, so it is one of the last session too.
        ("middle", "last", &actions[..], Value::Null),
    ] {
        let trust = statement("CreateRole", next, "AssumeRolePolicyDocument");
        assert_eq!(trust["Principal"], json!({ "AWS": arn(previous) }));
        assert_eq!(
            (&trust["Action"], &trust["Condition"]),
            (&json!(actions), &condition)
        );
        let permission = statement("PutRolePolicy", previous, "PolicyDocument");
        let expected = json!({ "Effect": "Allow", "Action": actions, "Resource": arn(next) });
        assert_eq!(permission, expected);
    }
}
