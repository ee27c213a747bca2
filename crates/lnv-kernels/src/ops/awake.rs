//! Threads that stay awake between the operations of one pass.
//!
//! Decision: a step of decoding is some fifty operations of 10 to 1000 µs. A thread of rayon's that finds
//! nothing to do goes to sleep after some µs, and to wake it takes longer than many an operation. So while
//! a pass runs, a task on each other thread looks for work and does it. It gives up after a time without
//! any, so that a pass that does one long thing alone does not burn the other cores.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// How long a thread looks for work in vain before it goes to sleep.
const PATIENCE: Duration = Duration::from_micros(500);
/// Looks between two glances at the clock.
const LOOKS: usize = 32;

thread_local! {
    /// Whether the thread works on a pass already, or stays awake for one.
    static STAYS: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a thread of the pool while the others stay awake.
pub(super) fn keep<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    // The scope is there to change threads: it does not wait for those that stay, of which one may have
    // begun another pass.
    rayon::scope(|_| {
        let _pass = Pass::begin();
        work()
    })
}

/// A pass that runs. It ends when this is dropped, also by a panic.
struct Pass {
    over: Arc<AtomicBool>,
    /// What [`STAYS`] was before.
    before: bool,
}

impl Pass {
    fn begin() -> Pass {
        // This thread must not come to wait for its own pass.
        let (over, before) = (Arc::new(AtomicBool::new(false)), STAYS.replace(true));
        if !before {
            let over = Arc::clone(&over);
            rayon::spawn_broadcast(move |_| stay(&over));
        }
        Pass { over, before }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        STAYS.set(self.before);
    }
}

/// Does what there is to do until the pass is over, or there has long been nothing.
fn stay(over: &AtomicBool) {
    if STAYS.replace(true) {
        return;
    }
    let (mut looks, mut since) = (0, Instant::now());
    while !over.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(Yield::Executed) {
            (looks, since) = (0, Instant::now());
            continue;
        }
        looks += 1;
        if looks % LOOKS == 0 {
            if since.elapsed() > PATIENCE {
                break;
            }
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
    STAYS.set(false);
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use rayon::prelude::*;

    use super::*;

    fn work() -> usize {
        (0..1000usize).into_par_iter().with_max_len(1).sum()
    }

    #[test]
    fn passes_inside_passes_and_side_by_side_come_to_an_end() {
        let nested = || keep(|| work() + keep(work));
        let threads: Vec<_> = (0..8)
            .map(|_| std::thread::spawn(move || (0..50).map(|_| nested()).sum::<usize>()))
            .collect();
        for thread in threads {
            assert_eq!(thread.join().expect("no panic"), 50 * 2 * 499_500);
        }
    }

    #[test]
    fn a_pass_that_panics_leaves_the_pool_as_it_was() {
        let panics = || keep(|| assert_eq!(work(), 0, "on purpose"));
        assert!(catch_unwind(panics).is_err());
        assert!(
            rayon::broadcast(|_| keep(|| STAYS.get()))
                .iter()
                .all(|stays| *stays)
        );
        assert_eq!(keep(work), 499_500);
    }
}
