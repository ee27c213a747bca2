//! One matrix as bitsandbytes keeps it: read from a checkpoint's tensors, made out of floats, and put into
//! tensors again.
//!
//! A 4-bit `X.weight` is bytes of codes, in blocks over the flattened matrix; beside it lie the blocks'
//! scales (`X.weight.absmax`), the table of the codes (not read: the type names it) and a small JSON,
//! `X.weight.quant_state.bitsandbytes__nf4`. With double quantisation the scales are bytes as well, and
//! `nested_absmax` and `nested_quant_map` stand for them. An 8-bit `X.weight` has its rows' scales in
//! `X.SCB`.
//!
//! What a file says is checked against what it holds, since every number of it may be wrong: sizes, the
//! block, the shape. Refused by name: other codes, other layouts of 8-bit weights.

use std::borrow::Cow;

use lnv_kernels::bnb::{self, Code4};
use safetensors::tensor::Dtype as StoredDtype;
use serde_json::{Value, json};

use super::weights::{Checkpoint, StoredTensor};
use crate::config::{BitsAndBytesConfig, BitsAndBytesKind, Dtype, QuantStorage, QuantType};
use crate::config::{from_torch_name, torch_name};
use crate::error::{Error, Result};

/// Values of a block, unless a file says otherwise; what the kernels take.
pub(super) const BLOCK: usize = 64;

/// The largest block that bitsandbytes has.
const MAX_BLOCK: usize = 4096;

/// What a 4-bit weight has beside it.
const BESIDE_4BIT: [&str; 6] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];

/// What an 8-bit weight has, in the place of its `weight`.
const BESIDE_8BIT: [&str; 2] = ["SCB", "weight_format"];

/// A matrix as bitsandbytes keeps it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Quantised<'a> {
    FourBit(FourBit<'a>),
    Int8(Int8Rows<'a>),
}

/// 4-bit codes in blocks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FourBit<'a> {
    /// Two in a byte, the first in the high half.
    pub(super) codes: Cow<'a, [u8]>,
    /// The scale of each block, as it is multiplied with: not nested.
    pub(super) absmax: Vec<f32>,
    /// Values of a block.
    pub(super) block: usize,
    /// What the codes stand for.
    pub(super) code: Code4,
    /// The type that was quantised, which values are rounded to again.
    pub(super) dtype: Dtype,
    /// The scales in 8 bits, where they are.
    pub(super) nested: Option<Box<bnb::Nested>>,
    /// Dimensions.
    pub(super) shape: [usize; 2],
}

/// LLM.int8()'s signed bytes, and the scale of each row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Int8Rows<'a> {
    pub(super) codes: Cow<'a, [u8]>,
    pub(super) scb: Vec<f32>,
    pub(super) shape: [usize; 2],
}

impl Quantised<'_> {
    /// The values that they stand for, as Transformers dequantises them: in the type that was quantised.
    pub(super) fn values(&self) -> Vec<f32> {
        let mut values = self.wide();
        if let Self::FourBit(w) = self {
            super::loader::round(&mut values, w.dtype);
        }
        values
    }

    /// The values that products are made of: not rounded.
    pub(super) fn wide(&self) -> Vec<f32> {
        match self {
            Self::FourBit(w) => {
                let n = w.shape[0] * w.shape[1];
                bnb::dequantize_4bit(&w.codes, &w.absmax, w.block, w.code, n)
            }
            Self::Int8(w) => bnb::dequantize_int8(&w.codes, &w.scb, w.shape[1]),
        }
    }
}

/// Quantises the values of a matrix `[n, k]`, which are of the type `dtype`.
pub(super) fn quantise(
    values: &[f32],
    shape: [usize; 2],
    (kind, nested, dtype): (BitsAndBytesKind, bool, Dtype),
) -> Quantised<'static> {
    let BitsAndBytesKind::FourBit(codes) = kind else {
        let (codes, scb) = bnb::quantize_int8(values, shape[1]);
        let codes = Cow::Owned(codes);
        return Quantised::Int8(Int8Rows { codes, scb, shape });
    };
    let code = code(codes);
    let (codes, mut absmax) = bnb::quantize_4bit(values, BLOCK, code);
    let nested = nested.then(|| Box::new(bnb::quantize_absmax(&absmax)));
    if let Some(nested) = &nested {
        absmax = denested(nested, bnb::NESTED_BLOCK);
    }
    Quantised::FourBit(FourBit {
        codes: Cow::Owned(codes),
        absmax,
        block: BLOCK,
        code,
        dtype,
        nested,
        shape,
    })
}

fn denested(nested: &bnb::Nested, block: usize) -> Vec<f32> {
    let (codes, absmax) = (&nested.codes, &nested.absmax);
    bnb::dequantize_absmax(codes, absmax, &nested.map, nested.offset, block)
}

/// The kernels' name of the codes.
pub(super) fn code(codes: QuantType) -> Code4 {
    match codes {
        QuantType::Nf4 => Code4::Nf4,
        QuantType::Fp4 => Code4::Fp4,
    }
}

/// The tensors that may lie beside the quantised `X.weight`.
pub(super) fn beside(name: &str) -> Vec<String> {
    let Some(stem) = name.strip_suffix("weight") else {
        return Vec::new();
    };
    let four = BESIDE_4BIT.iter().map(|suffix| format!("{name}{suffix}"));
    let eight = BESIDE_8BIT.iter().map(|own| format!("{stem}{own}"));
    four.chain(eight).collect()
}

/// How the tensor `name` is quantised in its file, if it is: what of a 4-bit one the kernels cannot take
/// as it is is `false`.
///
/// # Errors
/// What describes it is damaged.
pub(super) fn stored_kind(checkpoint: &Checkpoint, name: &str) -> Result<Option<(Kind, bool)>> {
    if let Some((codes, state)) = quant_state(checkpoint, name)? {
        let whole = state.block == BLOCK && state.shape[1].is_multiple_of(BLOCK);
        return Ok(Some((Kind::FourBit(codes), whole)));
    }
    match checkpoint.stored(name) {
        Some(tensor) if !name.ends_with(".weight") || tensor.shape.len() != 2 => Ok(None),
        Some(tensor) if tensor.dtype == StoredDtype::U8 => Err(stateless(&tensor)),
        Some(tensor) if tensor.dtype == StoredDtype::I8 => Ok(Some((Kind::Int8, true))),
        _ => Ok(None),
    }
}

/// Bytes that nothing describes.
fn stateless(weight: &StoredTensor<'_>) -> Error {
    weight.wrong(&format!(
        "is stored as U8 with no {0}.quant_state.bitsandbytes__nf4 or __fp4 beside it: the checkpoint is \
         not complete",
        weight.name
    ))
}

/// Short for the name of a format.
pub(super) type Kind = BitsAndBytesKind;

/// True for a tensor that is quantised, and for what lies beside one.
pub(super) fn is_quantised_or_beside(checkpoint: &Checkpoint, name: &str) -> bool {
    let of_4bit = BESIDE_4BIT.iter().any(|suffix| {
        let base = name.strip_suffix(suffix);
        base.is_some_and(|base| checkpoint.contains(base))
    });
    let own = |suffix: &str| checkpoint.contains(&format!("{name}{suffix}"));
    let scales = name
        .strip_suffix("SCB")
        .is_some_and(|stem| checkpoint.contains(&format!("{stem}weight")));
    of_4bit || scales || (name.ends_with("weight") && own(BESIDE_4BIT[0]))
}

/// The quantised matrix `name`; `None` where it is not quantised.
///
/// # Errors
/// It is damaged, incomplete or has another shape; what is wrong is named with the file.
pub(super) fn read<'a>(
    checkpoint: &'a Checkpoint,
    name: &str,
    shape: &[usize],
) -> Result<Option<Quantised<'a>>> {
    let Some(weight) = checkpoint.stored(name) else {
        return Ok(None);
    };
    let Some((codes, state)) = quant_state(checkpoint, name)? else {
        return match weight.dtype {
            StoredDtype::I8 => read_int8(checkpoint, name, &weight, shape).map(Some),
            StoredDtype::U8 => Err(stateless(&weight)),
            _ => Ok(None),
        };
    };
    if state.shape != *shape {
        return Err(weight.wrong(&format!(
            "is quantised from the shape {:?}, but config.json asks for {shape:?}: the weights and the \
             configuration are not of one model",
            state.shape
        )));
    }
    let n = state.shape[0].saturating_mul(state.shape[1]);
    let expected = n.div_ceil(2);
    if weight.bytes.len() != expected {
        return Err(weight.wrong(&format!(
            "has {} bytes, but 4-bit codes of the shape {shape:?} are {expected}: the file is damaged; \
             download it again",
            weight.bytes.len()
        )));
    }
    let blocks = n.div_ceil(state.block);
    let (absmax, nested) = read_absmax(checkpoint, name, (&state, blocks))?;
    Ok(Some(Quantised::FourBit(FourBit {
        codes: Cow::Borrowed(weight.bytes),
        absmax,
        block: state.block,
        code: code(codes),
        dtype: state.dtype,
        nested,
        shape: state.shape,
    })))
}

fn read_int8<'a>(
    checkpoint: &'a Checkpoint,
    name: &str,
    weight: &StoredTensor<'a>,
    shape: &[usize],
) -> Result<Quantised<'a>> {
    let (Some(stem), [n, k]) = (name.strip_suffix("weight"), shape) else {
        return Err(weight.wrong("is stored as I8, which only matrices can be"));
    };
    if weight.shape != shape {
        return Err(weight.wrong(&format!(
            "has shape {:?}, but config.json asks for {shape:?}: the weights and the configuration are \
             not of one model",
            weight.shape
        )));
    }
    let format = checkpoint.stored(&format!("{stem}weight_format"));
    if let Some(format) = format.filter(|tensor| tensor.bytes.iter().any(|byte| *byte != 0)) {
        return Err(format.wrong(&format!(
            "is {:?}; this program reads 8-bit weights in rows, which is 0: save them again with a newer \
             bitsandbytes",
            format.bytes
        )));
    }
    let Some(scb) = checkpoint.stored(&format!("{stem}SCB")) else {
        return Err(weight.wrong(&format!(
            "is stored as I8 with no {stem}SCB beside it: the checkpoint is not complete"
        )));
    };
    Ok(Quantised::Int8(Int8Rows {
        codes: Cow::Borrowed(weight.bytes),
        scb: floats(&scb, *n, "rows")?,
        shape: [*n, *k],
    }))
}

/// What the JSON beside a 4-bit weight says.
struct QuantState {
    block: usize,
    dtype: Dtype,
    shape: [usize; 2],
    /// Block and offset of scales in 8 bits.
    nested: Option<(usize, f32)>,
}

/// Finds and reads the JSON beside a weight.
fn quant_state(checkpoint: &Checkpoint, name: &str) -> Result<Option<(QuantType, QuantState)>> {
    for codes in [QuantType::Nf4, QuantType::Fp4] {
        let key = format!("{name}.quant_state.bitsandbytes__{}", codes.name());
        if let Some(tensor) = checkpoint.stored(&key) {
            return Ok(Some((codes, parse_state(&tensor, codes)?)));
        }
    }
    Ok(None)
}

fn parse_state(tensor: &StoredTensor<'_>, codes: QuantType) -> Result<QuantState> {
    let json: Value = serde_json::from_slice(tensor.bytes).map_err(|cause| {
        tensor.wrong(&format!(
            "is damaged, it is not JSON ({cause}): download it again"
        ))
    })?;
    let wrong = |key: &str, expected: &str| {
        let found = json.get(key).unwrap_or(&Value::Null);
        tensor.wrong(&format!(
            "has a {key} of {found}; it must be {expected}: the file is damaged"
        ))
    };
    let size = |key: &str| json.get(key).and_then(crate::config::whole);
    let text = |key: &str| json.get(key).and_then(Value::as_str);
    if text("quant_type") != Some(codes.name()) {
        return Err(wrong("quant_type", &format!("{:?}", codes.name())));
    }
    let block = |key: &str, most: usize| {
        let found = size(key).filter(|n| n.is_power_of_two() && (2..=most).contains(n));
        found.ok_or_else(|| wrong(key, &format!("a power of two up to {most}")))
    };
    let shape = json.get("shape").and_then(Value::as_array);
    let shape = shape.and_then(|list| {
        let sizes: Option<Vec<usize>> = list.iter().map(crate::config::whole).collect();
        <[usize; 2]>::try_from(sizes?).ok()
    });
    let dtype = text("dtype").and_then(from_torch_name);
    let nested = match json.get("nested_blocksize").filter(|v| !v.is_null()) {
        None => None,
        Some(_) => {
            let offset = json.get("nested_offset").and_then(Value::as_f64);
            let offset = offset.ok_or_else(|| wrong("nested_offset", "a number"))?;
            Some((block("nested_blocksize", MAX_BLOCK)?, offset as f32))
        }
    };
    Ok(QuantState {
        block: block("blocksize", MAX_BLOCK)?,
        dtype: dtype.ok_or_else(|| wrong("dtype", "float32, bfloat16 or float16"))?,
        shape: shape.ok_or_else(|| wrong("shape", "two sizes"))?,
        nested,
    })
}

/// The scales of `blocks` blocks, and what they were nested in.
fn read_absmax(
    checkpoint: &Checkpoint,
    name: &str,
    (state, blocks): (&QuantState, usize),
) -> Result<(Vec<f32>, Option<Box<bnb::Nested>>)> {
    let part = |suffix: &str| {
        let key = format!("{name}.{suffix}");
        let missing = || {
            Error::Checkpoint(format!(
                "the checkpoint has no tensor {key}, which {name} needs: is the download complete?"
            ))
        };
        checkpoint.stored(&key).ok_or_else(missing)
    };
    let absmax = part("absmax")?;
    let Some((block, offset)) = state.nested else {
        return Ok((floats(&absmax, blocks, "blocks")?, None));
    };
    if absmax.dtype != StoredDtype::U8 || absmax.bytes.len() != blocks {
        return Err(absmax.wrong(&format!(
            "has {} bytes of {:?}, but {blocks} blocks have as many of U8: the file is damaged; download \
             it again",
            absmax.bytes.len(),
            absmax.dtype
        )));
    }
    let map = floats(&part("nested_quant_map")?, 256, "codes")?;
    let nested = bnb::Nested {
        codes: absmax.bytes.to_vec(),
        absmax: floats(&part("nested_absmax")?, blocks.div_ceil(block), "blocks")?,
        map: map.try_into().expect("256 values were asked for"),
        offset,
    };
    Ok((denested(&nested, block), Some(Box::new(nested))))
}

/// A tensor of exactly so many f32.
fn floats(tensor: &StoredTensor<'_>, count: usize, of: &str) -> Result<Vec<f32>> {
    let (values, rest) = tensor.bytes.as_chunks::<4>();
    if tensor.dtype != StoredDtype::F32 || values.len() != count || !rest.is_empty() {
        return Err(tensor.wrong(&format!(
            "has {} bytes of {:?}, but {count} {of} take {} of F32: the file is damaged; download it again",
            tensor.bytes.len(),
            tensor.dtype,
            count.saturating_mul(4)
        )));
    }
    Ok(values.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct OutputTensor {
    pub(super) name: String,
    /// The type, as the file format spells it.
    pub(super) dtype: &'static str,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: usize,
}

/// The tensors that the matrix `name` of `shape` is written as.
pub(super) fn layout(
    name: &str,
    [n, k]: [usize; 2],
    config: &BitsAndBytesConfig,
    kind: BitsAndBytesKind,
) -> Vec<OutputTensor> {
    let tensor = |name: String, dtype: &'static str, shape: &[usize], size: usize| OutputTensor {
        name,
        dtype,
        shape: shape.to_vec(),
        bytes: size * shape.iter().product::<usize>(),
    };
    let BitsAndBytesKind::FourBit(codes) = kind else {
        let stem = name.strip_suffix("weight").unwrap_or(name);
        return vec![
            tensor(name.to_owned(), "I8", &[n, k], 1),
            tensor(format!("{stem}SCB"), "F32", &[n], 4),
            tensor(format!("{stem}weight_format"), "U8", &[], 1),
        ];
    };
    let (bytes, blocks) = ((n * k).div_ceil(2), (n * k).div_ceil(BLOCK));
    // Codes that are no whole number of another type's values stay bytes.
    let storage = match config.bnb_4bit_quant_storage {
        storage if bytes.is_multiple_of(storage.size()) => storage,
        _ => QuantStorage::Uint8,
    };
    let (label, size) = (storage_label(storage), storage.size());
    let nested = config.bnb_4bit_use_double_quant;
    let mut tensors = vec![
        tensor(name.to_owned(), label, &[bytes / size, 1], size),
        match nested {
            false => tensor(format!("{name}.absmax"), "F32", &[blocks], 4),
            true => tensor(format!("{name}.absmax"), "U8", &[blocks], 1),
        },
        tensor(format!("{name}.quant_map"), "F32", &[16], 4),
    ];
    if nested {
        let peaks = blocks.div_ceil(bnb::NESTED_BLOCK);
        tensors.push(tensor(format!("{name}.nested_absmax"), "F32", &[peaks], 4));
        let map = format!("{name}.nested_quant_map");
        tensors.push(tensor(map, "F32", &[256], 4));
    }
    let state = state_bytes(&state_json(
        [n, k],
        codes,
        Dtype::Bf16,
        nested.then_some(0.0),
    ));
    let key = format!("{name}.quant_state.bitsandbytes__{}", codes.name());
    tensors.push(tensor(key, "U8", &[state.len()], 1));
    tensors
}

fn storage_label(storage: QuantStorage) -> &'static str {
    match storage {
        QuantStorage::Uint8 => "U8",
        QuantStorage::Int8 => "I8",
        QuantStorage::Float16 => "F16",
        QuantStorage::Bfloat16 => "BF16",
        QuantStorage::Float32 => "F32",
        QuantStorage::Float64 => "F64",
    }
}

/// The bytes of the tensors of [`layout`], in its order.
pub(super) fn serialise(quantised: &Quantised<'_>) -> Vec<Vec<u8>> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    match quantised {
        Quantised::Int8(w) => vec![w.codes.to_vec(), bytes(&w.scb), vec![0]],
        Quantised::FourBit(w) => {
            let codes = match w.code {
                Code4::Nf4 => QuantType::Nf4,
                Code4::Fp4 => QuantType::Fp4,
            };
            let offset = w.nested.as_ref().map(|nested| nested.offset);
            let mut tensors = vec![w.codes.to_vec()];
            match &w.nested {
                None => tensors.push(bytes(&w.absmax)),
                Some(nested) => tensors.push(nested.codes.clone()),
            }
            tensors.push(bytes(w.code.table()));
            if let Some(nested) = &w.nested {
                tensors.push(bytes(&nested.absmax));
                tensors.push(bytes(&nested.map));
            }
            tensors.push(state_bytes(&state_json(w.shape, codes, w.dtype, offset)));
            tensors
        }
    }
}

fn state_json(shape: [usize; 2], codes: QuantType, dtype: Dtype, offset: Option<f32>) -> Value {
    let mut json = json!({
        "quant_type": codes.name(),
        "blocksize": BLOCK,
        "dtype": torch_name(dtype),
        "shape": shape,
    });
    if let Some(offset) = offset {
        json["nested_blocksize"] = json!(bnb::NESTED_BLOCK);
        json["nested_dtype"] = json!("float32");
        json["nested_offset"] = json!(f64::from(offset));
    }
    json
}

/// The JSON with spaces up to a length that does not hang on the numbers in it: a file's layout is
/// written before its weights are made.
fn state_bytes(json: &Value) -> Vec<u8> {
    const UNIT: usize = 64;
    let mut bytes = json.to_string().into_bytes();
    // A shape is known beforehand; the type and the offset take up to 32 bytes.
    let fixed = json["shape"].to_string().len();
    bytes.resize((256 + fixed).next_multiple_of(UNIT), b' ');
    bytes
}

impl StoredTensor<'_> {
    /// An error about it.
    fn wrong(&self, what: &str) -> Error {
        Error::Checkpoint(format!("tensor {} in {} {what}", self.name, self.file))
    }
}
