//! Holds ARCHITECTURE.md against the tree: the map names every module and nothing that is not there,
//! and the rules that it states about layers, `unsafe`, sizes and absent things are true.
//!
//! Plain text scanning on purpose: a rule that needs a parser is too clever to be remembered.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the library lies.
const LIBRARY: &str = "crates/llava-next-video/src/";

/// The library's modules, each using only those before it.
const LAYERS: [&str; 7] = [
    "error",
    "media",
    "config",
    "processor",
    "model",
    "engine",
    "demo",
];

/// Files outside `lnv-kernels` that may hold `unsafe`, how often, and the record that says why.
const UNSAFE: [(&str, usize, &str); 2] = [
    (
        "crates/llava-next-video/src/model/weights.rs",
        2,
        "ARCHITECTURE.md",
    ),
    (
        "crates/llava-next-video/src/media/ffi.rs",
        40,
        "docs/decisions/0002-ffmpeg-in-process.md",
    ),
];

/// Most lines of a file before its tests.
const MAX_LINES: usize = 700;

/// Most lines of a decision record.
const MAX_DECISION_LINES: usize = 60;

/// What must not occur in a crate's sources or dependencies, and why.
const ABSENT: [(&str, &[&str], &str); 2] = [
    (
        "crates/llava-next-video",
        &[
            "std::net",
            "std::process::Command",
            "tokio",
            "reqwest",
            "ureq",
            "hf-hub",
            "hf_hub",
            "axum",
            "clap",
        ],
        "the library opens no socket, starts no program and no runtime, reads no command line",
    ),
    (
        "crates/lnv-kernels",
        &[
            "tokenizers",
            "safetensors",
            "serde",
            "ffmpeg",
            "minijinja",
            "std::net",
            "std::fs",
        ],
        "the kernels know no file, image or text",
    ),
];

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .nth(2)
        .expect("the crate lies two levels deep")
        .to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|cause| panic!("{}: {cause}", path.display()))
}

/// Every `.rs` file below `directory`, sorted, relative to the root.
fn rust_files(directory: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![root().join(directory)];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).expect("a readable directory") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix(root()).expect("below the root");
                found.push(relative.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

/// The sources of every crate: `crates/*/src`.
fn source_files() -> Vec<String> {
    let mut crates: Vec<_> = fs::read_dir(root().join("crates"))
        .expect("crates/")
        .map(|entry| entry.expect("a readable entry").file_name())
        .collect();
    crates.sort();
    crates
        .iter()
        .flat_map(|name| rust_files(&format!("crates/{}/src", name.to_string_lossy())))
        .collect()
}

/// The lines before the tests, comments cut off.
fn code_lines(text: &str) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().collect();
    lines[..lines_before_tests(text)]
        .iter()
        .map(|line| line.split("//").next().unwrap_or(""))
        .collect()
}

fn lines_before_tests(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let is_test_module = |pair: &[&str]| {
        pair[0].trim() == "#[cfg(test)]" && pair[1].trim_start().starts_with("mod ")
    };
    lines
        .windows(2)
        .position(is_test_module)
        .unwrap_or(lines.len())
}

/// The paths that the map names: what stands in backquotes and ends in `/` or in a file's extension,
/// below the directory of the last heading of the form ``### `directory/` ``; in other sections from
/// the root, or below the sources of any crate.
fn mapped_paths() -> BTreeSet<String> {
    let map = read(&root().join("ARCHITECTURE.md"));
    let anywhere = [
        "",
        LIBRARY,
        "crates/lnv-kernels/src/",
        "crates/lnv-cli/src/",
    ];
    let mut base = String::new();
    let mut paths = BTreeSet::new();
    for line in map.lines() {
        if line.starts_with('#') {
            let heading = line.strip_prefix("### `").unwrap_or("");
            base = heading.trim_end_matches('`').to_owned();
            continue;
        }
        let quoted = line.split('`').skip(1).step_by(2);
        for path in quoted.filter(|text| looks_like_path(text)) {
            let bases = match base.as_str() {
                "" => anywhere.to_vec(),
                base => vec![base, ""],
            };
            let found = bases.iter().find(|b| root().join(b).join(path).exists());
            paths.insert(format!("{}{path}", found.unwrap_or(&bases[0])));
        }
    }
    paths
}

fn looks_like_path(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let ends = ["/", ".rs", ".toml", ".md", ".sh", ".py"];
    text.chars().all(plain) && ends.iter().any(|end| text.ends_with(end)) && text.len() > 3
}

/// Panics with all complaints at once.
fn check(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn every_path_on_the_map_exists() {
    let missing = mapped_paths()
        .into_iter()
        .filter(|path| !root().join(path).exists())
        .map(|path| format!("ARCHITECTURE.md names {path}, which does not exist"))
        .collect();
    check(missing);
}

#[test]
fn every_module_is_on_the_map_and_says_what_it_is() {
    let mapped = mapped_paths();
    let mut complaints = Vec::new();
    for file in source_files() {
        if !mapped.contains(&file) {
            complaints.push(format!("{file} is not named in ARCHITECTURE.md"));
        }
        if !read(&root().join(&file)).starts_with("//!") {
            complaints.push(format!("{file} does not begin with `//!`: what is it for?"));
        }
    }
    check(complaints);
}

#[test]
fn a_module_uses_only_modules_before_it() {
    let mut complaints = Vec::new();
    for file in rust_files(LIBRARY) {
        let name = file.strip_prefix(LIBRARY).expect("below the library");
        let module = name.split(['/', '.']).next().unwrap_or("");
        if module == "lib" {
            continue;
        }
        let Some(layer) = LAYERS.iter().position(|l| *l == module) else {
            complaints.push(format!(
                "{file}: the module {module} has no place in LAYERS"
            ));
            continue;
        };
        let code = code_lines(&read(&root().join(&file))).join("\n");
        for used in modules_used(&code) {
            if LAYERS[layer + 1..].contains(&used.as_str()) {
                complaints.push(format!("{file} uses {used}, which comes after {module}"));
            }
        }
    }
    check(complaints);
}

/// The first names of all `crate::…` paths, also of `crate::{a, b::c}`.
fn modules_used(code: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    let name = |text: &str| -> String {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        text[..end.unwrap_or(text.len())].to_owned()
    };
    for rest in code.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            used.insert(name(rest));
            continue;
        };
        let (mut depth, mut start) = (0, 0);
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    used.insert(name(group[start..at].trim_start()));
                    start = at + 1;
                    if c == '}' {
                        break;
                    }
                }
                _ => {}
            }
        }
    }
    used
}

#[test]
fn groups_of_modules_are_taken_apart() {
    let code = "use crate::{error::{Error, Result}, media};\nuse crate::model::Batch;";
    let used: Vec<String> = modules_used(code).into_iter().collect();
    assert_eq!(used, ["error", "media", "model"]);
}

#[test]
fn unsafe_stands_where_the_map_says() {
    let mut complaints = Vec::new();
    for file in source_files() {
        if file.starts_with("crates/lnv-kernels/") {
            continue;
        }
        let text = read(&root().join(&file));
        let word = |line: &&str| {
            line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .any(|word| word == "unsafe")
        };
        let found = text
            .lines()
            .map(|line| line.split("//").next().unwrap_or(""))
            .filter(|line| word(line))
            .count();
        match UNSAFE.iter().find(|(allowed, ..)| *allowed == file) {
            None if found > 0 => complaints.push(format!("{file} has {found} lines with `unsafe`")),
            Some((_, most, record)) if found > 0 => {
                if found > *most {
                    complaints.push(format!(
                        "{file} has {found} lines with `unsafe`, not {most}"
                    ));
                }
                let name = file.rsplit('/').next().unwrap_or(&file);
                if !read(&root().join(record)).contains(name) {
                    complaints.push(format!("{record} does not say why {file} has `unsafe`"));
                }
            }
            _ => {}
        }
    }
    check(complaints);
}

#[test]
fn no_file_is_too_long() {
    let mut complaints = Vec::new();
    for file in source_files() {
        let lines = lines_before_tests(&read(&root().join(&file)));
        if lines > MAX_LINES {
            complaints.push(format!("{file} has {lines} lines before its tests"));
        }
    }
    for entry in fs::read_dir(root().join("docs/decisions")).expect("docs/decisions") {
        let path = entry.expect("a readable entry").path();
        let lines = read(&path).lines().count();
        if lines > MAX_DECISION_LINES {
            complaints.push(format!("{} has {lines} lines", path.display()));
        }
    }
    check(complaints);
}

#[test]
fn what_is_said_to_be_absent_is_absent() {
    let mut complaints = Vec::new();
    for (member, words, why) in ABSENT {
        let mut files = rust_files(&format!("{member}/src"));
        files.push(format!("{member}/Cargo.toml"));
        for file in files {
            let code = code_lines(&read(&root().join(&file))).join("\n");
            for word in words.iter().filter(|word| code.contains(**word)) {
                complaints.push(format!("{file} mentions {word}: {why}"));
            }
        }
    }
    check(complaints);
}
