//! What may be typed: the command line as clap sees it, before any of it is acted upon.

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use llava_next_video::engine::Prefer;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  lnv ask --model llava-hf/LLaVA-NeXT-Video-7B-hf --video clip.mp4 \"What happens?\"
  lnv chat --model ./LLaVA-NeXT-Video-7B-hf --image photo.jpg
  lnv inspect --model ./LLaVA-NeXT-Video-7B-hf

Answers go to stdout, everything else to stderr. 'lnv COMMAND -h' lists a command's options.";

/// Ask questions about videos and images with the LLaVA-NeXT-Video models.
///
/// Without --model the small built-in demo model answers; with --model a real checkpoint does: a
/// directory in Hugging Face layout, or a hub id such as llava-hf/LLaVA-NeXT-Video-7B-hf.
#[derive(Parser, Debug)]
#[command(
    name = "lnv",
    version,
    propagate_version = true,
    after_help = EXAMPLES,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Ask one question about videos and images; the answer streams to stdout.
    #[command(allow_negative_numbers = true)]
    Ask(AskArgs),
    /// Talk about videos and images; the history and the media stay.
    #[command(allow_negative_numbers = true)]
    Chat(ChatArgs),
    /// Generate from a conversation file or from processed inputs, perhaps a whole batch.
    #[command(allow_negative_numbers = true)]
    Generate(GenerateArgs),
    /// Answer over HTTP as OpenAI's API does, with a page to try it.
    Serve(Box<ServeArgs>),
    /// Decode one medium for `lnv serve`, which alone knows how to ask.
    #[command(hide = true)]
    DecodeMedia(DecodeMediaArgs),
    /// Write what the Transformers processor returns: token ids and pixels.
    #[command(allow_negative_numbers = true)]
    Process(ProcessArgs),
    /// Run the model once over processed inputs: logits, loss, hidden states, attentions.
    #[command(allow_negative_numbers = true)]
    Forward(ForwardArgs),
    /// Measure vision, prefill and decode against this machine's limits.
    #[command(allow_negative_numbers = true)]
    Bench(BenchArgs),
    /// Write a checkpoint with quantised weights, which opens at once and takes less room.
    Quantize(QuantizeArgs),
    /// Say what a checkpoint is and what loading it would take; reads no weights.
    Inspect(InspectArgs),
}

/// Which checkpoint, and how it is kept.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Directory in Hugging Face layout, or a hub id; without it, the built-in demo model.
    #[arg(long, short, value_name = "DIR|ID")]
    pub model: Option<String>,
    #[command(flatten)]
    pub run: RunArgs,
}

/// How a checkpoint is kept and where it runs.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Model")]
pub struct RunArgs {
    /// Type of the weights in memory; auto keeps the checkpoint's, is bf16 beside q8 and q4, and f16
    /// beside nf4, fp4 and int8.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto, hide_possible_values = true,
          value_name = "auto|f32|bf16|f16", hide_default_value = true)]
    pub dtype: DtypeArg,
    /// Type of the keys and values in memory; auto is f32 with f32 weights, else bf16.
    #[arg(long, value_enum, default_value_t = KvDtypeArg::Auto, hide_possible_values = true,
          value_name = "auto|f32|bf16|int8", hide_default_value = true)]
    pub kv_cache_dtype: KvDtypeArg,
    /// Quantise the weights when loading.
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        value_name = "q8|q4|nf4|fp4|int8"
    )]
    pub quantize: Option<QuantizeArg>,
    #[command(flatten)]
    pub bitsandbytes: BitsAndBytesArgs,
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", value_name = "DEVICE", env = "LNV_DEVICE")]
    pub device: String,
    /// Rotary scaling instead of the checkpoint's: linear:F, or auto for the clip's length.
    #[arg(long, value_name = "linear:F|auto")]
    pub rope_scaling: Option<String>,
}

/// `--dtype`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeArg {
    /// As the checkpoint stores it.
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
}

/// `--kv-cache-dtype`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtypeArg {
    /// As the weights' type demands.
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with a scale for each token and head.
    Int8,
}

/// `--quantize`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizeArg {
    /// 8-bit weights and activations.
    Q8,
    /// 4-bit groups.
    Q4,
    /// bitsandbytes NF4.
    Nf4,
    /// bitsandbytes FP4.
    Fp4,
    /// bitsandbytes LLM.int8().
    Int8,
}

/// The rest of a `BitsAndBytesConfig`.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Model")]
pub struct BitsAndBytesArgs {
    /// With nf4 and fp4: keep the blocks' scales in 8 bits (double quantisation).
    #[arg(long)]
    pub double_quant: bool,
    /// With nf4 and fp4: type of the products [default: f32 with --dtype f32, else bf16].
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        value_name = "f32|bf16|f16"
    )]
    pub compute_dtype: Option<ComputeArg>,
    /// With nf4, fp4 and int8: modules that are not quantised, by name or path [default: lm_head].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub skip_modules: Option<Vec<String>>,
    /// With int8: activations this large are not rounded to 8 bits; 0 rounds all [default: 6].
    #[arg(long, value_name = "X")]
    pub int8_threshold: Option<f32>,
}

/// `--compute-dtype`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComputeArg {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
}

/// Which frames of a video are taken.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Frames")]
pub struct FrameArgs {
    /// Frames of each video, evenly spread [default: 8, or all of a shorter video].
    #[arg(long, value_name = "N", conflicts_with = "fps")]
    pub num_frames: Option<usize>,
    /// Frames a second instead of a fixed number.
    #[arg(long, value_name = "F")]
    pub fps: Option<f64>,
}

/// How the answer is written.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Generation")]
pub struct GenerationArgs {
    /// Most new tokens.
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// Longest sequence, the prompt with all its image and video tokens included.
    #[arg(long, value_name = "N")]
    pub max_length: Option<usize>,
    /// No end before this many new tokens.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub min_new_tokens: usize,
    /// Sample at this temperature; 0 is greedy [default: greedy].
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Sample among the k best tokens only.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample among the likeliest tokens that reach this probability.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Sample no token less likely than this share of the likeliest.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Above 1: say less of what was said already.
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f32>,
    /// No sequence of N tokens twice.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub no_repeat_ngram_size: usize,
    /// Equal seeds give equal samples.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub seed: u64,
    /// Search with this many beams.
    #[arg(long, value_name = "N")]
    pub num_beams: Option<usize>,
    /// Exponent of the length in a beam's score.
    #[arg(long, value_name = "X")]
    pub length_penalty: Option<f32>,
    /// When beam search ends: with enough beams finished, with none likely, or none able to do better.
    #[arg(
        long,
        value_enum,
        value_name = "true|false|never",
        hide_possible_values = true
    )]
    pub early_stopping: Option<EarlyStoppingArg>,
    /// Answers to each prompt.
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true)]
    pub num_return_sequences: usize,
    /// End the answer at this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    #[command(flatten)]
    pub frames: FrameArgs,
}

/// `--early-stopping`, spelled as in Transformers.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum EarlyStoppingArg {
    /// Once enough beams are finished.
    True,
    /// Once none is likely to do better.
    False,
    /// Only once none can do better.
    Never,
}

/// `lnv ask`.
#[derive(Args, Debug)]
pub struct AskArgs {
    /// The question; - reads it from stdin.
    pub question: String,
    /// A video file or URL; may be given several times.
    #[arg(long, value_name = "PATH|URL")]
    pub video: Vec<String>,
    /// An image file or URL; may be given several times.
    #[arg(long, value_name = "PATH|URL")]
    pub image: Vec<String>,
    /// Text that tells the model how to behave.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// `lnv chat`.
#[derive(Args, Debug)]
pub struct ChatArgs {
    /// A video to begin with; may be given several times.
    #[arg(long, value_name = "PATH|URL")]
    pub video: Vec<String>,
    /// An image to begin with; may be given several times.
    #[arg(long, value_name = "PATH|URL")]
    pub image: Vec<String>,
    /// Text that tells the model how to behave.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// `lnv serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Address to listen on; 0.0.0.0 for all (then set a key).
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, value_name = "N", default_value_t = 8000)]
    pub port: u16,
    /// Answer only those who send this key, in the form "Authorization: Bearer KEY".
    #[arg(long, value_name = "KEY", env = "LNV_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Name that the model goes by; may be given several times, the first one is shown.
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// Let pages of this origin ask too, such as `https://example.org`; `*` for all.
    #[arg(long, value_name = "ORIGIN")]
    pub allow_origin: Vec<String>,
    /// Tell clients apart by X-Forwarded-For; only behind a proxy that sets it itself.
    #[arg(long)]
    pub trust_proxy: bool,
    /// Name that this server may be asked by, besides addresses and localhost; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
    /// One line a request on stderr, as text or as JSON.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, hide_possible_values = true,
          value_name = "text|json", hide_default_value = true)]
    pub log_format: LogFormat,
    /// Where videos wait to be read while answers grow: `latency` reads them so slowly that a token takes at most
    /// about twice as long, `throughput` at full speed, so that all answers together are done sooner.
    #[arg(long, value_enum, default_value_t = PreferArg::Latency, hide_possible_values = true,
          value_name = "latency|throughput")]
    pub prefer: PreferArg,
    /// Send a trace of each request to the OpenTelemetry collector at this address, such as
    /// `http://localhost:4318` [default: that of OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT,
    /// if any].
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    #[command(flatten)]
    pub media: ServeMediaArgs,
    #[command(flatten)]
    pub limits: ServeLimitArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `lnv decode-media`.
#[derive(Args, Debug)]
pub struct DecodeMediaArgs {
    /// Most memory, in MiB, of addresses.
    pub memory_mib: u64,
    /// Most time of processors, in seconds.
    pub cpu_seconds: u64,
}

/// What media `lnv serve` takes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Media")]
pub struct ServeMediaArgs {
    /// Directory whose files requests may name; may be given several times [default: none].
    #[arg(long, value_name = "DIR")]
    pub allow_local: Vec<PathBuf>,
    /// Fetch from this machine and private networks too.
    #[arg(long)]
    pub allow_private_addresses: bool,
    /// Frames of a clip where the request does not say.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub default_frames: usize,
    /// Most frames of a request.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_frames: usize,
    /// Most pictures and clips of a request.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub max_media: usize,
    /// Largest file, in MiB, uploaded or fetched, and all together that one request brings.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub max_media_mib: usize,
    /// Memory for decoded media that are kept, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub media_cache_mib: usize,
    /// Disk for what was fetched, in MiB, so that what its server calls unchanged is not sent again.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub fetch_cache_mib: usize,
    /// Disk for uploads that are kept, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub upload_cache_mib: usize,
}

/// What `lnv serve` takes at most.
#[derive(Args, Debug)]
#[command(next_help_heading = "Limits")]
pub struct ServeLimitArgs {
    /// Most new tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub max_tokens: usize,
    /// Requests that wait; more are told to come again (429).
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_waiting: usize,
    /// Open connections; more are told to come again (429).
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_connections: usize,
    /// Largest JSON body in MiB, data URIs and all.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub max_body_mib: usize,
    /// Memory for bodies that are being read, in MiB, all together.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub body_memory_mib: usize,
    /// Memory for media that are being decoded, in MiB, all together; less than 768 also bounds the largest picture.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub decode_memory_mib: usize,
    /// Memory of one process that decodes, in MiB; there are two at a time.
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    pub decoder_memory_mib: usize,
    /// Memory for pictures that wait for the model, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub pixel_memory_mib: usize,
    /// Memory for keys and values in MiB [default: a quarter of what is free].
    #[arg(long, value_name = "MIB")]
    pub kv_cache_mib: Option<usize>,
    /// Memory for features of pictures that are kept, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub feature_cache_mib: usize,
    /// Directory for features of pictures too: the next start finds them there, and so do other servers
    /// that share it [default: none].
    #[arg(long, value_name = "DIR")]
    pub feature_cache: Option<PathBuf>,
    /// Disk for them in MiB; what was not asked about for longest goes first.
    #[arg(
        long,
        value_name = "MIB",
        default_value_t = 8192,
        requires = "feature_cache"
    )]
    pub feature_cache_disk_mib: usize,
    /// Seconds that a request may take in all.
    #[arg(long, value_name = "S", default_value_t = 600)]
    pub request_timeout: u64,
    /// Seconds that running requests get when the server is told to stop.
    #[arg(long, value_name = "S", default_value_t = 30)]
    pub drain_seconds: u64,
}

/// `--log-format`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `--prefer`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreferArg {
    /// Tokens come steadily.
    Latency,
    /// All answers are done soon.
    Throughput,
}

impl From<PreferArg> for Prefer {
    fn from(prefer: PreferArg) -> Self {
        match prefer {
            PreferArg::Latency => Self::Latency,
            PreferArg::Throughput => Self::Throughput,
        }
    }
}

/// `lnv generate`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("prompt").required(true).args(["conversation", "inputs"])))]
pub struct GenerateArgs {
    /// JSON file with a conversation, or a list of them, in the Transformers form.
    #[arg(long, value_name = "FILE")]
    pub conversation: Option<PathBuf>,
    /// Processed inputs, as `lnv process` or Transformers writes them.
    #[arg(long, value_name = "FILE.safetensors")]
    pub inputs: Option<PathBuf>,
    /// How to print the answers.
    #[arg(long, value_enum, default_value_t = Format::Text, hide_possible_values = true, value_name = "text|json")]
    pub format: Format,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// `--format`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

/// `lnv process`.
#[derive(Args, Debug)]
pub struct ProcessArgs {
    /// Directory in Hugging Face layout, or a hub id; without it, the built-in demo model.
    #[arg(long, short, value_name = "DIR|ID")]
    pub model: Option<String>,
    /// JSON file with a conversation, or a list of them, in the Transformers form.
    #[arg(long, value_name = "FILE")]
    pub conversation: PathBuf,
    /// Leave out the generation prompt, for training.
    #[arg(long)]
    pub no_generation_prompt: bool,
    /// Where to write.
    #[arg(long, value_name = "FILE.safetensors")]
    pub output: PathBuf,
    #[command(flatten)]
    pub frames: FrameArgs,
}

/// `lnv forward`.
#[derive(Args, Debug)]
pub struct ForwardArgs {
    /// Processed inputs; `labels` in them give a loss.
    #[arg(long, value_name = "FILE.safetensors")]
    pub inputs: PathBuf,
    /// Where to write.
    #[arg(long, value_name = "FILE.safetensors")]
    pub output: PathBuf,
    /// Write every hidden state.
    #[arg(long)]
    pub hidden_states: bool,
    /// Write the attention weights of every layer.
    #[arg(long)]
    pub attentions: bool,
    /// Logits of the last N positions only; 0 is all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub logits_to_keep: usize,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `lnv bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Directory in Hugging Face layout, or a hub id; without it, the built-in demo model.
    #[arg(long, short, value_name = "DIR|ID", conflicts_with = "synthetic")]
    pub model: Option<String>,
    /// Random weights of these dimensions, made in memory.
    #[arg(long, value_enum)]
    pub synthetic: Option<Synthetic>,
    /// Decoder layers of the synthetic model [default: all].
    #[arg(long, value_name = "N", requires = "synthetic")]
    pub text_layers: Option<usize>,
    /// Frames of the clip.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub frames: usize,
    /// Also time decoding and preprocessing this video.
    #[arg(long, value_name = "FILE")]
    pub video: Option<PathBuf>,
    /// Decode steps to time.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub steps: usize,
    /// Also time steps of this many rows at once.
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Also time steps of one row at each of these contexts, in tokens; `--batch` is at the first
    /// [default: the clip's].
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub context: Vec<usize>,
    /// Also answer so many requests one after another, then all at once, as a server does.
    #[arg(long, value_name = "N")]
    pub requests: Option<usize>,
    /// Clips that the requests are about.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub clips: usize,
    /// New tokens of each request.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub new_tokens: usize,
    /// How to print the figures.
    #[arg(long, value_enum, default_value_t = Format::Text, hide_possible_values = true, value_name = "text|json")]
    pub format: Format,
    #[command(flatten)]
    pub run: RunArgs,
}

/// `--synthetic`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Synthetic {
    /// LLaVA-NeXT-Video-7B.
    #[value(name = "7b")]
    B7,
    /// LLaVA-NeXT-Video-7B-32K.
    #[value(name = "7b-32k")]
    B7K32,
    /// LLaVA-NeXT-Video-34B.
    #[value(name = "34b")]
    B34,
    /// A few million parameters, for a quick look.
    Tiny,
}

/// `lnv quantize`.
#[derive(Args, Debug)]
pub struct QuantizeArgs {
    /// Directory in Hugging Face layout, or a hub id; without it, the built-in demo model.
    #[arg(long, short, value_name = "DIR|ID")]
    pub model: Option<String>,
    /// Format of the weights: q8 (8 bits), q4 (4 bits), or bitsandbytes' nf4, fp4, int8.
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        value_name = "q8|q4|nf4|fp4|int8"
    )]
    pub to: QuantizeArg,
    #[command(flatten)]
    pub bitsandbytes: BitsAndBytesArgs,
    /// Type of what is not quantised; auto is bf16, or f16 for nf4, fp4 and int8.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto, hide_possible_values = true,
          value_name = "auto|f32|bf16|f16", hide_default_value = true)]
    pub dtype: DtypeArg,
    /// The directory to write; it must not be there yet, or be empty.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

/// `lnv inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// How to print it.
    #[arg(long, value_enum, default_value_t = Format::Text, hide_possible_values = true, value_name = "text|json")]
    pub format: Format,
}
