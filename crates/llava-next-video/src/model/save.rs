//! A checkpoint written in another form, and for `lnv quantize --to q8|q4` that form: weights as the
//! kernels read them. (`export.rs` has bitsandbytes' form.)
//!
//! Decision: what is written is what loading with the same formats would have in memory, byte for byte,
//! so that opening it is mapping it. A matrix is a tensor of U8, `[panels, bytes of a panel]`; fused
//! projections are one matrix under the joined name of `loader.rs`; all else is in the dense type under
//! its canonical name. `config.json` gains a `quantization_config` with the layout's version. The files
//! are ordinary safetensors whose matrices start at multiples of 64 bytes.
//!
//! Weights are made, written and let go one by one: no more than the largest is in memory.
//!
//! Refused: a checkpoint that is quantised already. Half a directory is the caller's to avoid: write to
//! a temporary one and rename it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lnv_kernels::{Device, Ops, packed_len};
use serde_json::{Map, Value, json};

use super::bitsandbytes::OutputTensor;
use super::export::{self, Exported};
use super::formats::Formats;
use super::llava_next_video::{LlavaNextVideoModel, LoadOptions, write_weights};
use super::loader::PlannedWeight;
use super::weights::Checkpoint;
use crate::config::{
    BitsAndBytesConfig, CheckpointFiles, Dtype, LlavaNextVideoConfig, PACKED_VERSION, PackedFormat,
    PackedQuantization, Quantization,
};
use crate::error::{Error, Result};

/// The largest file, unless one weight alone is larger.
pub const MAX_FILE_BYTES: usize = 5_000_000_000;

/// Matrices start at multiples of this many bytes of a file.
const ALIGNMENT: usize = 64;

/// A checkpoint to be written in another form.
pub struct Repacking<'a> {
    files: &'a CheckpointFiles,
    config: LlavaNextVideoConfig,
    checkpoint: Checkpoint,
    formats: Formats,
    form: Form,
    /// The largest file; [`MAX_FILE_BYTES`] unless a test wants more files.
    pub max_file_bytes: usize,
}

/// What is written.
enum Form {
    /// Weights as the kernels read them.
    Packed(PackedFormat, Vec<PlannedWeight>),
    /// What bitsandbytes makes of every tensor.
    BitsAndBytes(BitsAndBytesConfig, Vec<Exported>),
}

/// Called with `(bytes written, bytes in all)`; a break ends the writing with [`Error::Cancelled`].
pub type OnWritten<'a> = &'a dyn Fn(usize, usize) -> ControlFlow<()>;

impl<'a> Repacking<'a> {
    /// Opens a checkpoint to be written in another format; `dtype` is for what stays dense: unless said
    /// bf16, or f16 for bitsandbytes' formats. Reads headers only.
    ///
    /// # Errors
    /// The checkpoint cannot be read, or is quantised already; a configuration that asks for nothing.
    pub fn open(
        files: &'a CheckpointFiles,
        quantization: Quantization,
        dtype: Option<Dtype>,
    ) -> Result<Self> {
        let config = LlavaNextVideoConfig::read(files)?;
        let packed = config
            .packed
            .map(|packed| Quantization::from(packed.quantization));
        let bitsandbytes = config.quantization_config.clone().map(Quantization::from);
        if let Some(stored) = packed.or(bitsandbytes) {
            return Err(Error::Checkpoint(format!(
                "{} is quantised to {} already: quantise the original checkpoint",
                files.name(),
                stored.name()
            )));
        }
        let checkpoint = Checkpoint::open(files)?;
        let options = LoadOptions {
            dtype,
            quantization: Some(quantization.clone()),
            ..LoadOptions::default()
        };
        let formats = Formats::choose(&config, &checkpoint, &options)?;
        let plan = LlavaNextVideoModel::plan(&config, &formats)?;
        let packed = |quantization, plan| {
            let dense = formats.dtype;
            Form::Packed(
                PackedFormat {
                    quantization,
                    dense,
                },
                plan,
            )
        };
        let form = match quantization {
            Quantization::Q8 => packed(PackedQuantization::Q8, plan),
            Quantization::Q4 => packed(PackedQuantization::Q4, plan),
            Quantization::BitsAndBytes(wanted) => {
                Form::BitsAndBytes(wanted, export::plan(&checkpoint, &formats))
            }
        };
        Ok(Self {
            form,
            max_file_bytes: MAX_FILE_BYTES,
            files,
            config,
            checkpoint,
            formats,
        })
    }

    /// Bytes of the checkpoint's weights that are read.
    pub fn bytes_before(&self) -> usize {
        match &self.form {
            Form::Packed(_, plan) => {
                let names = plan.iter().flat_map(|weight| &weight.tensors);
                names.map(|name| self.checkpoint.stored_bytes(name)).sum()
            }
            Form::BitsAndBytes(..) => self.checkpoint.tensors().iter().map(|t| t.bytes).sum(),
        }
    }

    /// Bytes of the weights that will be written.
    pub fn bytes_after(&self) -> usize {
        let weights = self.outputs();
        weights.iter().flatten().map(|tensor| tensor.bytes).sum()
    }

    /// What will be written, weight by weight.
    fn outputs(&self) -> Vec<Vec<OutputTensor>> {
        match &self.form {
            Form::Packed(format, plan) => {
                let one = |weight| vec![packed_tensor(weight, format.dense)];
                plan.iter().map(one).collect()
            }
            Form::BitsAndBytes(_, list) => list.iter().map(|e| e.tensors.clone()).collect(),
        }
    }

    /// The types that the weights are stored in, most bytes first.
    pub fn stored_dtype(&self) -> Dtype {
        self.checkpoint.stored_dtype()
    }

    /// Writes everything into `directory`, which must be there and empty.
    ///
    /// # Errors
    /// A tensor is missing or does not fit, a file cannot be written (all named), or `on_written` asks
    /// to stop.
    pub fn write(&self, directory: &Path, on_written: OnWritten<'_>) -> Result<()> {
        copy_files(self.files, directory)?;
        self.write_config(directory)?;
        let (metadata, order): (_, fn(&OutputTensor) -> usize) = match &self.form {
            // Matrices first: their sizes are multiples of the alignment, and the format allows no gaps.
            Form::Packed(..) => (
                json!({"format": "lnv", "version": PACKED_VERSION.to_string()}),
                |tensor| usize::from(tensor.dtype != "U8"),
            ),
            // Wide types first, as safetensors itself does it, so that each value is aligned.
            Form::BitsAndBytes(..) => (json!({"format": "pt"}), |tensor| {
                8 - tensor.bytes / tensor.shape.iter().product::<usize>().max(1)
            }),
        };
        let mut layout = Layout::default();
        layout.fill(self.outputs(), (&metadata, order), self.max_file_bytes);
        let mut files = Vec::with_capacity(layout.files.len());
        for file in &layout.files {
            files.push(OutputFile::create(directory, file)?);
        }
        if layout.files.len() > 1 {
            let path = directory.join("model.safetensors.index.json");
            write_json(&path, &layout.index())?;
        }
        let files = RefCell::new(files);
        let (done, total) = (Cell::new(0), self.bytes_after());
        let sink = |name: &str, bytes: &[u8]| -> Result<()> {
            let Some((file, offset)) = layout.places.get(name) else {
                return Err(Error::Checkpoint(format!(
                    "{name} was not planned. This is a bug: please report it"
                )));
            };
            files.borrow_mut()[*file].write(*offset, bytes)?;
            done.set(done.get() + bytes.len());
            match on_written(done.get(), total) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(Error::Cancelled),
            }
        };
        match &self.form {
            Form::Packed(..) => {
                let ops = Ops::new(Device::Cpu).map_err(|e| Error::Device(e.to_string()))?;
                write_weights(&self.config, &self.checkpoint, (&ops, &self.formats), &sink)?;
            }
            Form::BitsAndBytes(_, list) => {
                export::write(list, &self.checkpoint, &self.formats, &sink)?;
            }
        }
        files
            .into_inner()
            .into_iter()
            .try_for_each(OutputFile::finish)
    }

    fn write_config(&self, directory: &Path) -> Result<()> {
        const FILE: &str = "config.json";
        let mut json = self.files.read_json(FILE)?.unwrap_or_default();
        match &self.form {
            Form::Packed(format, _) => json["quantization_config"] = format.to_json(),
            Form::BitsAndBytes(config, _) => export::describe(&mut json, config, &self.formats),
        }
        write_json(&directory.join(FILE), &json)
    }
}

/// Copies what a checkpoint has beside its weights and `config.json`.
fn copy_files(files: &CheckpointFiles, directory: &Path) -> Result<()> {
    for name in files.list()? {
        if name == "config.json" || !is_kept(&name) {
            continue;
        }
        let path = directory.join(&name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|cause| Error::io("create", parent, &cause))?;
        }
        let Some(bytes) = files.read(&name)? else {
            continue;
        };
        std::fs::write(&path, bytes).map_err(|cause| Error::io("write", &path, &cause))?;
    }
    Ok(())
}

/// True for tokenizer, processor, template and generation files, and for what a person should read.
fn is_kept(name: &str) -> bool {
    let kinds = [".json", ".jinja", ".txt", ".model", ".md"];
    let papers = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"];
    let kept = kinds.iter().any(|kind| name.ends_with(kind))
        || papers.iter().any(|paper| name.starts_with(paper));
    // The index of the old weights.
    kept && !name.ends_with(".index.json")
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    let failed = |cause: std::io::Error| Error::io("write", path, &cause);
    let text = serde_json::to_string_pretty(json).map_err(|cause| failed(cause.into()))?;
    std::fs::write(path, text + "\n").map_err(failed)
}

/// A weight in the packed layout.
fn packed_tensor(weight: &PlannedWeight, dense: Dtype) -> OutputTensor {
    let (dtype, shape) = match weight.format {
        Some(format) => {
            let panel = packed_len(1, weight.shape[1], format);
            ("U8", vec![weight.bytes / panel.max(1), panel])
        }
        None => (stored_name(dense), weight.shape.clone()),
    };
    OutputTensor {
        name: weight.name.clone(),
        dtype,
        shape,
        bytes: weight.bytes,
    }
}

/// Which tensor goes where.
#[derive(Default)]
struct Layout {
    files: Vec<PlannedFile>,
    /// File and offset by name.
    places: HashMap<String, (usize, u64)>,
}

struct PlannedFile {
    name: String,
    header: Vec<u8>,
    tensors: Vec<String>,
    bytes: usize,
}

impl Layout {
    /// Puts weights into files; `order` sorts the tensors of a file.
    fn fill(
        &mut self,
        weights: Vec<Vec<OutputTensor>>,
        (metadata, order): (&Value, fn(&OutputTensor) -> usize),
        max_bytes: usize,
    ) {
        let mut groups: Vec<Vec<OutputTensor>> = Vec::new();
        let mut bytes = 0;
        for weight in weights {
            let own: usize = weight.iter().map(|tensor| tensor.bytes).sum();
            match groups.last_mut() {
                Some(group) if bytes + own <= max_bytes => group.extend(weight),
                _ => {
                    groups.push(weight);
                    bytes = 0;
                }
            }
            bytes += own;
        }
        let count = groups.len();
        for (i, mut tensors) in groups.into_iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            tensors.sort_by_key(order);
            self.add(name, &tensors, metadata);
        }
    }

    fn add(&mut self, name: String, tensors: &[OutputTensor], metadata: &Value) {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), metadata.clone());
        let mut end = 0;
        let mut starts = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let start = end;
            end += tensor.bytes;
            let (dtype, shape) = (tensor.dtype, &tensor.shape);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            entries.insert(tensor.name.clone(), entry);
            starts.push(start);
        }
        let mut json = Value::Object(entries).to_string().into_bytes();
        json.resize((8 + json.len()).next_multiple_of(ALIGNMENT) - 8, b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.extend(json);
        for (tensor, start) in tensors.iter().zip(starts) {
            let place = (self.files.len(), (header.len() + start) as u64);
            self.places.insert(tensor.name.clone(), place);
        }
        self.files.push(PlannedFile {
            name,
            bytes: header.len() + end,
            header,
            tensors: tensors.iter().map(|tensor| tensor.name.clone()).collect(),
        });
    }

    fn index(&self) -> Value {
        let total: usize = self
            .files
            .iter()
            .map(|file| file.bytes - file.header.len())
            .sum();
        let mut map = Map::new();
        for file in &self.files {
            for tensor in &file.tensors {
                map.insert(tensor.clone(), json!(file.name));
            }
        }
        json!({"metadata": {"total_size": total}, "weight_map": map})
    }
}

/// The name of a type in a safetensors file.
pub(super) fn stored_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::Bf16 => "BF16",
        Dtype::F16 => "F16",
    }
}

struct OutputFile {
    path: PathBuf,
    file: File,
}

impl OutputFile {
    fn create(directory: &Path, planned: &PlannedFile) -> Result<Self> {
        let path = directory.join(&planned.name);
        let created = File::create_new(&path).and_then(|mut file| {
            file.write_all(&planned.header)?;
            file.set_len(planned.bytes as u64)?;
            Ok(file)
        });
        match created {
            Ok(file) => Ok(Self { path, file }),
            Err(cause) => Err(Error::io("write", &path, &cause)),
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.write_all(bytes))
            .map_err(|cause| Error::io("write", &self.path, &cause))
    }

    fn finish(self) -> Result<()> {
        let synced = self.file.sync_all();
        synced.map_err(|cause| Error::io("write", &self.path, &cause))
    }
}
