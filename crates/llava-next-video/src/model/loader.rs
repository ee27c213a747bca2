//! Weights on their way from a checkpoint into a model: what every `load` is given.
//!
//! Decision: the `load` functions are the only list of a model's weights. The same functions load it,
//! plan it (names, formats and bytes, with nothing read) and write it (each weight packed, written and
//! let go), depending on what the [`Loader`] was made for; so the three cannot disagree.
//!
//! Loading streams: a tensor's pages are asked for while earlier ones are packed, read once, and given
//! back. A quantised load peaks near its own size, whatever the size of the checkpoint. Where checkpoint
//! and model do not fit into memory together, the system's cache is told to forget what was read: it
//! could not keep it for the next start, and would have to be searched for room at every step.
//!
//! What a tensor's own treatment asks for (bitsandbytes' quantisation, or its undoing) is done to that
//! tensor alone, right before its matrix is packed.
//!
//! Matrices that read the same input are packed as one. Such a weight is called after its parts:
//! `language_model.layers.0.self_attn.q_proj+k_proj+v_proj.weight`.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lnv_kernels::{Ops, Vector, Weight, WeightData, WeightDtype, WeightPart};
use rayon::prelude::*;

use super::balance::{Balance, Named, Scales, TABLE_SCALES};
use super::bitsandbytes::{self, Quantised};
use super::formats::{Formats, Treatment, empty_weight, is_float};
use super::weights::{Checkpoint, widen};
use crate::config::{BitsAndBytesKind, Dtype, TextConfig};
use crate::error::{Error, Result};

/// Bytes of tensors that are asked for before they are needed.
const READ_AHEAD: usize = 256 << 20;

/// What every `load` is given.
#[derive(Clone, Copy)]
pub struct Loader<'a> {
    formats: &'a Formats,
    work: Work<'a>,
}

#[derive(Clone, Copy)]
enum Work<'a> {
    /// Weights are noted; the model that comes out is empty.
    Plan(&'a RefCell<Vec<PlannedWeight>>),
    /// Weights are kept.
    Load(&'a Loading<'a>),
    /// Weights go to the sink, in the plan's order; the model that comes out is empty.
    Write(&'a Loading<'a>, Sink<'a>),
}

/// Takes a weight's name and bytes.
pub type Sink<'a> = &'a dyn Fn(&str, &[u8]) -> Result<()>;

/// A weight that loading would make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedWeight {
    /// What it is called: the canonical name of its tensor, or of all its tensors together.
    pub name: String,
    /// Dimensions: `[n, k]` of a matrix.
    pub shape: Vec<usize>,
    /// The format of a matrix; `None` for what is kept as single values.
    pub format: Option<WeightDtype>,
    /// Bytes when written: packed, or in the model's type.
    pub bytes: usize,
    /// The tensors that it is made of, by canonical name.
    pub tensors: Vec<String>,
}

/// What loading and writing share.
pub(super) struct Loading<'a> {
    pub(super) ops: &'a Ops,
    pub(super) checkpoint: &'a Checkpoint,
    /// The checkpoint holds packed weights.
    pub(super) packed: bool,
    /// All weights, in the order of loading.
    pub(super) plan: Vec<PlannedWeight>,
    /// Memory does not hold the checkpoint's files beside the model.
    tight: bool,
    /// How many were loaded, and how many were asked for.
    progress: Cell<(usize, usize)>,
    /// Called with the bytes of the checkpoint that were read.
    on_bytes: &'a dyn Fn(usize),
    /// What tensors are multiplied by before they are rounded, by canonical name.
    scales: RefCell<HashMap<String, Scales>>,
    /// Tensors are looked at beside the real loading: nothing is counted, asked for or given back.
    apart: bool,
    /// Weights that nobody needs any more: their memory is used again.
    spare: RefCell<Vec<Weight>>,
    /// Quantised weights of a synthetic checkpoint, by the rows of their parts.
    twins: RefCell<HashMap<Twin, Weight>>,
}

/// Random weights of these rows, columns and format are alike.
type Twin = (Vec<usize>, usize, WeightDtype);

impl<'a> Loading<'a> {
    pub(super) fn new(
        ops: &'a Ops,
        checkpoint: &'a Checkpoint,
        (plan, packed): (Vec<PlannedWeight>, bool),
        on_bytes: &'a dyn Fn(usize),
    ) -> Self {
        let stored = |name: &String| checkpoint.stored_bytes(name);
        let both = |weight: &PlannedWeight| -> usize {
            weight.bytes + weight.tensors.iter().map(stored).sum::<usize>()
        };
        let needed = plan.iter().map(both).sum();
        Self {
            ops,
            checkpoint,
            packed,
            tight: available_memory().is_some_and(|available| available < needed),
            plan,
            progress: Cell::default(),
            on_bytes,
            scales: RefCell::default(),
            apart: false,
            spare: RefCell::default(),
            twins: RefCell::default(),
        }
    }

    /// For a look at tensors right before they are loaded, in the memory of weights that are not needed any
    /// more.
    pub(super) fn apart(ops: &'a Ops, checkpoint: &'a Checkpoint, spare: Vec<Weight>) -> Self {
        Self {
            apart: true,
            spare: RefCell::new(spare),
            ..Self::new(ops, checkpoint, (Vec::new(), false), &|_| ())
        }
    }

    fn take_spare(&self, n: usize, k: usize, format: WeightDtype) -> Option<Weight> {
        let mut spare = self.spare.borrow_mut();
        let fits = |weight: &Weight| (weight.n(), weight.k(), weight.dtype()) == (n, k, format);
        let place = spare.iter().position(fits)?;
        Some(spare.swap_remove(place))
    }

    #[cfg(test)]
    pub(super) fn has_scales(&self) -> bool {
        !self.scales.borrow().is_empty()
    }

    /// Asks for the next weights' pages.
    fn begin(&self) {
        if self.apart {
            return;
        }
        let (loaded, mut asked) = self.progress.get();
        let bytes = |weight: &PlannedWeight| -> usize {
            let stored = |name: &String| self.checkpoint.stored_bytes(name);
            weight.tensors.iter().map(stored).sum()
        };
        let behind = asked.max(loaded);
        let mut ahead: usize = self.plan[loaded..behind].iter().map(bytes).sum();
        while ahead < READ_AHEAD && asked < self.plan.len() && !self.packed {
            ahead += bytes(&self.plan[asked]);
            for name in &self.plan[asked].tensors {
                self.checkpoint.will_need(name);
            }
            asked += 1;
        }
        self.progress.set((loaded + 1, asked));
    }

    /// Gives the pages of tensors back that were read.
    fn end<'n>(&self, tensors: impl Iterator<Item = &'n str>) {
        for name in tensors {
            (self.on_bytes)(self.checkpoint.stored_bytes(name));
            match (self.packed || self.apart, self.tight) {
                (true, _) => {}
                (false, false) => self.checkpoint.release(name),
                (false, true) => self.checkpoint.forget(name),
            }
        }
    }

    /// The matrix, packed.
    fn matrix(
        &self,
        matrix: &Matrix<'_>,
        (formats, format): (&Formats, WeightDtype),
    ) -> Result<Weight> {
        self.begin();
        let weight = if self.packed {
            let (n, k) = (matrix.n(), matrix.k);
            let weight = self.checkpoint.packed(&matrix.name(), (n, k), format)?;
            let placed = self.ops.place(weight);
            placed.map_err(|e| Error::Device(e.to_string()))?
        } else {
            self.pack(matrix, (formats, format))?
        };
        match self.packed {
            true => self.end(std::iter::once(matrix.name().as_str())),
            false => self.end(matrix.parts.iter().map(|part| part.name.as_str())),
        }
        Ok(weight)
    }

    fn pack(
        &self,
        matrix: &Matrix<'_>,
        (formats, format): (&Formats, WeightDtype),
    ) -> Result<Weight> {
        let rows: Vec<usize> = matrix.parts.iter().map(|part| part.n).collect();
        let twin = (rows, matrix.k, format);
        // On a GPU floats too: making them up would take longer than all the rest.
        let copied = self.checkpoint.is_synthetic() && (!is_float(format) || self.ops.is_cuda());
        if copied && let Some(weight) = self.twins.borrow().get(&twin) {
            let weight = self.ops.duplicate(weight);
            return weight.map_err(|e| Error::Checkpoint(e.to_string()));
        }
        let mut sources = Vec::with_capacity(matrix.parts.len());
        for part in &matrix.parts {
            sources.push(self.source(part, (formats, format))?);
        }
        if let Some(arrange) = matrix.arrange {
            let values = arrange(&widen(sources[0].data()));
            sources[0] = Source::Floats(Dtype::F32, narrow(&values, Dtype::F32));
        }
        let scales = self.scales.borrow();
        let mut parts = Vec::with_capacity(sources.len());
        for (source, part) in sources.iter().zip(&matrix.parts) {
            let scales = scales.get(&part.name).map(Scales::of_part);
            parts.push(WeightPart {
                scales: scales.unwrap_or_default(),
                ..WeightPart::new(source.data(), part.n)
            });
        }
        let weight = match self.take_spare(matrix.n(), matrix.k, format) {
            Some(spare) => self.ops.pack_over(spare, &parts, matrix.k),
            None => self.ops.pack(&parts, matrix.k, format),
        };
        let weight = weight.map_err(|e| Error::Checkpoint(e.to_string()))?;
        if copied {
            self.twins.borrow_mut().insert(twin, weight.clone());
        }
        Ok(weight)
    }

    /// A part as it goes into a matrix of this format.
    fn source(
        &self,
        part: &MatrixPart,
        (formats, format): (&Formats, WeightDtype),
    ) -> Result<Source<'_>> {
        let (name, shape) = (&part.name, &part.shape);
        let dense = is_float(format);
        match formats.treatment(name) {
            Treatment::Plain => Ok(Source::Stored(self.checkpoint.tensor(name, shape)?)),
            Treatment::Quantised => match bitsandbytes::read(self.checkpoint, name, shape)? {
                Some(quantised) => Ok(Source::quantised(quantised, dense)),
                None => Ok(Source::Stored(self.checkpoint.tensor(name, shape)?)),
            },
            Treatment::Quantise(config, kind) => {
                let data = self.checkpoint.tensor(name, shape)?;
                let nested = config.bnb_4bit_use_double_quant;
                let in_packing = !dense && (!nested || kind == BitsAndBytesKind::Int8);
                if in_packing && kind != BitsAndBytesKind::Int8 && type_of(&data) == formats.dtype {
                    return Ok(Source::Stored(data));
                }
                // The type of the model comes first, and its rounding.
                if in_packing {
                    let dtype = match kind {
                        BitsAndBytesKind::Int8 => Dtype::F16,
                        BitsAndBytesKind::FourBit(_) => formats.dtype,
                    };
                    let bytes = converted(data, formats.dtype, dtype);
                    return Ok(Source::Floats(dtype, bytes));
                }
                let mut values = widen(data);
                round(&mut values, formats.dtype);
                let shape = [part.n, values.len() / part.n.max(1)];
                let how = (kind, nested, formats.dtype);
                let quantised = bitsandbytes::quantise(&values, shape, how);
                Ok(Source::quantised(quantised, dense))
            }
        }
    }

    /// The values of a tensor, rounded to the model's type.
    fn values(&self, name: &str, shape: &[usize], dtype: Dtype) -> Result<Vec<f32>> {
        self.begin();
        let scales = self.scales.borrow();
        let scales = scales.get(name).and_then(|scales| scales.rows.as_ref());
        let mut values = match scales {
            // Scales that are a tensor of their own.
            Some(_) if !self.checkpoint.contains(name) => vec![1.0; shape.iter().product()],
            _ => self.checkpoint.values(name, shape)?,
        };
        round(&mut values, dtype);
        if let Some(scales) = scales {
            values.iter_mut().zip(scales).for_each(|(v, s)| *v *= s);
        }
        self.end(std::iter::once(name));
        Ok(values)
    }
}

/// A tensor on its way into a matrix.
enum Source<'a> {
    /// As it lies in the file.
    Stored(WeightData<'a>),
    /// Little-endian values.
    Floats(Dtype, Vec<u8>),
    /// bitsandbytes' codes.
    Codes(Quantised<'a>),
}

impl<'a> Source<'a> {
    /// Codes as they are, or the values that they stand for.
    fn quantised(quantised: Quantised<'a>, dense: bool) -> Self {
        match dense {
            false => Self::Codes(quantised),
            true => Self::Floats(Dtype::F32, narrow(&quantised.wide(), Dtype::F32)),
        }
    }

    fn data(&self) -> WeightData<'_> {
        match self {
            Self::Stored(data) => *data,
            Self::Floats(Dtype::F32, bytes) => WeightData::F32(bytes),
            Self::Floats(Dtype::Bf16, bytes) => WeightData::Bf16(bytes),
            Self::Floats(Dtype::F16, bytes) => WeightData::F16(bytes),
            Self::Codes(Quantised::FourBit(w)) => WeightData::Bnb4 {
                codes: &w.codes,
                absmax: &w.absmax,
            },
            Self::Codes(Quantised::Int8(w)) => WeightData::Int8 {
                codes: &w.codes,
                scb: &w.scb,
            },
        }
    }
}

/// The type of stored floats.
fn type_of(data: &WeightData<'_>) -> Dtype {
    match data {
        WeightData::Bf16(_) => Dtype::Bf16,
        WeightData::F16(_) => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// A matrix of a model, made of one tensor or of several one under the other.
struct Matrix<'s> {
    parts: Vec<MatrixPart>,
    k: usize,
    /// Brings the values of the only part into the order of the matrix.
    arrange: Option<Arrange<'s>>,
}

/// From a tensor's values to those of a matrix.
type Arrange<'s> = &'s dyn Fn(&[f32]) -> Vec<f32>;

struct MatrixPart {
    name: String,
    shape: Vec<usize>,
    n: usize,
}

impl Matrix<'_> {
    fn n(&self) -> usize {
        self.parts.iter().map(|part| part.n).sum()
    }

    /// `a.b.q_proj.weight`, `a.b.k_proj.weight` to `a.b.q_proj+k_proj.weight`.
    fn name(&self) -> String {
        const SUFFIX: &str = ".weight";
        let stems = self.parts.iter().map(|part| {
            let stem = part.name.strip_suffix(SUFFIX);
            stem.unwrap_or(&part.name)
        });
        let mut name = String::new();
        for stem in stems {
            match name.is_empty() {
                true => name += stem,
                false => {
                    name += "+";
                    name += stem.rsplit('.').next().unwrap_or(stem);
                }
            }
        }
        name + SUFFIX
    }
}

impl<'a> Loader<'a> {
    /// A loader that notes what would be loaded.
    pub(super) fn plan(formats: &'a Formats, weights: &'a RefCell<Vec<PlannedWeight>>) -> Self {
        let work = Work::Plan(weights);
        Self { formats, work }
    }

    /// A loader that loads; with a sink, one that writes.
    pub(super) fn new(
        formats: &'a Formats,
        loading: &'a Loading<'a>,
        sink: Option<Sink<'a>>,
    ) -> Self {
        let work = match sink {
            None => Work::Load(loading),
            Some(sink) => Work::Write(loading, sink),
        };
        Self { formats, work }
    }

    /// The type of what is not quantised.
    pub fn dtype(&self) -> Dtype {
        self.formats.dtype
    }

    /// The formats of the weights.
    pub fn formats(&self) -> &Formats {
        self.formats
    }

    /// The matrices `names`, each `(name, rows)` with `k` columns, packed one under the other.
    pub fn matrix(&self, names: &[(String, usize)], k: usize) -> Result<Weight> {
        let part = |(name, n): &(String, usize)| MatrixPart {
            name: name.clone(),
            shape: vec![*n, k],
            n: *n,
        };
        self.load(&Matrix {
            parts: names.iter().map(part).collect(),
            k,
            arrange: None,
        })
    }

    /// The tensor `name` of `shape` as a matrix of `shape[0]` rows: as its values lie, or as `arrange`
    /// brings them into order.
    pub fn reshaped(
        &self,
        name: &str,
        shape: &[usize],
        arrange: Option<Arrange<'_>>,
    ) -> Result<Weight> {
        let part = MatrixPart {
            name: name.to_owned(),
            shape: shape.to_vec(),
            n: shape[0],
        };
        self.load(&Matrix {
            parts: vec![part],
            k: shape[1..].iter().product(),
            arrange,
        })
    }

    /// What finds out how the decoder's channels are to be scaled, where they are.
    pub(super) fn balance<'b>(&self, config: &'b TextConfig) -> Result<Option<Balance<'b>>>
    where
        'a: 'b,
    {
        match self.work {
            Work::Load(loading) | Work::Write(loading, _) if self.formats.balanced => {
                Balance::begin(loading.checkpoint, config).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Has these tensors scaled when they are loaded.
    pub(super) fn scale(&self, named: Named) {
        if let Work::Load(loading) | Work::Write(loading, _) = self.work {
            loading.scales.borrow_mut().extend(named);
        }
    }

    /// What embedded rows of `d` values are multiplied by, where a scaled table is the head as well.
    pub(super) fn table_scales(&self, d: usize) -> Result<Option<Vector>> {
        let scales = || self.vector(TABLE_SCALES, d);
        let scaled = self.formats.head_scaled && self.formats.tied;
        scaled.then(scales).transpose()
    }

    fn load(&self, matrix: &Matrix<'_>) -> Result<Weight> {
        let (name, k) = (matrix.name(), matrix.k);
        let names: Vec<&str> = matrix.parts.iter().map(|p| p.name.as_str()).collect();
        let format = self.formats.of(&names, k);
        let empty = || {
            let none = || Error::Checkpoint(format!("{name} has rows of {k} values: too many"));
            empty_weight(k, format).ok_or_else(none)
        };
        match self.work {
            Work::Load(loading) => loading.matrix(matrix, (self.formats, format)),
            Work::Write(loading, sink) => {
                let weight = loading.matrix(matrix, (self.formats, format))?;
                sink(&name, weight.packed_bytes())?;
                empty()
            }
            Work::Plan(weights) => {
                let weight = empty()?;
                weights.borrow_mut().push(PlannedWeight {
                    shape: vec![matrix.n(), k],
                    format: Some(format),
                    bytes: lnv_kernels::packed_len(matrix.n(), k, format),
                    tensors: matrix.parts.iter().map(|part| part.name.clone()).collect(),
                    name,
                });
                Ok(weight)
            }
        }
    }

    /// A vector of `n` values, rounded to the model's type as the reference keeps it.
    pub fn vector(&self, name: &str, n: usize) -> Result<Vector> {
        Ok(Vector::new(self.rounded(name, &[n])?))
    }

    /// The values of any tensor, rounded to the model's type.
    pub fn rounded(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let dtype = self.formats.dtype;
        match self.work {
            Work::Load(loading) => loading.values(name, shape, dtype),
            Work::Write(loading, sink) => {
                let values = loading.values(name, shape, dtype)?;
                sink(name, &narrow(&values, dtype))?;
                Ok(Vec::new())
            }
            Work::Plan(weights) => {
                weights.borrow_mut().push(PlannedWeight {
                    name: name.to_owned(),
                    shape: shape.to_vec(),
                    format: None,
                    bytes: dtype.size() * shape.iter().product::<usize>(),
                    // The scales are made, not read.
                    tensors: match name {
                        TABLE_SCALES => Vec::new(),
                        _ => vec![name.to_owned()],
                    },
                });
                Ok(Vec::new())
            }
        }
    }
}

/// Bytes of memory that can be had without pushing programs out, caches of files counted as free;
/// `None` where the system does not tell.
fn available_memory() -> Option<usize> {
    let told = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = told
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Values at a time: what stays in the nearest cache.
const CHUNK: usize = 2048;

/// Rounds values to a type.
pub(super) fn round(values: &mut [f32], dtype: Dtype) {
    values
        .par_chunks_mut(CHUNK)
        .for_each(|values| round_chunk(values, dtype));
}

fn round_chunk(values: &mut [f32], dtype: Dtype) {
    match dtype {
        Dtype::F32 => {}
        Dtype::Bf16 => values
            .iter_mut()
            .for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        Dtype::F16 => {
            let mut narrow = [f16::ZERO; CHUNK];
            let narrow = &mut narrow[..values.len()];
            narrow.convert_from_f32_slice(values);
            narrow.convert_to_f32_slice(values);
        }
    }
}

/// Values as little-endian bytes of a type.
pub(super) fn narrow(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    bytes
        .par_chunks_mut(CHUNK * dtype.size())
        .zip(values.par_chunks(CHUNK))
        .for_each(|(bytes, values)| narrow_chunk(values, dtype, bytes));
    bytes
}

fn narrow_chunk(values: &[f32], dtype: Dtype, bytes: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            let places = bytes.as_chunks_mut::<4>().0.iter_mut();
            places.zip(values).for_each(|(b, v)| *b = v.to_le_bytes());
        }
        Dtype::Bf16 => {
            let places = bytes.as_chunks_mut::<2>().0.iter_mut();
            let narrow = |v: &f32| bf16::from_f32(*v).to_le_bytes();
            places.zip(values).for_each(|(b, v)| *b = narrow(v));
        }
        Dtype::F16 => {
            let mut narrow = [f16::ZERO; CHUNK];
            narrow[..values.len()].convert_from_f32_slice(values);
            let places = bytes.as_chunks_mut::<2>().0.iter_mut();
            places.zip(narrow).for_each(|(b, v)| *b = v.to_le_bytes());
        }
    }
}

/// Stored floats rounded to one type and kept in another that holds it.
pub(super) fn converted(data: WeightData<'_>, rounded: Dtype, kept: Dtype) -> Vec<u8> {
    let (size, bytes) = match data {
        WeightData::F32(bytes) => (4, bytes),
        WeightData::Bf16(bytes) | WeightData::F16(bytes) => (2, bytes),
        _ => return Vec::new(),
    };
    let mut out = vec![0; bytes.len() / size * kept.size()];
    out.par_chunks_mut(CHUNK * kept.size())
        .zip(bytes.par_chunks(CHUNK * size))
        .for_each(|(out, bytes)| {
            let mut values = widen(match data {
                WeightData::F32(_) => WeightData::F32(bytes),
                WeightData::Bf16(_) => WeightData::Bf16(bytes),
                _ => WeightData::F16(bytes),
            });
            round_chunk(&mut values, rounded);
            narrow_chunk(&values, kept, out);
        });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_in_chunks_are_those_of_single_values() {
        let values: Vec<f32> = (0..2 * CHUNK + 77)
            .map(|i| ((i * 7919 % 10_007) as f32 - 5000.0) * 1.7e-3)
            .collect();
        let bytes = narrow(&values, Dtype::F32);
        assert_eq!(widen(WeightData::F32(&bytes)), values);
        let halves = narrow(&values, Dtype::F16);
        let expected: Vec<f32> = values.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        assert_eq!(widen(WeightData::F16(&halves)), expected);
        let brains = narrow(&values, Dtype::Bf16);
        let twice: Vec<f32> = values
            .iter()
            .map(|v| f16::from_f32(bf16::from_f32(*v).to_f32()).to_f32())
            .collect();
        let both = converted(WeightData::F32(&bytes), Dtype::Bf16, Dtype::F16);
        assert_eq!(widen(WeightData::F16(&both)), twice);
        let both = converted(WeightData::Bf16(&brains), Dtype::F16, Dtype::F32);
        assert_eq!(widen(WeightData::F32(&both)), twice);
    }
}
