//! The tensors of a checkpoint: safetensors files, mapped into memory, under one set of names.
//!
//! Published files come in four spellings (4.42-4.51, 4.52+, 5.x, and the research code's); a key is
//! brought to one canonical form when the index is read, and the rest of the program knows no other.
//! Nothing is copied here: [`WeightData`] borrows the mapped bytes, and packing reads them once.
//! Weights that are stored packed are used where they lie in the map.
//! Pickled `.bin` weights are refused: reading one means running the program inside it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lnv_kernels::{PackedBytes, Weight, WeightData, WeightDtype, packed_len};
use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::tensor::{Dtype as StoredDtype, Metadata, SafeTensors};

use super::bitsandbytes;
use crate::config::{CheckpointFiles, Dtype, LlavaNextVideoConfig};
use crate::error::{Error, Result};

/// The largest header of a safetensors file; the format's own limit.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// The file of an unsharded checkpoint.
const SINGLE: &str = "model.safetensors";

/// The index of a sharded one.
const INDEX: &str = "model.safetensors.index.json";

/// All tensors of a checkpoint by canonical name.
#[derive(Debug)]
pub struct Checkpoint {
    /// All files of it; none of a synthetic one.
    files: CheckpointFiles,
    shards: Vec<Shard>,
    entries: HashMap<String, Entry>,
    /// Random bf16 values that stand for every tensor of a synthetic checkpoint.
    noise: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Shard {
    name: String,
    bytes: ShardBytes,
}

#[derive(Debug)]
enum ShardBytes {
    /// The map, and the file that it is of.
    Mapped(Arc<Mmap>, std::fs::File),
    Static(&'static [u8]),
}

impl Shard {
    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            ShardBytes::Mapped(map, _) => map,
            ShardBytes::Static(bytes) => bytes,
        }
    }

    fn map(&self) -> Option<Arc<Mmap>> {
        match &self.bytes {
            ShardBytes::Mapped(map, _) => Some(Arc::clone(map)),
            ShardBytes::Static(_) => None,
        }
    }
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    stored_name: String,
    dtype: StoredDtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor as it lies in its file.
pub(super) struct StoredTensor<'a> {
    /// Its name in the file.
    pub(super) name: &'a str,
    /// The file.
    pub(super) file: &'a str,
    pub(super) dtype: StoredDtype,
    pub(super) shape: &'a [usize],
    pub(super) bytes: &'a [u8],
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Canonical name.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Stored type, as the file spells it.
    pub dtype: String,
    /// Bytes in the file.
    pub bytes: usize,
}

impl Checkpoint {
    /// Maps every weight file of a checkpoint and reads the headers.
    ///
    /// # Errors
    /// No safetensors file, one that an index names is missing, or a header that is cut short, is
    /// malformed or points outside its file.
    pub fn open(files: &CheckpointFiles) -> Result<Self> {
        let mut checkpoint = Self {
            files: files.clone(),
            shards: Vec::new(),
            entries: HashMap::new(),
            noise: None,
        };
        match files {
            CheckpointFiles::Embedded(list) => {
                for (name, bytes) in list.iter().filter(|(n, _)| n.ends_with(".safetensors")) {
                    let shard = Shard {
                        name: (*name).into(),
                        bytes: ShardBytes::Static(bytes),
                    };
                    checkpoint.add(shard)?;
                }
            }
            CheckpointFiles::Directory(directory) => {
                for path in weight_files(directory, files)? {
                    checkpoint.add(map_file(&path)?)?;
                }
            }
        }
        if checkpoint.entries.is_empty() {
            return Err(Error::Checkpoint(format!(
                "{} holds no weights",
                files.name()
            )));
        }
        Ok(checkpoint)
    }

    /// A checkpoint of random bf16 weights for measurements. Every tensor is the beginning of one
    /// stretch of noise, so that no more than the largest is ever in memory twice.
    pub fn synthetic(config: &LlavaNextVideoConfig) -> Self {
        let (text, vision) = (&config.text_config, &config.vision_config);
        let largest = [
            text.vocab_size * text.hidden_size,
            text.intermediate_size * text.hidden_size,
            text.qkv_rows() * text.hidden_size,
            vision.intermediate_size * vision.hidden_size,
            vision.tokens() * vision.hidden_size,
            vision.hidden_size * vision.num_channels * vision.patch_size.pow(2),
        ];
        let values = largest.into_iter().max().unwrap_or(0);
        let mut state = 0x2545_f491_u32;
        let mut noise = Vec::with_capacity(2 * values);
        for _ in 0..values {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Uniform within 0.035 of zero: a spread of 0.02, as such models are initialised.
            let value = ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.035;
            noise.extend_from_slice(&half::bf16::from_f32(value).to_le_bytes());
        }
        Self {
            files: CheckpointFiles::Embedded(&[]),
            shards: Vec::new(),
            entries: HashMap::new(),
            noise: Some(noise),
        }
    }

    fn add(&mut self, shard: Shard) -> Result<()> {
        let index = self.shards.len();
        let (header, metadata) = read_header(&shard)?;
        for (stored_name, info) in metadata.tensors() {
            let name = canonical_name(&stored_name);
            let entry = Entry {
                shard: index,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: header + info.data_offsets.0,
                end: header + info.data_offsets.1,
                stored_name,
            };
            if let Some(first) = self.entries.get(&name) {
                return Err(Error::Checkpoint(format!(
                    "{} and {} in {} are two spellings of one tensor ({name}): keep one",
                    first.stored_name, entry.stored_name, shard.name
                )));
            }
            self.entries.insert(name, entry);
        }
        self.shards.push(shard);
        Ok(())
    }

    /// The files that it is of; none of a synthetic one.
    pub(super) fn files(&self) -> &CheckpointFiles {
        &self.files
    }

    /// Every tensor's canonical name, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// True where the checkpoint has a tensor of this canonical name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The tensor `name`, which must have this shape.
    ///
    /// # Errors
    /// It is missing, has another shape (both are named, and the file), or is not made of floats.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<WeightData<'_>> {
        if let Some(noise) = &self.noise {
            return Ok(WeightData::Bf16(
                &noise[..2 * shape.iter().product::<usize>()],
            ));
        }
        let Some(entry) = self.entries.get(name) else {
            return Err(Error::Checkpoint(format!(
                "the checkpoint has no tensor {name} (in {}); config.json asks for one of shape \
                 {shape:?}: is the download complete?",
                self.shard_names()
            )));
        };
        let shard = &self.shards[entry.shard];
        if entry.shape != shape {
            return Err(Error::Checkpoint(format!(
                "tensor {} in {} has shape {:?}, but config.json asks for {shape:?}: the weights \
                 and the configuration are not of one model",
                entry.stored_name, shard.name, entry.shape
            )));
        }
        let bytes = &shard.bytes()[entry.start..entry.end];
        match entry.dtype {
            StoredDtype::F32 => Ok(WeightData::F32(bytes)),
            StoredDtype::BF16 => Ok(WeightData::Bf16(bytes)),
            StoredDtype::F16 => Ok(WeightData::F16(bytes)),
            other => Err(Error::Checkpoint(format!(
                "tensor {} in {} is stored as {other:?}; supported are F32, BF16 and F16",
                entry.stored_name, shard.name
            ))),
        }
    }

    /// The tensor `name` as f32 values; of a matrix that bitsandbytes quantised, those that
    /// Transformers dequantises it to.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; what was quantised is damaged.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match bitsandbytes::read(self, name, shape)? {
            Some(stored) => Ok(stored.values()),
            None => Ok(widen(self.tensor(name, shape)?)),
        }
    }

    /// The tensor `name` as it lies in its file.
    pub(super) fn stored(&self, name: &str) -> Option<StoredTensor<'_>> {
        let entry = self.entries.get(name)?;
        let shard = &self.shards[entry.shard];
        Some(StoredTensor {
            name: &entry.stored_name,
            file: &shard.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &shard.bytes()[entry.start..entry.end],
        })
    }

    /// The type that most bytes of the weights are stored in, those that are not quantised.
    pub fn stored_dtype(&self) -> Dtype {
        if self.is_synthetic() {
            return Dtype::Bf16;
        }
        let mut bytes = [(Dtype::F32, 0), (Dtype::Bf16, 0), (Dtype::F16, 0)];
        for (name, entry) in &self.entries {
            if bitsandbytes::is_quantised_or_beside(self, name) {
                continue;
            }
            let slot = match entry.dtype {
                StoredDtype::F32 => 0,
                StoredDtype::BF16 => 1,
                StoredDtype::F16 => 2,
                _ => continue,
            };
            bytes[slot].1 += entry.end - entry.start;
        }
        bytes
            .into_iter()
            .max_by_key(|(_, n)| *n)
            .map_or(Dtype::F32, |(dtype, _)| dtype)
    }

    /// The packed weight `name`, `[n, k]`: used where it lies.
    ///
    /// # Errors
    /// It is missing, or its bytes are not those of such a weight; named with its file.
    pub fn packed(&self, name: &str, (n, k): (usize, usize), dtype: WeightDtype) -> Result<Weight> {
        let Some(entry) = self.entries.get(name) else {
            return Err(Error::Checkpoint(format!(
                "the checkpoint has no packed tensor {name} (in {}): quantise the original again",
                self.shard_names()
            )));
        };
        let (shard, range) = (&self.shards[entry.shard], entry.start..entry.end);
        let expected = packed_len(n, k, dtype);
        if entry.dtype != StoredDtype::U8 || range.len() != expected {
            return Err(Error::Checkpoint(format!(
                "tensor {} in {} has {} bytes of {:?}, but a packed matrix [{n}, {k}] of {dtype:?} \
                 has {expected} of U8: the file is damaged or not of this model; quantise the \
                 original again",
                entry.stored_name,
                shard.name,
                range.len(),
                entry.dtype
            )));
        }
        let shared = match &shard.bytes {
            ShardBytes::Mapped(map, _) => {
                PackedBytes::shared(Arc::clone(map) as _, range.clone()).ok()
            }
            ShardBytes::Static(_) => None,
        };
        // Other programs need not keep the alignment when they rewrite a file.
        let bytes = shared.unwrap_or_else(|| PackedBytes::copied(&shard.bytes()[range]));
        Weight::from_packed(n, k, dtype, bytes).map_err(|e| Error::Checkpoint(e.to_string()))
    }

    /// Bytes of the tensor `name` in its file, with those of the tensors beside it that a quantised one
    /// needs; 0 where there is none.
    pub fn stored_bytes(&self, name: &str) -> usize {
        let bytes = |name: &str| self.entries.get(name).map_or(0, |e| e.end - e.start);
        let beside = bitsandbytes::beside(name);
        bytes(name) + beside.iter().map(|name| bytes(name)).sum::<usize>()
    }

    /// True for a checkpoint of random weights.
    pub fn is_synthetic(&self) -> bool {
        self.noise.is_some()
    }

    /// Asks the system to read the tensor `name` from disk, without waiting for it.
    pub fn will_need(&self, name: &str) {
        if let Some((map, entry)) = self.mapped(name) {
            // Advice only: what is refused is read when it is needed.
            let _ = map.advise_range(Advice::WillNeed, entry.start, entry.end - entry.start);
        }
    }

    /// Says that the tensor `name` was read and its pages need not stay in this process. They stay in
    /// the system's cache of the file while there is room.
    pub fn release(&self, name: &str) {
        self.release_one(name);
        for name in bitsandbytes::beside(name) {
            self.release_one(&name);
        }
    }

    #[allow(unsafe_code)]
    fn release_one(&self, name: &str) {
        if let Some((map, entry)) = self.mapped(name) {
            let (advice, len) = (UncheckedAdvice::DontNeed, entry.end - entry.start);
            // SAFETY: the map is shared and read-only, so a page that is dropped holds nothing but the
            // file's content, and comes back from the file when somebody reads it again.
            let _ = unsafe { map.unchecked_advise_range(advice, entry.start, len) };
        }
    }

    /// Says that the tensor `name` was read and will not be read again: the system's cache of the file
    /// need not keep it either.
    pub fn forget(&self, name: &str) {
        self.release(name);
        #[cfg(target_os = "linux")]
        if let Some(entry) = self.entries.get(name)
            && let ShardBytes::Mapped(_, file) = &self.shards[entry.shard].bytes
        {
            use rustix::fs::{Advice, fadvise};
            let len = std::num::NonZeroU64::new((entry.end - entry.start) as u64);
            // Advice only.
            let _ = fadvise(file, entry.start as u64, len, Advice::DontNeed);
        }
    }

    /// Reads every file from disk in the background, from the beginning of the first on.
    pub fn read_in_background(&self) {
        let maps: Vec<Arc<Mmap>> = self.shards.iter().filter_map(Shard::map).collect();
        // Without the thread, pages are read when they are needed.
        let _ = std::thread::Builder::new()
            .name("lnv-read".into())
            .spawn(move || {
                maps.iter()
                    .for_each(|map| drop(map.advise(Advice::WillNeed)))
            });
    }

    fn mapped(&self, name: &str) -> Option<(&Mmap, &Entry)> {
        let entry = self.entries.get(name)?;
        match &self.shards[entry.shard].bytes {
            ShardBytes::Mapped(map, _) => Some((map, entry)),
            ShardBytes::Static(_) => None,
        }
    }

    /// Every tensor, sorted by canonical name.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        let info = |(name, entry): (&String, &Entry)| TensorInfo {
            name: name.clone(),
            shape: entry.shape.clone(),
            dtype: format!("{:?}", entry.dtype),
            bytes: entry.end - entry.start,
        };
        let mut list: Vec<_> = self.entries.iter().map(info).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// Number of weight files.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    fn shard_names(&self) -> String {
        match self.shards.as_slice() {
            [one] => one.name.clone(),
            [first, .., last] => format!("{} to {}", first.name, last.name),
            [] => "no file".into(),
        }
    }
}

/// The files that hold the weights of `directory`.
fn weight_files(directory: &Path, files: &CheckpointFiles) -> Result<Vec<PathBuf>> {
    if let Some(index) = files.read_json(INDEX)? {
        return indexed_files(directory, files, &index);
    }
    let single = directory.join(SINGLE);
    if single.is_file() {
        return Ok(vec![single]);
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir(directory)
        .map_err(|cause| Error::io("list", directory, &cause))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    found.sort();
    if found.is_empty() {
        let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
            .iter()
            .any(|name| directory.join(name).exists());
        let what = match pickled {
            true => "has pickled weights (*.bin) only: convert them to safetensors first",
            false => "has no *.safetensors file: is the download complete?",
        };
        return Err(Error::Checkpoint(format!("{} {what}", directory.display())));
    }
    Ok(found)
}

fn indexed_files(
    directory: &Path,
    files: &CheckpointFiles,
    index: &serde_json::Value,
) -> Result<Vec<PathBuf>> {
    let Some(map) = index.get("weight_map").and_then(|m| m.as_object()) else {
        return Err(Error::Checkpoint(format!(
            "{} has no weight_map: download it again",
            files.display(INDEX)
        )));
    };
    let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let mut paths = Vec::new();
    for name in names {
        // A name with a folder in it would reach outside the checkpoint.
        let plain = Path::new(name).file_name().is_some_and(|f| f == name);
        let path = directory.join(name);
        if !plain || !path.is_file() {
            return Err(Error::Checkpoint(format!(
                "{} names the file {name:?}, which is not in {}: is the download complete?",
                files.display(INDEX),
                directory.display()
            )));
        }
        paths.push(path);
    }
    Ok(paths)
}

#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<Shard> {
    let file = std::fs::File::open(path).map_err(|cause| Error::io("open", path, &cause))?;
    let metadata = file
        .metadata()
        .map_err(|cause| Error::io("read", path, &cause))?;
    let (name, length) = (path.display().to_string(), metadata.len());
    if !metadata.is_file() {
        return Err(Error::Checkpoint(format!(
            "{name} is not a regular file: put the checkpoint's weights there"
        )));
    }
    if length == 0 {
        return Err(Error::Checkpoint(format!(
            "{name} is empty: download it again"
        )));
    }
    // SAFETY: the map is read-only and private to this process. Another process that truncates the
    // file while we run can raise SIGBUS, as with every program that maps its weights; the bytes are
    // only ever read as plain numbers, so a change of content cannot break an invariant.
    let map = unsafe { Mmap::map(&file) }.map_err(|cause| Error::io("map", path, &cause))?;
    Ok(Shard {
        name,
        bytes: ShardBytes::Mapped(Arc::new(map), file),
    })
}

/// Parses the header; returns where the data begins.
fn read_header(shard: &Shard) -> Result<(usize, Metadata)> {
    let bytes = shard.bytes();
    let bad = |what: String| Error::Checkpoint(format!("{} {what}: download it again", shard.name));
    let length = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
    let Some(length) = length.and_then(|n| usize::try_from(n).ok()) else {
        return Err(bad(format!("is cut short: it has {} bytes", bytes.len())));
    };
    if length > MAX_HEADER_BYTES {
        return Err(bad(format!(
            "is not a safetensors file: its header would have {length} bytes"
        )));
    }
    if bytes.len() < 8 + length {
        return Err(bad(format!(
            "is cut short: its header alone needs {} bytes, the file has {}",
            8 + length,
            bytes.len()
        )));
    }
    let (_, metadata) = SafeTensors::read_metadata(&bytes[..bytes.len()]).map_err(|cause| {
        let text = cause.to_string();
        match declared_length(&bytes[8..8 + length]) {
            Some(data) if data > bytes.len() - 8 - length => bad(format!(
                "is cut short: its tensors need {data} bytes, {} are there",
                bytes.len() - 8 - length
            )),
            _ => bad(format!("is damaged ({text})")),
        }
    })?;
    let data = metadata
        .tensors()
        .values()
        .map(|t| t.data_offsets.1)
        .max()
        .unwrap_or(0);
    if bytes.len() - 8 - length < data {
        return Err(bad(format!(
            "is cut short: its tensors need {data} bytes, {} are there",
            bytes.len() - 8 - length
        )));
    }
    Ok((8 + length, metadata))
}

/// The end of the last tensor that a header declares.
fn declared_length(header: &[u8]) -> Option<usize> {
    let json: serde_json::Value = serde_json::from_slice(header).ok()?;
    let ends = json
        .as_object()?
        .values()
        .filter_map(|t| t.get("data_offsets")?.get(1)?.as_u64());
    ends.max().and_then(|n| usize::try_from(n).ok())
}

/// The one spelling that the program uses: the 5.x module names without a leading `model.`, that is
/// `vision_tower.encoder...`, `multi_modal_projector.linear_1...`, `language_model.layers...`,
/// `lm_head.weight`, `image_newline`, `vision_resampler.pool...`.
pub fn canonical_name(stored: &str) -> String {
    const COMPONENTS: [&str; 8] = [
        "language_model.",
        "vision_tower.",
        "multi_modal_projector.",
        "image_newline",
        "vision_resampler.",
        "mm_projector.",
        "lm_head.",
        "model.",
    ];
    let mut name = stored;
    while let Some(rest) = name.strip_prefix("model.") {
        if !COMPONENTS
            .iter()
            .any(|component| rest.starts_with(component))
        {
            break;
        }
        name = rest;
    }
    // The research code calls the decoder `model`, its projector `mm_projector`, and may wrap both.
    let research_decoder = ["model.layers.", "model.embed_tokens.", "model.norm."];
    if research_decoder
        .iter()
        .any(|prefix| name.starts_with(prefix))
    {
        return format!("language_model.{}", &name["model.".len()..]);
    }
    if let Some(rest) = name.strip_prefix("language_model.") {
        if rest.starts_with("lm_head.") {
            return rest.into();
        }
        return format!(
            "language_model.{}",
            rest.strip_prefix("model.").unwrap_or(rest)
        );
    }
    if let Some(rest) = name.strip_prefix("vision_tower.") {
        let rest = rest.strip_prefix("vision_tower.").unwrap_or(rest);
        return format!(
            "vision_tower.{}",
            rest.strip_prefix("vision_model.").unwrap_or(rest)
        );
    }
    let projector = name.strip_prefix("vision_resampler.").unwrap_or(name);
    for (research, ours) in [
        ("mm_projector.0.", "linear_1."),
        ("mm_projector.2.", "linear_2."),
    ] {
        if let Some(rest) = projector.strip_prefix(research) {
            return format!("multi_modal_projector.{ours}{rest}");
        }
    }
    name.into()
}

/// The values of floats as f32.
///
/// # Panics
/// The data are not floats: a bug of the caller.
pub fn widen(data: WeightData<'_>) -> Vec<f32> {
    match data {
        WeightData::F32(bytes) => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        WeightData::Bf16(bytes) => {
            let wide = |b: &[u8; 2]| half::bf16::from_le_bytes(*b).to_f32();
            bytes.as_chunks::<2>().0.iter().map(wide).collect()
        }
        WeightData::F16(bytes) => {
            let wide = |b: &[u8; 2]| half::f16::from_le_bytes(*b).to_f32();
            bytes.as_chunks::<2>().0.iter().map(wide).collect()
        }
        WeightData::Bnb4 { .. } | WeightData::Int8 { .. } => panic!("codes are not floats"),
    }
}

#[cfg(test)]
mod tests {
    use super::canonical_name;

    /// Every published spelling comes to one name.
    #[test]
    fn spellings_agree() {
        let rows: &[(&str, &[&str])] = &[
            (
                "vision_tower.encoder.layers.3.mlp.fc1.weight",
                &[
                    "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
                    "model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
                    "model.vision_tower.encoder.layers.3.mlp.fc1.weight",
                    "vision_tower.encoder.layers.3.mlp.fc1.weight",
                    "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
                ],
            ),
            (
                "language_model.layers.0.self_attn.q_proj.weight",
                &[
                    "language_model.model.layers.0.self_attn.q_proj.weight",
                    "model.language_model.layers.0.self_attn.q_proj.weight",
                    "language_model.layers.0.self_attn.q_proj.weight",
                    "model.layers.0.self_attn.q_proj.weight",
                    "model.language_model.model.layers.0.self_attn.q_proj.weight",
                ],
            ),
            (
                "language_model.norm.weight",
                &["model.norm.weight", "language_model.model.norm.weight"],
            ),
            (
                "language_model.embed_tokens.weight",
                &[
                    "model.embed_tokens.weight",
                    "model.language_model.embed_tokens.weight",
                ],
            ),
            (
                "lm_head.weight",
                &["lm_head.weight", "language_model.lm_head.weight"],
            ),
            ("image_newline", &["image_newline", "model.image_newline"]),
            (
                "multi_modal_projector.linear_1.bias",
                &[
                    "multi_modal_projector.linear_1.bias",
                    "model.multi_modal_projector.linear_1.bias",
                    "model.mm_projector.0.bias",
                    "model.vision_resampler.mm_projector.0.bias",
                ],
            ),
            (
                "multi_modal_projector.linear_2.weight",
                &["model.mm_projector.2.weight"],
            ),
            (
                "vision_resampler.pool.weight",
                &[
                    "vision_resampler.pool.weight",
                    "model.vision_resampler.pool.weight",
                ],
            ),
        ];
        for (canonical, spellings) in rows {
            for stored in *spellings {
                assert_eq!(canonical_name(stored), *canonical, "{stored}");
            }
        }
    }
}
