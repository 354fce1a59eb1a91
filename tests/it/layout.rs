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
        let production = text.split("#[cfg(test)]").next().unwrap();
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
