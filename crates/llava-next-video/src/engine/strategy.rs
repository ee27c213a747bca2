//! Which tokens go on: the decision between two decode steps.
//!
//! A strategy looks at the scores of the running sequences and says which sequence continues with which
//! token. It owns no cache and runs no model, so it is tested with made-up scores. [`Pick`] takes or
//! draws one token a sequence; beam search is in `beam.rs`.

use std::collections::VecDeque;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::logits::{argmax, draw, process, warp};
use super::request::{Completion, FinishReason, Resolved};
use super::sequence::Sequence;
use super::stop::{StopStrings, TokenText};

/// A sequence goes on with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Continuation {
    /// Index of the running sequence.
    pub parent: usize,
    /// The token.
    pub token: u32,
}

/// One step's outcome.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// The sequences of the next step.
    pub go_on: Vec<Continuation>,
    /// Tokens that a stream may show, `(sequence, id)`.
    pub shown: Vec<(usize, u32)>,
}

/// Chooses tokens until nothing goes on.
pub(crate) trait Strategy {
    /// Decides by the scores of every running sequence, `[running][vocab]`.
    fn step(&mut self, running: &[Sequence], scores: Vec<Vec<f32>>, text: &dyn TokenText) -> Step;

    /// What came of it; `cancelled` where the caller asked to stop.
    fn finish(&mut self, running: &[Sequence], cancelled: bool) -> Vec<Completion>;
}

/// Greedy or sampled: each sequence on its own.
pub(crate) struct Pick<'a> {
    options: &'a Resolved,
    stop: StopStrings,
    /// One generator a sequence, so that a row's draws do not depend on its neighbours.
    rngs: Vec<ChaCha8Rng>,
    /// For each running sequence, its place among the completions.
    places: VecDeque<usize>,
    done: Vec<Option<Completion>>,
}

impl<'a> Pick<'a> {
    /// For `sequences` sequences, which start out all running.
    pub fn new(options: &'a Resolved, sequences: usize) -> Self {
        let rng = |i: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
            rng.set_stream((i % options.num_return_sequences) as u64);
            rng
        };
        Self {
            stop: StopStrings::new(options.stop.clone()),
            rngs: (0..sequences).map(rng).collect(),
            places: (0..sequences).collect(),
            done: vec![None; sequences],
            options,
        }
    }

    fn choose(&mut self, place: usize, sequence: &Sequence, scores: &mut [f32]) -> u32 {
        process(
            scores,
            &sequence.ids,
            sequence.new_ids().len(),
            self.options,
        );
        match &self.options.sampling {
            None => argmax(scores),
            Some(sampling) => {
                warp(scores, sampling, 1);
                draw(scores, &mut self.rngs[place])
            }
        }
    }

    fn reason(&self, ids: &[u32], text: &dyn TokenText) -> Option<FinishReason> {
        let last = ids.last()?;
        if self.options.eos_token_ids.contains(last) || self.stop.hit(ids, text) {
            return Some(FinishReason::Stop);
        }
        (ids.len() >= self.options.max_new_tokens).then_some(FinishReason::Length)
    }
}

impl Strategy for Pick<'_> {
    fn step(&mut self, running: &[Sequence], scores: Vec<Vec<f32>>, text: &dyn TokenText) -> Step {
        let mut step = Step::default();
        let places = std::mem::take(&mut self.places);
        for (parent, ((place, sequence), mut scores)) in
            places.into_iter().zip(running).zip(scores).enumerate()
        {
            let token = self.choose(place, sequence, &mut scores);
            step.shown.push((place, token));
            let ids = [sequence.new_ids(), &[token]].concat();
            match self.reason(&ids, text) {
                Some(finish_reason) => {
                    let row = sequence.row;
                    self.done[place] = Some(Completion {
                        row,
                        ids,
                        finish_reason,
                        score: None,
                    });
                }
                None => {
                    self.places.push_back(place);
                    step.go_on.push(Continuation { parent, token });
                }
            }
        }
        step
    }

    fn finish(&mut self, running: &[Sequence], _cancelled: bool) -> Vec<Completion> {
        for (place, sequence) in self.places.drain(..).zip(running) {
            self.done[place] = Some(Completion {
                row: sequence.row,
                ids: sequence.new_ids().to_vec(),
                finish_reason: FinishReason::Cancelled,
                score: None,
            });
        }
        self.done.drain(..).flatten().collect()
    }
}
