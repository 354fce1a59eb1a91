//! Checks the order of modules in lib.rs, which is that of the design: a file imports only modules
//! that are listed above it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

#[test]
fn module_imports_only_modules_listed_above_it() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let map = std::fs::read_to_string(source.join("lib.rs")).unwrap();
    let order: HashMap<&str, usize> = map
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .enumerate()
        .map(|(i, name)| (name, i))
        .collect();
    assert!(
        order.len() > 15,
        "lib.rs names the modules as `pub mod name;`"
    );
    for module in order.keys() {
        // Only the fuzz targets see it.
        let is_named = map.contains(&format!("`{module}`")) || *module == "fuzzing";
        assert!(is_named, "the map in lib.rs does not name {module}");
    }
    let mut wrong = Vec::new();
    for file in files(&source) {
        let relative = file.strip_prefix(&source).unwrap();
        let module = relative
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_str()
            .unwrap()
            .trim_end_matches(".rs");
        let Some(place) = order.get(module) else {
            assert!(
                matches!(module, "lib" | "main"),
                "{module} is not in lib.rs"
            );
            continue;
        };
        let text = std::fs::read_to_string(&file).unwrap();
        let production = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        assert!(
            !production.contains("use crate::{"),
            "{}: import one module a line, so that this test reads it",
            relative.display()
        );
        let code = production
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for imported in code
            .flat_map(|line| line.split("crate::").skip(1))
            .filter_map(|rest| {
                rest.split(|c: char| !c.is_alphanumeric() && c != '_')
                    .next()
            })
        {
            if order.get(imported).is_some_and(|other| other > place) {
                wrong.push(format!(
                    "{} imports {imported}, which stands below {module}",
                    relative.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Maximum number of lines of a file without its tests.
const MAX_FILE_LINES: usize = 420;
/// Maximum number of lines of a function.
const MAX_FUNCTION_LINES: usize = 70;

#[test]
fn file_and_function_are_short() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut files_over, mut functions_over) = (Vec::new(), Vec::new());
    for file in files(&source) {
        let text = std::fs::read_to_string(&file).unwrap();
        let relative = file.strip_prefix(&source).unwrap().to_str().unwrap();
        if relative.contains("/tests/") {
            continue;
        }
        let production = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        if production.lines().count() > MAX_FILE_LINES {
            files_over.push(relative.to_owned());
        }
        for (name, length) in functions(production) {
            if length > MAX_FUNCTION_LINES {
                functions_over.push(format!("{relative}: {name}"));
            }
        }
    }
    assert!(
        files_over.is_empty(),
        "files over {MAX_FILE_LINES} lines; split them: {files_over:?}"
    );
    assert!(
        functions_over.is_empty(),
        "functions over {MAX_FUNCTION_LINES} lines; split them: {functions_over:?}"
    );
}

/// Returns the functions of a file with their lengths in lines. rustfmt indents the closing brace
/// as it does the function's first line.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some((before, after)) = code.split_once("fn ") else {
            continue;
        };
        let is_definition = before.split_whitespace().all(|word| {
            word.starts_with("pub")
                || word.ends_with(')')
                || matches!(word, "const" | "async" | "unsafe")
        });
        if !is_definition || code.ends_with("{}") {
            continue;
        }
        let name = after.split(['(', '<']).next().unwrap();
        let indent = &line[..line.len() - code.len()];
        // A declaration in a trait has no body, and ends with a semicolon at the same depth.
        let is_end = |line: &&str| {
            line.strip_prefix(indent)
                .is_some_and(|rest| rest == "}" || (!rest.starts_with(' ') && rest.ends_with(';')))
        };
        let last = lines[first..].iter().position(is_end).unwrap();
        if lines[first + last].ends_with('}') {
            found.push((name, last + 1));
        }
    }
    found
}

/// Returns all production files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.file_name().is_some_and(|name| name != "tests.rs")
            && path.extension().is_some_and(|kind| kind == "rs")
        {
            found.push(path);
        }
    }
    found
}
