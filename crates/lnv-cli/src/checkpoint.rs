//! `--model`: a directory, a hub id, or nothing for the built-in demo model.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo};
use llava_next_video::config::CheckpointFiles;
use llava_next_video::demo;

use crate::progress::{Unit, bar, note};

/// Downloads that are tried again when a connection breaks; a part that is there is kept.
const RETRIES: usize = 5;

/// Before the first of them; each later one waits twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// The files of the checkpoint that `--model` names.
pub fn open(model: Option<&str>) -> Result<CheckpointFiles> {
    let Some(model) = model else {
        note(
            "this is the built-in demo model: it knows coloured shapes that move, nothing else. For \
             real videos: lnv ask --model llava-hf/LLaVA-NeXT-Video-7B-hf --video clip.mp4 \"...\" \
             (or a directory in Hugging Face layout)",
        );
        return Ok(demo::checkpoint_files());
    };
    if model.trim().is_empty() {
        bail!("--model is empty: give a directory in Hugging Face layout, or a hub id");
    }
    let path = Path::new(model);
    if path.exists() || !looks_like_hub_id(model) {
        return Ok(CheckpointFiles::open(path)?);
    }
    Ok(CheckpointFiles::Directory(from_hub(model)?))
}

/// `owner/name`, with the hub's characters.
fn looks_like_hub_id(text: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(text.split('/').collect::<Vec<_>>()[..], [owner, name] if part(owner) && part(name))
}

/// Downloads what is lacking of a repository; gives the directory of its snapshot.
fn from_hub(id: &str) -> Result<PathBuf> {
    let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    if ["1", "on", "yes", "true"].contains(&offline.to_ascii_lowercase().as_str()) {
        return cached(id, "HF_HUB_OFFLINE is set");
    }
    let api = ApiBuilder::from_env()
        .with_progress(false)
        .build()
        .with_context(|| format!("cannot set up the download of {id}"))?;
    let repo = api.model(id.to_owned());
    let listing = match repo.info() {
        Ok(info) => info,
        Err(cause) => return cached(id, &cause.to_string()),
    };
    let names: Vec<String> = listing.siblings.into_iter().map(|s| s.rfilename).collect();
    let wanted: Vec<&String> = names.iter().filter(|name| is_wanted(name)).collect();
    if !names.iter().any(|name| name == "config.json") {
        bail!("{id} on the hub has no config.json: it is no checkpoint in Hugging Face layout");
    }
    let mut directory = None;
    for name in wanted {
        let path = fetch(&repo, id, name).with_context(|| {
            format!("cannot download {name} of {id}: try again, what is there is kept")
        })?;
        if name == "config.json" {
            directory = path.parent().map(Path::to_owned);
        }
    }
    directory.with_context(|| format!("{id} was downloaded but its directory is not to be found"))
}

fn fetch(repo: &ApiRepo, id: &str, name: &str) -> Result<PathBuf> {
    // A file that is in the cache already is taken as it is; the hub's files do not change in place.
    if let Some(path) = Cache::from_env().repo(Repo::model(id.to_owned())).get(name) {
        return Ok(path);
    }
    // hf-hub's own retries start again at byte 0 behind what is there when a connection breaks before
    // its first byte; a new call looks at the part on disk and goes on behind it.
    let mut wait = FIRST_WAIT;
    for _ in 0..RETRIES {
        match repo.download_with_progress(name, Bar::default()) {
            Ok(path) => return Ok(path),
            Err(cause) => tracing::info!("{name} broke off ({cause}); going on in {wait:?}"),
        }
        std::thread::sleep(wait);
        wait *= 2;
    }
    Ok(repo.download_with_progress(name, Bar::default())?)
}

/// What the model needs; weights in other forms are left where they are.
fn is_wanted(name: &str) -> bool {
    let plain = !name.contains('/') || name.starts_with("additional_chat_templates/");
    let kinds = [".json", ".safetensors", ".jinja"];
    plain && kinds.iter().any(|kind| name.ends_with(kind))
}

/// A snapshot that is already there, when the hub cannot be reached.
fn cached(id: &str, cause: &str) -> Result<PathBuf> {
    let config = Cache::from_env()
        .repo(Repo::model(id.to_owned()))
        .get("config.json");
    if let Some(directory) = config.as_deref().and_then(Path::parent) {
        note(&format!(
            "the hub cannot be reached; using the copy of {id} that is already here"
        ));
        return Ok(directory.to_owned());
    }
    let cause = cause.lines().next().unwrap_or_default();
    bail!(
        "{id} is no directory here, and the hub cannot be asked for it ({cause}): check the name and \
         the network, or give the directory of a downloaded checkpoint with --model DIR"
    )
}

/// One download's bar.
struct Bar(indicatif::ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        Self(indicatif::ProgressBar::hidden())
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.0 = bar(size as u64, Unit::Bytes, filename);
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{is_wanted, looks_like_hub_id};

    #[test]
    fn hub_ids_are_told_from_paths() {
        assert!(looks_like_hub_id("llava-hf/LLaVA-NeXT-Video-7B-hf"));
        for path in [
            "./a/b",
            "/models/x",
            "model",
            "a/b/c",
            "../x",
            "a b/c",
            "a/",
        ] {
            assert!(!looks_like_hub_id(path), "{path}");
        }
    }

    #[test]
    fn only_what_the_model_needs_is_downloaded() {
        for name in [
            "config.json",
            "model-00001-of-00003.safetensors",
            "chat_template.jinja",
        ] {
            assert!(is_wanted(name), "{name}");
        }
        for name in [
            "pytorch_model.bin",
            "README.md",
            "onnx/model.json",
            "tokenizer.model",
        ] {
            assert!(!is_wanted(name), "{name}");
        }
    }
}
