//! Beam search as Transformers 4.53.3 does it (its vectorised `_beam_search`), row by row of the batch
//! but with its common stopping rule.
//!
//! Each step takes the best `max(2, 1 + eos ids) * beams` continuations of a row, so that enough remain
//! where some end; those that end among the best `beams` join the finished pool, the best that do not
//! end run on. The prompt is run once and its cache shared by all beams, so rows with several images
//! are right, which they are not in the reference (its pixels are repeated in the wrong order).
//! Scores are f32 and compared with the reference's constant, so that ties and near ties fall alike.

use std::sync::Arc;

use super::logits::{log_softmax, process, warp};
use super::request::{Completion, EarlyStopping, FinishReason, Resolved};
use super::sequence::Sequence;
use super::stop::{StopStrings, TokenText};
use super::strategy::{Continuation, Step, Strategy};
use crate::error::Result;

/// The reference's stand-in for minus infinity.
const NEVER: f32 = -1.0e9;

/// Beam search over a batch.
pub(crate) struct Beams {
    options: Arc<Resolved>,
    stop: StopStrings,
    rows: Vec<RowBeams>,
    /// New tokens so far.
    length: usize,
}

/// One row's beams.
struct RowBeams {
    /// Running score of each beam.
    running: Vec<f32>,
    /// The pool: the best finished sequences, or placeholders that score `NEVER`.
    pool: Vec<Finished>,
}

#[derive(Clone)]
struct Finished {
    ids: Vec<u32>,
    score: f32,
    real: bool,
    reason: FinishReason,
}

/// A continuation that is being considered.
struct Candidate {
    beam: usize,
    token: u32,
    score: f32,
    ends: Option<FinishReason>,
}

impl Beams {
    /// For `rows` rows; the engine starts with `num_beams` equal sequences a row.
    pub fn new(options: Arc<Resolved>, rows: usize) -> Self {
        let n = options.num_beams;
        let empty = Finished {
            ids: Vec::new(),
            score: NEVER,
            real: false,
            reason: FinishReason::Length,
        };
        let mut running = vec![NEVER; n];
        running[0] = 0.0;
        let row = || RowBeams {
            running: running.clone(),
            pool: vec![empty.clone(); n],
        };
        Self {
            stop: StopStrings::new(options.stop.clone()),
            rows: (0..rows).map(|_| row()).collect(),
            length: 0,
            options,
        }
    }

    /// The best continuations of one row, best first.
    fn candidates(
        &self,
        row: &RowBeams,
        beams: &[Sequence],
        scores: Vec<Vec<f32>>,
        text: &dyn TokenText,
    ) -> Vec<Candidate> {
        let options = &*self.options;
        let wanted = (1 + options.eos_token_ids.len()).max(2) * options.num_beams;
        let mut all: Vec<Candidate> = Vec::new();
        for (beam, (sequence, mut scores)) in beams.iter().zip(scores).enumerate() {
            log_softmax(&mut scores);
            process(
                &mut scores,
                &sequence.ids,
                sequence.new_ids().len(),
                options,
            );
            if let Some(sampling) = &options.sampling {
                warp(&mut scores, sampling, 1 + options.eos_token_ids.len());
            }
            let of = |(token, score): (usize, f32)| Candidate {
                beam,
                token: token as u32,
                score: score + row.running[beam],
                ends: None,
            };
            all.extend(best(scores, wanted).into_iter().map(of));
        }
        // A stable sort keeps the order of beam and token among equals.
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all.truncate(wanted);
        for candidate in &mut all {
            candidate.ends = self.reason(&beams[candidate.beam], candidate.token, text);
        }
        all
    }

    fn reason(&self, beam: &Sequence, token: u32, text: &dyn TokenText) -> Option<FinishReason> {
        if self.options.eos_token_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        if !self.options.stop.is_empty() {
            let ids = [beam.new_ids(), &[token]].concat();
            if self.stop.hit(&ids, text) {
                return Some(FinishReason::Stop);
            }
        }
        (self.length + 1 >= self.options.max_new_tokens).then_some(FinishReason::Length)
    }

    /// True where another step could still change the outcome, over the whole batch.
    fn unfinished(&self, all_end: bool) -> bool {
        let options = &*self.options;
        let never = options.early_stopping == EarlyStopping::Never && options.length_penalty > 0.0;
        let length = if never {
            options.max_new_tokens
        } else {
            self.length
        };
        let divisor = (length as f32).powf(options.length_penalty);
        let improvable = self.rows.iter().any(|row| {
            let hope = row.running[0] / divisor;
            let worst = row
                .pool
                .iter()
                .map(|f| f.score)
                .fold(f32::INFINITY, f32::min);
            row.pool
                .iter()
                .any(|f| hope > if f.real { worst } else { NEVER })
        });
        let full = self.rows.iter().all(RowBeams::is_full);
        improvable && !(full && options.early_stopping == EarlyStopping::WhenFull) && !all_end
    }
}

impl RowBeams {
    fn is_full(&self) -> bool {
        self.pool.iter().all(|f| f.real)
    }

    /// Lets the candidates that ended among the best `beams` into the pool.
    fn admit(&mut self, candidates: &[Candidate], beams: &[Sequence], options: &Resolved) {
        let closed = self.is_full() && options.early_stopping == EarlyStopping::WhenFull;
        for (rank, candidate) in candidates.iter().enumerate() {
            let beam = &beams[candidate.beam];
            let length = beam.new_ids().len() + 1;
            let mut score = candidate.score / (length as f32).powf(options.length_penalty);
            let ended = candidate.ends.filter(|_| rank < options.num_beams);
            if closed {
                score += NEVER;
            }
            if ended.is_none() {
                score += NEVER;
            }
            self.pool.push(Finished {
                ids: [beam.new_ids(), &[candidate.token]].concat(),
                score,
                real: ended.is_some(),
                reason: ended.unwrap_or(FinishReason::Length),
            });
        }
        self.pool.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.pool.truncate(options.num_beams);
    }

    /// The best that run on; those that ended only where nothing else is left.
    fn run_on(&mut self, mut candidates: Vec<Candidate>, beams: usize) -> Vec<Candidate> {
        for candidate in candidates.iter_mut().filter(|c| c.ends.is_some()) {
            candidate.score += NEVER;
        }
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        candidates.truncate(beams);
        self.running = candidates.iter().map(|c| c.score).collect();
        candidates
    }
}

impl Strategy for Beams {
    fn step(
        &mut self,
        running: &[Sequence],
        scores: Vec<Vec<f32>>,
        text: &dyn TokenText,
    ) -> Result<Step> {
        let n = self.options.num_beams;
        let mut step = Step::default();
        let mut all_end = true;
        let mut scores = scores.into_iter();
        let mut rows = std::mem::take(&mut self.rows);
        for (i, (row, beams)) in rows.iter_mut().zip(running.chunks(n)).enumerate() {
            let own: Vec<Vec<f32>> = scores.by_ref().take(n).collect();
            let candidates = self.candidates(row, beams, own, text);
            all_end &= candidates.iter().all(|c| c.ends.is_some());
            row.admit(&candidates, beams, &self.options);
            let on = row.run_on(candidates, n);
            step.go_on.extend(on.iter().map(|c| Continuation {
                parent: i * n + c.beam,
                token: c.token,
            }));
        }
        self.rows = rows;
        self.length += 1;
        if !self.unfinished(all_end) {
            step.go_on.clear();
        }
        Ok(step)
    }

    fn finish(&mut self, running: &[Sequence], cut: Option<FinishReason>) -> Vec<Completion> {
        let mut completions = Vec::new();
        for (i, row) in self.rows.iter().enumerate() {
            let best = row.pool.iter().take(self.options.num_return_sequences);
            for (rank, finished) in best.enumerate() {
                // Cut short before enough beams ended: the running ones stand in.
                let beam = running.get(i * self.options.num_beams + rank);
                let (ids, finish_reason) = match (finished.real, cut, beam) {
                    (false, Some(cut), Some(beam)) => (beam.new_ids().to_vec(), cut),
                    _ => (finished.ids.clone(), finished.reason),
                };
                completions.push(Completion {
                    row: i,
                    ids,
                    finish_reason,
                    score: Some(finished.score),
                    logprobs: Vec::new(),
                });
            }
        }
        completions
    }
}

/// The `wanted` best `(index, score)`, best first, the lower index first among equals.
fn best(scores: Vec<f32>, wanted: usize) -> Vec<(usize, f32)> {
    let mut indexed: Vec<(usize, f32)> = scores.into_iter().enumerate().collect();
    let order = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if wanted < indexed.len() {
        indexed.select_nth_unstable_by(wanted, order);
        indexed.truncate(wanted);
    }
    indexed.sort_by(order);
    indexed
}
