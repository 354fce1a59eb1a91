use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;
use crate::config::LoadedConfig;

/// The main file, whose rule and role have the lines 4 and 7.
const MAIN: &str = "\
include = \"conf.d/*.toml\"
[sts]
region = \"eu-central-1\"
[[workload]]
spiffe_id = \"spiffe://example.org/billing\"
uid = 1001
[[role]]
name = \"billing\"
spiffe_id = \"spiffe://example.org/billing\"
role_arn = \"arn:aws:iam::123456789012:role/billing\"
";

fn role(name: &str) -> String {
    format!(
        "[[role]]\nname = \"{name}\"\nspiffe_id = \"spiffe://example.org/{name}\"\n\
         role_arn = \"arn:aws:iam::123456789012:role/{name}\"\n"
    )
}

/// Returns a directory with these files. A name without a directory is that of the main file.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("conf.d")).unwrap();
    for (name, text) in files {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    }
    directory
}

fn load(directory: &TempDir) -> Result<LoadedConfig, String> {
    let path = directory.path().join("awsvid.toml");
    let shown = |text: &str| text.replace(&format!("{}/", directory.path().display()), "");
    Config::load(&path, Exposure::Ignored, |_| None).map_err(|errors| shown(&errors.to_string()))
}

fn names(loaded: &LoadedConfig) -> Vec<&str> {
    let roles = loaded.config.roles.defined.iter();
    roles.map(|role| role.name.as_str()).collect()
}

#[test]
fn included_files_continue_the_lists_in_the_order_of_their_names() {
    let rule = "[[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = 7\n";
    let directory = directory(&[
        ("awsvid.toml", MAIN),
        ("conf.d/b.toml", &role("b")),
        ("conf.d/a.toml", &(rule.to_owned() + &role("a"))),
        ("conf.d/.hidden.toml", "wrong"),
        ("conf.d/c.toml.orig", "wrong"),
    ]);
    let loaded = load(&directory).unwrap();
    assert_eq!(names(&loaded), ["billing", "a", "b"]);
    let rules = &loaded.config.workloads;
    assert_eq!(rules.len(), 2);
    let line = rules[1].line.as_ref().unwrap();
    let file = directory.path().join("conf.d/a.toml");
    assert_eq!((line.file(), line.number()), (Some(&*file), 1));
    let texts = MAIN.to_owned() + rule + &role("a") + &role("b");
    let expected = ConfigDigest::of([texts.as_bytes()]).to_string();
    assert_eq!(loaded.config.digest.to_string(), expected);
}

#[test]
fn page_shows_the_file_of_each_included_table() {
    let directory = directory(&[("awsvid.toml", MAIN), ("conf.d/a.toml", &role("a"))]);
    let loaded = load(&directory).unwrap();
    let page = loaded.show(&|_| None);
    let header = |name: &str| {
        let at = page.find(&format!("\nname = \"{name}\"")).unwrap();
        page[..at].lines().next_back().unwrap().to_owned()
    };
    assert_eq!(header("billing"), "[[role]]");
    let file = directory.path().join("conf.d/a.toml");
    assert_eq!(
        header("a"),
        format!("{:<56} # {}", "[[role]]", file.display())
    );
    assert!(page.starts_with("# include "), "{page}");
    let again = Config::parse(&page, &|_| None).unwrap();
    assert_eq!(names(&again), names(&loaded));
}

#[test]
fn errors_name_the_file_and_the_line() {
    let wrong = "[[role]]\nname = \"billing\"\nspiffe_id = \"spiffe://example.org/a\"\n\
                 role_arn = \"arn:aws:iam::1:role/a\"\nregon = \"x\"\n[sts]\nregion = \"x\"\n";
    let directory = directory(&[
        ("awsvid.toml", &MAIN.replace("1001", "-1")),
        ("conf.d/a.toml", wrong),
        ("conf.d/b.toml", &role("billing")),
    ]);
    let errors = load(&directory).unwrap_err();
    let begins: Vec<&str> = errors
        .lines()
        .map(|line| line.split(": ").next().unwrap())
        .collect();
    assert_eq!(
        begins,
        [
            "awsvid.toml:6",
            "conf.d/a.toml:4",
            "conf.d/a.toml:5",
            "conf.d/a.toml:6",
            "conf.d/b.toml:2"
        ],
        "{errors}"
    );
    assert!(
        errors.contains("conf.d/a.toml:6: sts: an included file has only [[workload]] and [[role]]; move it to the file with `include`"),
        "{errors}"
    );
    assert!(
        errors.contains("conf.d/b.toml:2: role.name: the one in line 8 has this name, too"),
        "{errors}"
    );
}

#[test]
fn error_refers_to_the_line_of_another_file() {
    let directory = directory(&[
        ("awsvid.toml", MAIN),
        ("conf.d/a.toml", &role("a")),
        ("conf.d/b.toml", &format!("\n{}", role("a"))),
    ]);
    let errors = load(&directory).unwrap_err();
    let file = "conf.d/a.toml has this name, too";
    assert!(
        errors.contains(&format!(
            "conf.d/b.toml:3: role.name: the one in line 2 of {file}"
        )),
        "{errors}"
    );
}

#[test]
fn syntax_errors_of_all_files_are_reported() {
    let directory = directory(&[
        ("awsvid.toml", MAIN),
        ("conf.d/a.toml", "\n[[role]\n"),
        ("conf.d/b.toml", "x"),
    ]);
    let errors = load(&directory).unwrap_err();
    assert_eq!(errors.lines().count(), 2, "{errors}");
    assert!(
        errors.starts_with("conf.d/a.toml:2: this is not TOML"),
        "{errors}"
    );
}

/// The value of `include`, and the error.
const REJECTED: [(&str, &str); 6] = [
    (
        "\"conf.d/none.toml\"",
        "none.toml cannot be read: No such file",
    ),
    (
        "\"conf.d\"",
        "conf.d cannot be read: it is not a regular file",
    ),
    ("[\"*/a.toml\"]", "has a wildcard in a directory's name"),
    ("\"conf.d/[.toml\"", "is not a pattern"),
    ("\"..\"", "does not name a file"),
    ("7", "this is an integer, where a list is wanted"),
];

#[test]
fn include_that_cannot_be_read_is_an_error_in_its_line() {
    for (value, words) in REJECTED {
        let text = MAIN.replace("\"conf.d/*.toml\"", value);
        let errors = load(&directory(&[("awsvid.toml", &text)])).unwrap_err();
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(
            errors.starts_with("awsvid.toml:1: include: ") && errors.contains(words),
            "{value}: {errors}"
        );
    }
}

#[test]
fn text_without_a_file_includes_nothing() {
    let problems = Config::parse(MAIN, &|_| None).unwrap_err();
    let [problem] = &problems[..] else {
        panic!("{problems:?}")
    };
    assert_eq!(
        problem.to_string(),
        "include: a text without a file has no directory for other files; name the configuration by its file"
    );
}

#[test]
fn file_is_read_once_and_missing_directory_is_empty() {
    let text = MAIN.replace(
        "\"conf.d/*.toml\"",
        "[\"*.toml\", \"conf.d/*.toml\", \"conf.d/a.toml\", \"missing/*.toml\"]",
    );
    let directory = directory(&[("awsvid.toml", &text), ("conf.d/a.toml", &role("a"))]);
    symlink("a.toml", directory.path().join("conf.d/b.toml")).unwrap();
    assert_eq!(names(&load(&directory).unwrap()), ["billing", "a"]);
}

#[test]
fn included_file_that_others_can_change_is_rejected() {
    let directory = directory(&[("awsvid.toml", MAIN), ("conf.d/a.toml", &role("a"))]);
    let path = directory.path().join("awsvid.toml");
    let included = directory.path().join("conf.d/a.toml");
    let load = |exposure| Config::load(&path, exposure, |_| None);
    assert!(load(Exposure::Rejected).is_ok());
    fs::set_permissions(&included, PermissionsExt::from_mode(0o646)).unwrap();
    let errors = load(Exposure::Rejected).unwrap_err().to_string();
    let expected = format!(
        "{}:1: include: {included}: every user of this node can write the configuration; chmod o-w {included}",
        path.display(),
        included = included.display()
    );
    assert_eq!(errors, expected);
    let warnings = load(Exposure::Warned).unwrap().warnings;
    assert!(
        warnings
            .iter()
            .any(|warning| errors.ends_with(&warning.to_string())),
        "{warnings:?}"
    );
}

#[test]
fn fingerprint_changes_with_each_file() {
    let directory = directory(&[("awsvid.toml", MAIN), ("conf.d/a.toml", &role("a"))]);
    let path = directory.path().join("awsvid.toml");
    let mut seen = vec![ConfigFiles::fingerprint(&path)];
    assert_eq!(ConfigFiles::fingerprint(&path), seen[0]);
    let included = |name: &str| directory.path().join("conf.d").join(name);
    let mut differs = |what: &str| {
        let now = ConfigFiles::fingerprint(&path);
        assert!(!seen.contains(&now), "{what}");
        seen.push(now);
    };
    fs::write(included("a.toml"), role("b")).unwrap();
    differs("another content");
    fs::rename(included("a.toml"), included("c.toml")).unwrap();
    differs("another name");
    fs::write(included("d.toml"), "").unwrap();
    differs("another file");
    fs::write(included("d.toml"), b"\xff").unwrap();
    differs("a file that is not text");
    fs::remove_file(&path).unwrap();
    differs("no main file");
}

#[test]
fn watched_paths_are_those_of_the_patterns() {
    let text = MAIN.replace("\"conf.d/*.toml\"", "[\"conf.d/*.toml\", \"/a/b.toml\"]");
    let directory = directory(&[("awsvid.toml", &text)]);
    let path = directory.path().join("awsvid.toml");
    let expected = [
        path.clone(),
        directory.path().join("conf.d/*"),
        PathBuf::from("/a/b.toml"),
    ];
    assert_eq!(ConfigFiles::watched_paths(&path), expected);
}
