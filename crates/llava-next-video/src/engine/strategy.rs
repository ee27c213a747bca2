//! Which tokens go on: the decision between two decode steps.
//!
//! A strategy looks at the scores of the running sequences and says which sequence continues with which
//! token. It owns no cache and runs no model, so it is tested with made-up scores. [`Pick`] takes or
//! draws one token a sequence; beam search is in `beam.rs`.

use std::collections::VecDeque;
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::constraint::{Constraint, Constraints};
use super::logits::{argmax, draw, process, warp};
use super::request::{Completion, FinishReason, Resolved, TokenLogprob};
use super::sequence::Sequence;
use super::stop::{StopStrings, TokenText};
use crate::error::Result;

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
    /// Tokens that a stream may show.
    pub shown: Vec<Shown>,
}

/// A token that is certain.
#[derive(Debug, PartialEq)]
pub(crate) struct Shown {
    /// Index of its sequence among the completions.
    pub place: usize,
    /// The token.
    pub id: u32,
    /// How likely it was, where asked for.
    pub logprob: Option<TokenLogprob>,
}

/// Chooses tokens until nothing goes on.
pub(crate) trait Strategy {
    /// Decides by the scores of every running sequence, `[running][vocab]`.
    ///
    /// # Errors
    /// A constraint cannot go on.
    fn step(
        &mut self,
        running: &[Sequence],
        scores: Vec<Vec<f32>>,
        text: &dyn TokenText,
    ) -> Result<Step>;

    /// What came of it; `cut` is why those that still run end, where they were cut short.
    fn finish(&mut self, running: &[Sequence], cut: Option<FinishReason>) -> Vec<Completion>;
}

/// Greedy or sampled: each sequence on its own.
pub(crate) struct Pick {
    options: Arc<Resolved>,
    stop: StopStrings,
    /// For each running sequence, its answer.
    running: VecDeque<Answer>,
    done: Vec<Option<Completion>>,
}

/// One answer on its way.
struct Answer {
    /// Its place among the completions.
    place: usize,
    /// Its own generator, so that its draws do not depend on its neighbours.
    rng: ChaCha8Rng,
    constraint: Option<Box<dyn Constraint>>,
    logprobs: Vec<TokenLogprob>,
}

impl Pick {
    /// For `sequences` sequences, which start out all running.
    pub fn new(
        options: Arc<Resolved>,
        sequences: usize,
        constraints: Option<&dyn Constraints>,
    ) -> Self {
        let answer = |place: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
            rng.set_stream((place % options.num_return_sequences) as u64);
            Answer {
                place,
                rng,
                constraint: constraints.map(Constraints::begin),
                logprobs: Vec::new(),
            }
        };
        Self {
            stop: StopStrings::new(options.stop.clone()),
            running: (0..sequences).map(answer).collect(),
            done: (0..sequences).map(|_| None).collect(),
            options,
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

impl Answer {
    fn choose(
        &mut self,
        options: &Resolved,
        sequence: &Sequence,
        mut scores: Vec<f32>,
    ) -> Result<Shown> {
        let raw = options.logprobs.map(|top| (top, scores.clone()));
        process(
            &mut scores,
            &sequence.ids,
            sequence.new_ids().len(),
            options,
        );
        if let Some(constraint) = &mut self.constraint {
            constraint.restrict(&mut scores)?;
        }
        let id = match &options.sampling {
            None => argmax(&scores),
            Some(sampling) => {
                warp(&mut scores, sampling, 1);
                draw(&scores, &mut self.rng)
            }
        };
        if let Some(constraint) = &mut self.constraint
            && !options.eos_token_ids.contains(&id)
        {
            constraint.accept(id)?;
        }
        let logprob = raw.map(|(top, scores)| TokenLogprob::new(scores, id, top));
        self.logprobs.extend(logprob.clone());
        Ok(Shown {
            place: self.place,
            id,
            logprob,
        })
    }

    fn complete(self, row: usize, ids: Vec<u32>, finish_reason: FinishReason) -> Completion {
        Completion {
            row,
            ids,
            finish_reason,
            score: None,
            logprobs: self.logprobs,
        }
    }
}

impl Strategy for Pick {
    fn step(
        &mut self,
        running: &[Sequence],
        scores: Vec<Vec<f32>>,
        text: &dyn TokenText,
    ) -> Result<Step> {
        let mut step = Step::default();
        let options = Arc::clone(&self.options);
        let answers = std::mem::take(&mut self.running);
        for (parent, ((mut answer, sequence), scores)) in
            answers.into_iter().zip(running).zip(scores).enumerate()
        {
            let shown = answer.choose(&options, sequence, scores)?;
            let token = shown.id;
            step.shown.push(shown);
            let ids = [sequence.new_ids(), &[token]].concat();
            match self.reason(&ids, text) {
                Some(reason) => {
                    let place = answer.place;
                    self.done[place] = Some(answer.complete(sequence.row, ids, reason));
                }
                None => {
                    self.running.push_back(answer);
                    step.go_on.push(Continuation { parent, token });
                }
            }
        }
        Ok(step)
    }

    fn finish(&mut self, running: &[Sequence], cut: Option<FinishReason>) -> Vec<Completion> {
        let reason = cut.unwrap_or(FinishReason::Cancelled);
        for (answer, sequence) in self.running.drain(..).zip(running) {
            let (place, ids) = (answer.place, sequence.new_ids().to_vec());
            self.done[place] = Some(answer.complete(sequence.row, ids, reason));
        }
        self.done.drain(..).flatten().collect()
    }
}
