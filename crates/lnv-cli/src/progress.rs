//! Progress on stderr: bars on a terminal, silence elsewhere. Stdout carries answers only.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output;

/// A bar that shows nothing where stderr is no terminal.
pub fn bar(total: u64, unit: Unit, what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), target());
    let counts = match unit {
        Unit::Bytes => "{bytes}/{total_bytes} {bytes_per_sec}",
        Unit::Count => "{pos}/{len}",
        Unit::Percent => "{percent} %",
    };
    let template = format!("{{msg:<12}} {{bar:30}} {counts}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar
}

/// A spinner for work of unknown length.
pub fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target());
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// What a bar counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, with a rate.
    Bytes,
    /// Things.
    Count,
    /// A share.
    Percent,
}

fn target() -> ProgressDrawTarget {
    match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr_with_hz(10),
        false => ProgressDrawTarget::hidden(),
    }
}

/// A line for the person at stderr; never in the way of a bar.
pub fn note(text: &str) {
    output::say(&format!("note: {text}"));
}
