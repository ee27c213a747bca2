//! `lnv quantize`: a checkpoint in another format, as a directory that opens like any other.
//!
//! It is written beside its final place and renamed at the end, so that whatever happens (an error, a
//! full disk, Ctrl-C) there is either all of it or nothing.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use llava_next_video::Error;
use llava_next_video::model::Repacking;
use tempfile::TempDir;

use crate::args::QuantizeArgs;
use crate::progress::{Unit, bar};
use crate::{checkpoint, model, output};

/// Room beside the weights: tokenizer, configuration, headers.
const OTHER_FILES: u64 = 64 << 20;

/// Runs the command.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    let dtype = model::dtype(args.dtype);
    let quantization = model::quantization(args.to, &args.bitsandbytes, dtype)?;
    let name = quantization.name();
    let target = Target::new(&args.output)?;
    let files = checkpoint::open(args.model.as_deref())?;
    let repacking = Repacking::open(&files, quantization, dtype)?;
    let (before, after) = (repacking.bytes_before(), repacking.bytes_after());
    target.check_room(after as u64)?;
    let stop = output::stop_flag()?;
    let temporary = target.temporary()?;
    let progress = bar(after as u64, Unit::Bytes, "quantising");
    let written = repacking.write(temporary.path(), &|done, _| {
        progress.set_position(done as u64);
        match stop.load(std::sync::atomic::Ordering::SeqCst) {
            false => ControlFlow::Continue(()),
            true => ControlFlow::Break(()),
        }
    });
    progress.finish_and_clear();
    match written {
        Err(Error::Cancelled) => bail!("stopped: nothing was written to {}", target.name()),
        Err(error) => bail!("{}", target.said_of(&error, temporary.path())),
        Ok(()) => {}
    }
    target.put(temporary)?;
    output::say(&format!(
        "{} in {} -> {} in {}: {}",
        output::size(before),
        repacking.stored_dtype().name(),
        output::size(after),
        name,
        target.name()
    ));
    Ok(())
}

/// Where the directory is to be.
struct Target {
    path: PathBuf,
    parent: PathBuf,
}

impl Target {
    /// Refuses what is there already, and places that nothing can be put in.
    fn new(path: &Path) -> Result<Self> {
        if std::fs::symlink_metadata(path).is_ok() {
            let directory = std::fs::read_dir(path);
            match directory.map(|mut entries| entries.next().is_some()) {
                Ok(false) => {}
                Ok(true) => bail!("{} is not empty: give a new directory", path.display()),
                Err(_) => bail!("{} is not a directory: give a new one", path.display()),
            }
        }
        // Through a link to the directory itself; and a name that ends in `..` gets its true one.
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            Some(_) => PathBuf::from("."),
            None => bail!("{} cannot be written: give a new directory", path.display()),
        };
        if !parent.is_dir() {
            bail!(
                "cannot write {}: there is no directory {}; create it first",
                path.display(),
                parent.display()
            );
        }
        Ok(Self { path, parent })
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Refuses to begin what the disk cannot hold.
    #[cfg(unix)]
    fn check_room(&self, bytes: u64) -> Result<()> {
        let Ok(disk) = rustix::fs::statvfs(&self.parent) else {
            return Ok(());
        };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free < bytes + OTHER_FILES {
            bail!(
                "{} needs {}, but its disk has {} free: make room or give another place",
                self.name(),
                output::size((bytes + OTHER_FILES) as usize),
                output::size(free as usize)
            );
        }
        Ok(())
    }

    #[cfg(not(unix))]
    fn check_room(&self, _: u64) -> Result<()> {
        Ok(())
    }

    /// A directory beside the target that is removed unless it is put in place.
    fn temporary(&self) -> Result<TempDir> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let prefix = format!(".{name}.");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any new directory; the default is for secrets.
            builder.permissions(std::fs::Permissions::from_mode(0o777));
        }
        let made = builder.tempdir_in(&self.parent);
        made.map_err(|cause| Error::io("write to", &self.parent, &cause).into())
    }

    /// An error's text with the files where they were to be.
    fn said_of(&self, error: &Error, temporary: &Path) -> String {
        let place = temporary.display().to_string();
        error.to_string().replace(&place, &self.name())
    }

    fn put(&self, temporary: TempDir) -> Result<()> {
        std::fs::rename(temporary.path(), &self.path)
            .map_err(|cause| Error::io("write", &self.path, &cause))
            .context("the quantised checkpoint could not be put in place")?;
        // It has moved: there is nothing left to remove.
        let _ = temporary.keep();
        Ok(())
    }
}
