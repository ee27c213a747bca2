//! Logits processors, in the order that Transformers applies them, and the draw.
//!
//! Each is a function over one row of scores. Dropped tokens score minus infinity.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::request::{Resolved, Sampling};

/// Applies the processors that come before sampling: repetition penalty, n-gram ban, minimum length.
pub(crate) fn process(scores: &mut [f32], ids: &[u32], new_tokens: usize, options: &Resolved) {
    if options.repetition_penalty != 1.0 {
        repetition_penalty(scores, ids, options.repetition_penalty);
    }
    if options.no_repeat_ngram_size > 0 {
        no_repeat_ngram(scores, ids, options.no_repeat_ngram_size);
    }
    if new_tokens < options.min_new_tokens {
        for id in &options.eos_token_ids {
            if let Some(score) = scores.get_mut(*id as usize) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

/// Divides positive scores of ids already in the row by `penalty`, multiplies negative ones, once an id
/// (`RepetitionPenaltyLogitsProcessor`). Prompt and placeholder ids count.
pub fn repetition_penalty(scores: &mut [f32], ids: &[u32], penalty: f32) {
    let mut seen: Vec<u32> = ids.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = if *score < 0.0 {
                *score * penalty
            } else {
                *score / penalty
            };
        }
    }
}

/// Bans every id that would complete an n-gram already in the row (`NoRepeatNGramLogitsProcessor`).
pub fn no_repeat_ngram(scores: &mut [f32], ids: &[u32], n: usize) {
    if ids.len() + 1 < n {
        return;
    }
    let last = &ids[ids.len() + 1 - n..];
    for gram in ids.windows(n) {
        if gram[..n - 1] == *last
            && let Some(score) = scores.get_mut(gram[n - 1] as usize)
        {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Applies temperature, top-k, top-p and min-p, in this order. `keep` is how many tokens must survive:
/// 1, or with beams the number of end-of-sequence ids plus one.
pub fn warp(scores: &mut [f32], sampling: &Sampling, keep: usize) {
    if sampling.temperature != 1.0 {
        // A tiny temperature would push the best score past the largest float, and every probability
        // with it; seen from the best score the distribution is the same and stays finite.
        let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if best.is_finite() && !(best / sampling.temperature).is_finite() {
            scores.iter_mut().for_each(|s| *s -= best);
        }
        scores.iter_mut().for_each(|s| *s /= sampling.temperature);
    }
    if sampling.top_k > 0 {
        top_k(scores, sampling.top_k.max(keep));
    }
    if sampling.top_p < 1.0 {
        top_p(scores, sampling.top_p, keep);
    }
    if sampling.min_p > 0.0 {
        min_p(scores, sampling.min_p, keep);
    }
}

/// Drops scores below the k-th best; ties stay (`TopKLogitsWarper`).
fn top_k(scores: &mut [f32], k: usize) {
    if k >= scores.len() {
        return;
    }
    let mut sorted = scores.to_vec();
    let (_, kth, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let kth = *kth;
    scores
        .iter_mut()
        .filter(|s| **s < kth)
        .for_each(|s| *s = f32::NEG_INFINITY);
}

/// Drops the tail whose probabilities, from the least likely up, sum to at most `1 - p`
/// (`TopPLogitsWarper`).
fn top_p(scores: &mut [f32], p: f32, keep: usize) {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let probabilities = softmax(scores);
    let mut sum = 0.0;
    let droppable = scores.len().saturating_sub(keep);
    for index in &order[..droppable] {
        sum += probabilities[*index];
        if sum > 1.0 - p {
            break;
        }
        scores[*index] = f32::NEG_INFINITY;
    }
}

/// Drops tokens less likely than `p` times the likeliest (`MinPLogitsWarper`).
fn min_p(scores: &mut [f32], p: f32, keep: usize) {
    let probabilities = softmax(scores);
    let top = probabilities.iter().copied().fold(0.0, f32::max);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    for index in order.into_iter().skip(keep) {
        if probabilities[index] < p * top {
            scores[index] = f32::NEG_INFINITY;
        }
    }
}

/// Probabilities of a row.
fn softmax(scores: &[f32]) -> Vec<f32> {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = scores.iter().map(|s| (s - top).exp()).collect();
    let sum: f32 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

/// Log probabilities of a row, in place.
pub(crate) fn log_softmax(scores: &mut [f32]) {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = scores.iter().map(|s| (s - top).exp()).sum();
    let log = sum.ln();
    scores.iter_mut().for_each(|s| *s = (*s - top) - log);
}

/// The best id; the lowest among equals, as torch's argmax on a CPU.
pub fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (i, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = i;
        }
    }
    best as u32
}

/// Draws an id by the scores' softmax.
pub(crate) fn draw(scores: &[f32], rng: &mut ChaCha8Rng) -> u32 {
    let probabilities = softmax(scores);
    let mut left = rng.random::<f64>();
    let mut last = argmax(scores);
    for (i, p) in probabilities.iter().enumerate() {
        if *p > 0.0 {
            last = i as u32;
            left -= *p as f64;
            if left < 0.0 {
                break;
            }
        }
    }
    last
}
