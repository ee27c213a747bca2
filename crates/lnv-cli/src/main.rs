//! `lnv`: ask questions about videos and images.
//!
//! Answers go to stdout, everything else to stderr. Exit status: 0; 1 with one plain sentence on
//! stderr; 2 for a misuse of the command line.

mod args;
mod ask;
mod bench;
mod chat;
mod checkpoint;
mod fetch;
mod forward;
mod generate;
mod incoming;
mod inspect;
mod media;
mod memory;
mod model;
mod output;
mod pipeline;
mod process;
mod progress;
mod quantize;
mod serve;
mod stream;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches};

use args::{Cli, Command, LogFormat};

fn main() -> ExitCode {
    quiet_panics();
    let matches = Cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    start_log(&cli.command);
    let order = matches
        .subcommand()
        .map(|(_, sub)| pipeline::media_order(sub))
        .unwrap_or_default();
    match std::panic::catch_unwind(|| run(&cli, order)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if error.is::<output::ReaderGone>() => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            output::say(&format!("error: {}", output::sentence(&error)));
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(cli: &Cli, order: Vec<pipeline::NamedMedium>) -> Result<()> {
    pipeline::check_named(&order)?;
    match &cli.command {
        Command::Ask(args) => ask::run(args, order),
        Command::Chat(args) => chat::run(args, order),
        Command::Generate(args) => generate::run(args),
        Command::Serve(args) => serve::run(args),
        Command::DecodeMedia(args) => serve::media::decoder::run(args),
        Command::Process(args) => process::run(args),
        Command::Forward(args) => forward::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Inspect(args) => inspect::run(args),
    }
}

/// A panic is a bug of ours; a person gets a sentence, not a backtrace.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        let what = info.payload();
        let message = what
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| what.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let place = info
            .location()
            .map(|l| format!("{}:{}", l.file(), l.line()));
        output::say(&format!(
            "error: lnv ran into a bug of its own ({message}, {}): please report it with the command",
            place.unwrap_or_default()
        ));
    }));
}

/// `LNV_LOG=debug` shows what the library says. A server logs its requests unless told otherwise, with
/// the time; the other commands warn only.
fn start_log(command: &Command) {
    let (usual, format) = match command {
        Command::Serve(args) => (
            "warn,lnv::request=info,lnv::serve=info",
            Some(args.log_format),
        ),
        _ => ("warn", None),
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("LNV_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let _ = match format {
        None => log.without_time().with_target(false).try_init(),
        Some(LogFormat::Text) => log.with_ansi(false).try_init(),
        Some(LogFormat::Json) => log.json().flatten_event(true).try_init(),
    };
}
