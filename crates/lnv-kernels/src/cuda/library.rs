//! Shared libraries of CUDA: where they may be, and their functions as a table.
//!
//! Decision: nothing of CUDA is linked. A library is looked for when the first GPU is asked for, first
//! where `LNV_CUDA_PATH` says, then where the system looks, then where installers leave it: the toolkit's
//! own directory and the wheels of a Python environment. A function that is missing is an error with its name,
//! never a crash.
//!
//! Refused: bindings for all of CUDA. Some forty functions are used, and each is declared once, beside
//! its symbol.

use std::path::{Path, PathBuf};

use libloading::Library;

/// Opens the first of a library's names that is found.
///
/// # Errors
/// None is: what was tried.
pub(crate) fn open(names: &[&str], package: &str) -> Result<Library, String> {
    let given = std::env::var_os("LNV_CUDA_PATH").unwrap_or_default();
    let first = std::env::split_paths(&given).flat_map(|dir| named(&dir, names));
    let plain = names.iter().map(PathBuf::from);
    let last = installed(package)
        .into_iter()
        .flat_map(|dir| named(&dir, names));
    let mut broken = None;
    for path in first.chain(plain).chain(last) {
        match load(&path) {
            Ok(library) => return Ok(library),
            Err(error) if path.exists() => broken = Some(error),
            Err(_) => {}
        }
    }
    Err(match broken {
        None => format!("{} was not found", names[0]),
        Some(error) => format!("{} cannot be opened: {error}", names[0]),
    })
}

fn named(dir: &Path, names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(|name| dir.join(name)).collect()
}

#[allow(unsafe_code)]
fn load(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: a library of CUDA, whose start-up code expects nothing of the program.
    unsafe { Library::new(path) }
}

/// Directories in which installers leave CUDA's libraries, beyond those that the system searches;
/// `package` is the wheel's part of the path.
fn installed(package: &str) -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::from("/usr/lib/wsl/lib")];
    let toolkits = entries(Path::new("/usr/local"), |name| name.starts_with("cuda"));
    dirs.extend(toolkits.into_iter().map(|dir| dir.join("lib64")));
    let mut roots: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from)
        .collect();
    // The environment of the `python3` that would run.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let python = std::env::split_paths(&path).map(|dir| dir.join("python3"));
    if let Some(root) = python
        .filter(|file| file.exists())
        .find_map(|file| Some(file.parent()?.parent()?.to_owned()))
    {
        roots.push(root);
    }
    for root in roots {
        for python in entries(&root.join("lib"), |name| name.starts_with("python")) {
            for site in ["site-packages", "dist-packages"] {
                let nvidia = python.join(site).join("nvidia");
                dirs.push(nvidia.join(package).join("lib"));
                // From CUDA 13 on one directory serves all packages.
                let shared = entries(&nvidia, |name| name.starts_with("cu1"));
                dirs.extend(shared.into_iter().map(|dir| dir.join("lib")));
            }
        }
    }
    dirs
}

/// The entries of a directory whose names fit, the last name first.
fn entries(dir: &Path, fits: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let listed = dir.read_dir().into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = listed
        .filter(|entry| entry.file_name().to_str().is_some_and(&fits))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.reverse();
    found
}

/// Declares a table of a library's functions, all of which return a status as `i32`.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $( $field:ident = $symbol:literal ( $($arg:ty),* $(,)? ); )* }) => {
        $(#[$doc])*
        pub(crate) struct $table {
            $( pub(crate) $field: unsafe extern "C" fn($($arg),*) -> i32, )*
            /// Keeps the functions where they are.
            _library: libloading::Library,
        }

        impl $table {
            #[allow(unsafe_code)]
            pub(crate) fn load(library: libloading::Library) -> Result<$table, String> {
                $(
                    // SAFETY: the type is that of the symbol in the library's documentation.
                    let $field = unsafe {
                        *library
                            .get::<unsafe extern "C" fn($($arg),*) -> i32>(concat!($symbol, "\0").as_bytes())
                            .map_err(|_| format!("it lacks {}", $symbol))?
                    };
                )*
                Ok($table { $($field,)* _library: library })
            }
        }
    };
}
pub(crate) use functions;
