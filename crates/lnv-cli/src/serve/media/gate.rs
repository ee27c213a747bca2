//! A bounded number of places, and waiting for one no longer than so long.
//!
//! Decision: a counting semaphore of our own, since the standard library has none. A place is given back when
//! it is dropped, wherever that is: the thread that hangs keeps its place, not the caller that gave up. Bytes are given
//! out in the order of asking, so that a large decode is not passed by small ones for ever.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::held;

/// The places.
pub(in crate::serve) struct Gate {
    most: usize,
    taken: Mutex<usize>,
    freed: Condvar,
}

/// One place, until dropped.
pub(in crate::serve) struct Place(Arc<Gate>);

impl Gate {
    /// A gate with `most` places, at least one.
    pub(in crate::serve) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most: most.max(1),
            taken: Mutex::new(0),
            freed: Condvar::new(),
        })
    }

    /// Places that are taken now.
    pub(super) fn taken(&self) -> usize {
        *held(&self.taken)
    }

    /// Waits for a place; `None` once `deadline` is over.
    pub(in crate::serve) fn enter(self: &Arc<Self>, deadline: Instant) -> Option<Place> {
        let mut taken = held(&self.taken);
        while *taken >= self.most {
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.freed.wait_timeout(taken, left);
            taken = waited.unwrap_or_else(|cause| cause.into_inner()).0;
        }
        *taken += 1;
        Some(Place(Arc::clone(self)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *held(&self.0.taken) -= 1;
        self.0.freed.notify_one();
    }
}

/// Bytes that may be held at once.
pub(super) struct Budget {
    most: u64,
    line: Mutex<Line>,
    freed: Condvar,
}

#[derive(Default)]
struct Line {
    taken: u64,
    waiting: VecDeque<u64>,
    next: u64,
}

/// Some of the bytes, until dropped.
pub(super) struct Room {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    /// A budget of `most` bytes.
    pub(super) fn new(most: u64) -> Arc<Self> {
        Arc::new(Self {
            most,
            line: Mutex::default(),
            freed: Condvar::new(),
        })
    }

    /// Bytes that are held now.
    pub(super) fn taken(&self) -> u64 {
        held(&self.line).taken
    }

    /// Waits for `bytes`, or for all there are where that is less; `None` once `deadline` is over. Whoever holds
    /// some must not wait for more.
    pub(super) fn take(self: &Arc<Self>, bytes: u64, deadline: Instant) -> Option<Room> {
        let bytes = bytes.min(self.most);
        let mut line = held(&self.line);
        let own = line.next;
        line.next += 1;
        line.waiting.push_back(own);
        loop {
            if line.waiting.front() == Some(&own) && line.taken + bytes <= self.most {
                line.waiting.pop_front();
                line.taken += bytes;
                // There may be room for the next one too.
                self.freed.notify_all();
                return Some(Room {
                    budget: Arc::clone(self),
                    bytes,
                });
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                line.waiting.retain(|other| *other != own);
                self.freed.notify_all();
                return None;
            };
            let waited = self.freed.wait_timeout(line, left);
            line = waited.unwrap_or_else(|cause| cause.into_inner()).0;
        }
    }
}

impl Room {
    /// How much it is.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives back what is more than `bytes`.
    pub(super) fn shrink(&mut self, bytes: u64) {
        let more = self.bytes.saturating_sub(bytes);
        self.bytes -= more;
        held(&self.budget.line).taken -= more;
        self.budget.freed.notify_all();
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn places_are_bounded_and_waiting_ends() {
        let gate = Gate::new(1);
        let soon = || Instant::now() + Duration::from_millis(20);
        let place = gate.enter(soon());
        assert!(place.is_some());
        assert!(gate.enter(soon()).is_none());
        let other = Arc::clone(&gate);
        let late = Instant::now() + Duration::from_secs(20);
        let waits = std::thread::spawn(move || other.enter(late).is_some());
        std::thread::sleep(Duration::from_millis(20));
        drop(place);
        assert!(waits.join().is_ok_and(|entered| entered));
        assert_eq!(gate.taken(), 0);
    }

    #[test]
    fn bytes_are_given_out_in_the_order_of_asking() {
        let budget = Budget::new(10);
        let late = || Instant::now() + Duration::from_secs(20);
        let mut first = budget.take(8, late());
        assert!(budget.take(3, Instant::now()).is_none());
        let wait = |bytes| {
            let own = Arc::clone(&budget);
            std::thread::spawn(move || own.take(bytes, late()).map(|_room| Instant::now()))
        };
        let large = wait(9);
        while held(&budget.line).waiting.is_empty() {
            std::thread::yield_now();
        }
        // It would fit, but another was there before.
        assert!(budget.take(2, Instant::now()).is_none());
        let small = wait(2);
        if let Some(first) = &mut first {
            first.shrink(2);
        }
        assert_eq!(budget.taken(), 2);
        drop(first);
        let (large, small) = (large.join().ok().flatten(), small.join().ok().flatten());
        assert!(large.is_some() && large <= small);
        // More than there is runs alone.
        assert!(budget.take(1000, Instant::now()).is_some());
        assert_eq!(budget.taken(), 0);
    }
}
