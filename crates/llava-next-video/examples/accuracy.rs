//! What each weight format costs in accuracy, on a text: perplexity, agreement and divergence against f32.
//!
//! `cargo run --release -p llava-next-video --example accuracy -- \
//! CHECKPOINT TEXT [--windows N] [--expect P] [FORMAT]...`
//!
//! The text is cut into windows of 512 tokens; N of them, evenly spread, are read by one model a format,
//! all formats in memory at once, so that f32 is computed once and no logits are kept. Without names,
//! all of [`FORMATS`]. Fails where a format is out of its bounds, which stand in the list, or where f32's
//! perplexity is not P.
//!
//! Perplexity can come out better than f32's by luck; the divergence (KL, mean over the predicted
//! tokens) cannot, and settles within a few windows.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use llava_next_video::config::{
    BitsAndBytesConfig, BitsAndBytesKind, CheckpointFiles, Dtype, QuantType, Quantization,
};
use llava_next_video::model::{ForwardOptions, LlavaNextVideoModel, LoadOptions};
use llava_next_video::processor::inputs::ModelInputs;
use llava_next_video::processor::tokenizer::Tokenizer;
use rayon::prelude::*;

/// Tokens of a window.
const WINDOW: usize = 512;

/// How far f32's perplexity may be from what it should be.
const CLOSE: f64 = 1e-4;

/// What a format may cost.
enum Bound {
    /// It is what the others are measured against.
    Baseline,
    /// Perplexity within so many percent of f32's, either way, and the likeliest token the same in so
    /// many percent of the places.
    Near { perplexity: f64, agreement: f64 },
    /// Perplexity and divergence at most those of another format, which is listed before.
    Under { format: &'static str },
}

/// A way to load the weights.
struct Format {
    name: &'static str,
    options: fn() -> LoadOptions<'static>,
    bound: Bound,
}

/// Every format, f32 first.
const FORMATS: &[Format] = &[
    Format {
        name: "f32",
        options: || stored(Dtype::F32),
        bound: Bound::Baseline,
    },
    Format {
        name: "bf16",
        options: || stored(Dtype::Bf16),
        bound: Bound::Near {
            perplexity: 0.2,
            agreement: 98.5,
        },
    },
    Format {
        name: "f16",
        options: || stored(Dtype::F16),
        // Its keys and values are kept in bf16, which sets the bound.
        bound: Bound::Near {
            perplexity: 0.2,
            agreement: 98.5,
        },
    },
    Format {
        name: "q8",
        options: || quantized(Quantization::Q8),
        bound: Bound::Near {
            perplexity: 1.0,
            agreement: 97.0,
        },
    },
    Format {
        name: "nf4",
        options: || bitsandbytes(BitsAndBytesKind::FourBit(QuantType::Nf4)),
        bound: Bound::Near {
            perplexity: 30.0,
            agreement: 65.0,
        },
    },
    Format {
        name: "q4",
        options: || quantized(Quantization::Q4),
        bound: Bound::Under { format: "nf4" },
    },
    Format {
        name: "fp4",
        options: || bitsandbytes(BitsAndBytesKind::FourBit(QuantType::Fp4)),
        bound: Bound::Near {
            perplexity: 60.0,
            agreement: 55.0,
        },
    },
    Format {
        name: "int8",
        options: || bitsandbytes(BitsAndBytesKind::Int8),
        bound: Bound::Near {
            perplexity: 5.0,
            agreement: 85.0,
        },
    },
];

fn bitsandbytes(kind: BitsAndBytesKind) -> LoadOptions<'static> {
    quantized(Quantization::BitsAndBytes(BitsAndBytesConfig::of(kind)))
}

fn quantized(quantization: Quantization) -> LoadOptions<'static> {
    LoadOptions {
        quantization: Some(quantization),
        ..LoadOptions::default()
    }
}

fn stored(dtype: Dtype) -> LoadOptions<'static> {
    LoadOptions {
        dtype: Some(dtype),
        ..LoadOptions::default()
    }
}

/// What a format did, summed over the predicted tokens.
#[derive(Clone, Copy, Default)]
struct Sums {
    tokens: f64,
    loss: f64,
    agreed: f64,
    divergence: f64,
}

impl Sums {
    fn plus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            loss: self.loss + other.loss,
            agreed: self.agreed + other.agreed,
            divergence: self.divergence + other.divergence,
        }
    }

    fn figures(&self, baseline: &Self) -> Figures {
        let perplexity = |sums: &Self| (sums.loss / sums.tokens).exp();
        Figures {
            perplexity: perplexity(self),
            change: 100.0 * (perplexity(self) / perplexity(baseline) - 1.0),
            agreement: 100.0 * self.agreed / self.tokens,
            divergence: self.divergence / self.tokens,
        }
    }
}

/// A line of the table.
struct Figures {
    perplexity: f64,
    /// Of perplexity, in percent.
    change: f64,
    /// In percent.
    agreement: f64,
    divergence: f64,
}

struct Args {
    checkpoint: String,
    text: String,
    windows: usize,
    expect: Option<f64>,
    formats: Vec<&'static Format>,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures and prints; whether every format is within its bounds.
fn run() -> Result<bool, Box<dyn Error>> {
    let args = Args::read()?;
    let files = CheckpointFiles::open(Path::new(&args.checkpoint))?;
    let windows = windows(&files, &args)?;
    let load = |format: &&Format| LlavaNextVideoModel::load(&files, &(format.options)());
    let models: Vec<_> = args.formats.iter().map(load).collect::<Result<_, _>>()?;

    let mut sums = vec![Sums::default(); models.len()];
    for window in &windows {
        let baseline = logits(&models[0], window)?;
        sums[0] = sums[0].plus(compare(&baseline, &baseline, window));
        for (model, sums) in models.iter().zip(&mut sums).skip(1) {
            *sums = sums.plus(compare(&baseline, &logits(model, window)?, window));
        }
    }

    println!("{} windows of {WINDOW} tokens", windows.len());
    println!("format       MB  perplexity    change  same top-1  divergence");
    let figures: Vec<_> = sums.iter().map(|own| own.figures(&sums[0])).collect();
    for ((format, model), own) in args.formats.iter().zip(&models).zip(&figures) {
        let megabytes = model.bytes() as f64 / 1e6;
        println!(
            "{:9} {megabytes:5.1} {:11.3} {:+8.3}% {:10.2}% {:11.6}",
            format.name, own.perplexity, own.change, own.agreement, own.divergence,
        );
    }
    let mut good = true;
    if let Some(expect) = args.expect
        && beyond(figures[0].perplexity / expect - 1.0, CLOSE)
    {
        println!("f32: perplexity should be {expect}");
        good = false;
    }
    for (format, own) in args.formats.iter().zip(&figures) {
        let other = |name: &str| {
            let place = args.formats.iter().position(|format| format.name == name)?;
            Some(&figures[place])
        };
        for complaint in complaints(format, own, other) {
            println!("{}: {complaint}", format.name);
            good = false;
        }
    }
    Ok(good)
}

/// Whether a value is further from zero than allowed, or is no number.
fn beyond(value: f64, allowed: f64) -> bool {
    value.is_nan() || value.abs() > allowed
}

/// How a format is out of its bounds; `other` finds the figures of another one, where it was measured.
fn complaints<'a>(
    format: &Format,
    own: &Figures,
    other: impl Fn(&str) -> Option<&'a Figures>,
) -> Vec<String> {
    let mut complaints = Vec::new();
    match format.bound {
        Bound::Baseline => {}
        Bound::Near {
            perplexity,
            agreement,
        } => {
            if beyond(own.change, perplexity) {
                complaints.push(format!("perplexity is more than {perplexity} % off"));
            }
            if own.agreement < agreement {
                complaints.push(format!("agrees in less than {agreement} % of the places"));
            }
        }
        Bound::Under { format } => {
            let worse = |other: &Figures| {
                own.perplexity > other.perplexity || own.divergence > other.divergence
            };
            if other(format).is_some_and(worse) {
                complaints.push(format!("loses more than {format}"));
            }
        }
    }
    complaints
}

impl Args {
    fn read() -> Result<Self, Box<dyn Error>> {
        let usage = "usage: accuracy CHECKPOINT TEXT [--windows N] [--expect P] [FORMAT]...";
        let mut args = std::env::args().skip(1);
        let (checkpoint, text) = args.next().zip(args.next()).ok_or(usage)?;
        let mut windows = usize::MAX;
        let mut expect = None;
        let mut names = Vec::new();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--expect" => expect = Some(args.next().ok_or(usage)?.parse()?),
                "--windows" => windows = args.next().ok_or(usage)?.parse()?,
                _ => names.push(arg),
            }
        }
        if let Some(name) = names
            .iter()
            .find(|n| !FORMATS.iter().any(|f| f.name == **n))
        {
            let known: Vec<_> = FORMATS.iter().map(|format| format.name).collect();
            return Err(
                format!("no format is called {name}: there are {}", known.join(", ")).into(),
            );
        }
        let wanted = |format: &&Format| {
            matches!(format.bound, Bound::Baseline)
                || names.is_empty()
                || names.iter().any(|name| name == format.name)
        };
        Ok(Self {
            checkpoint,
            text,
            windows,
            expect,
            formats: FORMATS.iter().filter(wanted).collect(),
        })
    }
}

/// The windows of the text that are wanted, evenly spread; what is left over at its end is not read.
fn windows(files: &CheckpointFiles, args: &Args) -> Result<Vec<Vec<u32>>, Box<dyn Error>> {
    let text = std::fs::read_to_string(&args.text).map_err(|e| format!("{}: {e}", args.text))?;
    let ids = Tokenizer::from_files(files)?.encode(&text, false)?;
    let all: Vec<&[u32]> = ids.chunks_exact(WINDOW).collect();
    let count = args.windows.min(all.len());
    if count == 0 {
        return Err(format!("{} has no window of {WINDOW} tokens", args.text).into());
    }
    Ok((0..count)
        .map(|i| all[i * all.len() / count].to_vec())
        .collect())
}

/// Scores of every position, `[tokens, vocabulary]`.
fn logits(model: &LlavaNextVideoModel, window: &[u32]) -> Result<Vec<f32>, Box<dyn Error>> {
    let inputs = ModelInputs {
        input_ids: vec![window.to_vec()],
        attention_mask: vec![vec![true; window.len()]],
        ..ModelInputs::default()
    };
    let out = model.forward(&inputs, None, &ForwardOptions::default())?;
    Ok(out.logits.data)
}

/// What scores say of the next tokens, against the baseline's.
fn compare(baseline: &[f32], own: &[f32], window: &[u32]) -> Sums {
    let vocabulary = own.len() / window.len();
    let rows = baseline
        .par_chunks_exact(vocabulary)
        .zip(own.par_chunks_exact(vocabulary))
        .zip(&window[1..]);
    rows.map(|((p, q), next)| compare_row(p, q, *next as usize))
        .reduce(Sums::default, Sums::plus)
}

fn compare_row(p: &[f32], q: &[f32], next: usize) -> Sums {
    let (p_best, p_max) = largest(p);
    let (q_best, q_max) = largest(q);
    // Sums of exp(p), of exp(q), and of exp(p) (p - q).
    let (mut p_sum, mut q_sum, mut dot) = (0.0, 0.0, 0.0);
    for (p, q) in p.iter().zip(q) {
        let (p, q) = (p - p_max, q - q_max);
        let weight = p.exp();
        p_sum += f64::from(weight);
        q_sum += f64::from(q.exp());
        dot += f64::from(weight * (p - q));
    }
    Sums {
        tokens: 1.0,
        loss: q_sum.ln() - f64::from(q[next] - q_max),
        agreed: f64::from(u8::from(p_best == q_best)),
        divergence: dot / p_sum - p_sum.ln() + q_sum.ln(),
    }
}

/// Place and value of the largest.
fn largest(values: &[f32]) -> (usize, f32) {
    let first = (0, f32::NEG_INFINITY);
    let pairs = values.iter().copied().enumerate();
    pairs.fold(first, |best, own| if own.1 > best.1 { own } else { best })
}
