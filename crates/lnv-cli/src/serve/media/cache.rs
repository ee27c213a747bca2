//! Kept values under a budget of bytes, and equal work that is done once.
//!
//! Decision: the least recently used goes first; a value larger than the whole budget is not kept at all, rather than
//! pushing everything else out. Work that fails is not remembered: those that wait for it at that moment hear of the
//! failure, the next one tries again. Work that everybody who waited for has left is told so, and nobody joins it then.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Instant;

use super::{MediaError, MediaErrorKind, held};

/// Values under a budget.
pub(super) struct Budgeted<K, V> {
    budget: u64,
    bytes: u64,
    clock: u64,
    values: HashMap<K, (u64, u64, V)>,
    by_use: BTreeMap<u64, K>,
}

impl<K: Eq + Hash + Clone, V: Clone> Budgeted<K, V> {
    /// Nothing yet, and room for `budget` bytes.
    pub(super) fn new(budget: u64) -> Self {
        Self {
            budget,
            bytes: 0,
            clock: 0,
            values: HashMap::new(),
            by_use: BTreeMap::new(),
        }
    }

    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The value of `key`, which counts as a use.
    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        self.clock += 1;
        let (used, _, value) = self.values.get_mut(key)?;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, key.clone());
        Some(value.clone())
    }

    /// Keeps `value`, which takes `bytes`.
    pub(super) fn insert(&mut self, key: K, value: V, bytes: u64) {
        self.remove(&key);
        if bytes > self.budget {
            return;
        }
        while self.bytes + bytes > self.budget {
            let Some((_, oldest)) = self.by_use.pop_first() else {
                break;
            };
            self.remove(&oldest);
        }
        self.clock += 1;
        self.bytes += bytes;
        self.by_use.insert(self.clock, key.clone());
        self.values.insert(key, (self.clock, bytes, value));
    }

    /// Keeps the value of `key` no longer.
    pub(super) fn remove(&mut self, key: &K) {
        if let Some((used, bytes, _)) = self.values.remove(key) {
            self.by_use.remove(&used);
            self.bytes -= bytes;
        }
    }
}

/// Work on its way, by its key.
pub(super) struct Flights<K, V>(Mutex<HashMap<K, Arc<Flight<V>>>>);

/// Whoever wants something; gone when the other side drops it.
pub(super) type Asker = Weak<()>;

struct Flight<V> {
    /// Those who want it.
    askers: Mutex<Vec<Asker>>,
    landed: Mutex<Option<Result<V, MediaError>>>,
    news: Condvar,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Flights<K, V> {
    /// Does `work`, or waits until `deadline` for the one who does it already. The work can ask whether it was
    /// abandoned: whether all who came for it are gone.
    pub(super) fn run(
        &self,
        key: K,
        deadline: Instant,
        asker: &Asker,
        work: impl FnOnce(&dyn Fn() -> bool) -> Result<V, MediaError>,
    ) -> Result<V, MediaError> {
        let (flight, leads) = {
            let mut flights = held(&self.0);
            match flights.get(&key) {
                Some(flight) => {
                    held(&flight.askers).push(Weak::clone(asker));
                    (Arc::clone(flight), false)
                }
                None => {
                    let flight = Arc::new(Flight {
                        askers: Mutex::new(vec![Weak::clone(asker)]),
                        landed: Mutex::new(None),
                        news: Condvar::new(),
                    });
                    flights.insert(key.clone(), Arc::clone(&flight));
                    (flight, true)
                }
            }
        };
        if !leads {
            return flight.wait(deadline);
        }
        let mut landing = Landing {
            flights: self,
            key,
            flight,
            result: None,
        };
        let result = work(&|| landing.is_abandoned());
        landing.result = Some(result.clone());
        result
    }
}

impl<V: Clone> Flight<V> {
    fn wait(&self, deadline: Instant) -> Result<V, MediaError> {
        let mut landed = held(&self.landed);
        loop {
            if let Some(result) = landed.as_ref() {
                return result.clone();
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let message = "another request reads the same source and takes too long: try again";
                return Err(MediaError::new(MediaErrorKind::Timeout, message.into()));
            };
            let waited = self.news.wait_timeout(landed, left);
            landed = waited.unwrap_or_else(|cause| cause.into_inner()).0;
        }
    }
}

/// Tells the waiting ones, even where the work panics.
struct Landing<'a, K: Eq + Hash, V> {
    flights: &'a Flights<K, V>,
    key: K,
    flight: Arc<Flight<V>>,
    result: Option<Result<V, MediaError>>,
}

impl<K: Eq + Hash, V> Landing<'_, K, V> {
    /// Whether everybody is gone; if so, whoever comes next begins anew.
    fn is_abandoned(&self) -> bool {
        let mut flights = held(&self.flights.0);
        let is_gone = |asker: &Asker| asker.strong_count() == 0;
        let abandoned = held(&self.flight.askers).iter().all(is_gone);
        if abandoned {
            self.leave(&mut flights);
        }
        abandoned
    }

    /// Takes this flight, and no other, off the board.
    fn leave(&self, flights: &mut HashMap<K, Arc<Flight<V>>>) {
        let is_own = |flight: &Arc<Flight<V>>| Arc::ptr_eq(flight, &self.flight);
        if flights.get(&self.key).is_some_and(is_own) {
            flights.remove(&self.key);
        }
    }
}

impl<K: Eq + Hash, V> Drop for Landing<'_, K, V> {
    fn drop(&mut self) {
        self.leave(&mut held(&self.flights.0));
        let result = self.result.take().unwrap_or_else(|| {
            let message = "reading the source ended unexpectedly: try again";
            Err(MediaError::new(MediaErrorKind::Busy, message.into()))
        });
        *held(&self.flight.landed) = Some(result);
        self.flight.news.notify_all();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut kept = Budgeted::new(10);
        kept.insert("a", 1, 4);
        kept.insert("b", 2, 4);
        assert_eq!(kept.get(&"a"), Some(1));
        kept.insert("c", 3, 4);
        assert_eq!((kept.get(&"b"), kept.bytes()), (None, 8));
        kept.insert("huge", 4, 11);
        assert_eq!((kept.get(&"huge"), kept.bytes()), (None, 8));
        // The same key again counts once.
        kept.insert("a", 5, 6);
        assert_eq!(
            (kept.get(&"a"), kept.get(&"c"), kept.bytes()),
            (Some(5), Some(3), 10)
        );
        kept.insert("d", 6, 10);
        assert_eq!(
            (kept.get(&"a"), kept.get(&"c"), kept.bytes()),
            (None, None, 10)
        );
        assert_eq!(kept.by_use.len(), kept.values.len());
    }

    #[test]
    fn equal_work_is_done_once_and_failures_are_not_remembered() {
        let flights = Flights::<&str, usize>::default();
        let (done, start) = (AtomicUsize::new(0), Barrier::new(8));
        let late = Instant::now() + Duration::from_secs(20);
        let asker = Arc::new(());
        let fly = |fails: bool| {
            start.wait();
            flights.run("key", late, &Arc::downgrade(&asker), |_| {
                std::thread::sleep(Duration::from_millis(200));
                let count = done.fetch_add(1, Ordering::SeqCst);
                match fails {
                    true => Err(MediaError::new(MediaErrorKind::Invalid, "no".into())),
                    false => Ok(count),
                }
            })
        };
        let fly = &fly;
        let all = |fails| {
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(move || fly(fails))).collect();
                let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
                threads.into_iter().map(join).collect::<Vec<_>>()
            })
        };
        assert!(all(true).iter().all(Result::is_err));
        assert_eq!(done.load(Ordering::SeqCst), 1);
        assert!(all(false).iter().all(|result| *result == Ok(1)));
        assert_eq!(done.load(Ordering::SeqCst), 2);
        assert!(held(&flights.0).is_empty());
    }

    #[test]
    fn a_panic_wakes_those_who_wait() {
        let flights = Arc::new(Flights::<u8, ()>::default());
        let late = Instant::now() + Duration::from_secs(20);
        let (own, inside) = (Arc::clone(&flights), Arc::new(Barrier::new(2)));
        let at = Arc::clone(&inside);
        let panics = std::thread::spawn(move || {
            own.run(0, late, &Weak::new(), |_| {
                at.wait();
                std::thread::sleep(Duration::from_millis(50));
                panic!("on purpose")
            })
        });
        inside.wait();
        let error = flights.run(0, late, &Weak::new(), |_| Ok(())).unwrap_err();
        assert_eq!(error.kind, MediaErrorKind::Busy);
        assert!(panics.join().is_err());
        let soon = Instant::now();
        assert!(flights.run(0, soon, &Weak::new(), |_| Ok(())).is_ok());
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_told_so_and_begun_anew() {
        let flights = Flights::<u8, usize>::default();
        let late = Instant::now() + Duration::from_secs(20);
        let (first, second) = (Arc::new(()), Arc::new(()));
        let again = Arc::new(());
        let askers = [&first, &second, &again].map(Arc::downgrade);
        let [of_first, of_second, of_again] = &askers;
        let flights = &flights;
        std::thread::scope(|scope| {
            let result = flights.run(0, late, of_first, |abandoned| {
                assert!(!abandoned());
                scope.spawn(move || flights.run(0, late, of_second, |_| Ok(9)));
                while held(&held(&flights.0)[&0].askers).len() < 2 {
                    std::thread::yield_now();
                }
                drop(first);
                // One is left.
                assert!(!abandoned());
                drop(second);
                assert!(abandoned());
                let other = flights.run(0, late, of_again, |_| Ok(2));
                assert_eq!(other, Ok(2));
                Ok(1)
            });
            assert_eq!(result, Ok(1));
        });
        assert!(held(&flights.0).is_empty());
    }
}
