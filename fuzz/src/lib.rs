//! What the fuzz targets share: a folder for inputs that the library reads from files.

use std::cell::OnceCell;
use std::path::PathBuf;

use tempfile::TempDir;

thread_local! {
    static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
}

/// Writes `bytes` to the file `name` of this thread's folder; gives the folder and the file.
pub fn file(name: &str, bytes: &[u8]) -> (PathBuf, PathBuf) {
    let folder = FOLDER.with(|cell| {
        cell.get_or_init(|| tempfile::tempdir().expect("a temporary folder"))
            .path()
            .to_owned()
    });
    let path = folder.join(name);
    std::fs::write(&path, bytes).expect("a writable temporary folder");
    (folder, path)
}
