//! A bounded number of places, and waiting for one no longer than so long.
//!
//! Decision: a counting semaphore of our own, since the standard library has none. A place is given back when
//! it is dropped, wherever that is: the thread that hangs keeps its place, not the caller that gave up.

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
}
