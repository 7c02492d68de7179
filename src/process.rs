//! Values that a forked child must not share with its parent.
//!
//! A child has a copy of every object and none of the parent's other threads: a thread pool has no threads
//! left, a lock that another thread held is never released, and the data it guards may be half-written.
//! Values with threads or locks are therefore created anew in every process.

use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A value that every process creates for itself.
///
/// It uses no lock, which another thread could hold at the fork. A child leaks its parent's value: dropping
/// it could wait for threads that the child does not have.
#[derive(Debug)]
pub struct PerProcess<T> {
    current: AtomicPtr<Made<T>>,
    /// Makes `Self` Send and Sync only if `T` is.
    owns: PhantomData<T>,
}

#[derive(Debug)]
struct Made<T> {
    process: u32,
    value: T,
}

impl<T> Made<T> {
    fn here(value: T) -> *mut Self {
        Box::into_raw(Box::new(Self { process: std::process::id(), value }))
    }
}

impl<T: Send + Sync> PerProcess<T> {
    /// Creates it without a value.
    #[must_use]
    pub const fn empty() -> Self {
        Self { current: AtomicPtr::new(null_mut()), owns: PhantomData }
    }

    /// Creates it with this process's value.
    pub fn new(value: T) -> Self {
        Self { current: AtomicPtr::new(Made::here(value)), owns: PhantomData }
    }

    /// This process's value, made now if it has none.
    ///
    /// # Errors
    /// The error of `make`.
    pub fn get_or_make<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<&T, E> {
        let found = self.current.load(Ordering::Acquire);
        if let Some(value) = self.of_this_process(found) {
            return Ok(value);
        }
        let mine = Made::here(make()?);
        match self.current.compare_exchange(found, mine, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: `mine` is from a Box; only `drop` frees it, which cannot run during this borrow.
            Ok(_) => Ok(&unsafe { &*mine }.value),
            Err(other) => {
                // SAFETY: no other thread has seen `mine`.
                drop(unsafe { Box::from_raw(mine) });
                // SAFETY: another thread of this process has stored `other`; the pointer is never null again.
                Ok(&unsafe { &*other }.value)
            }
        }
    }

    fn of_this_process(&self, made: *mut Made<T>) -> Option<&T> {
        // SAFETY: null or from a Box. A value is replaced only in a process that did not create it, and is
        // then leaked.
        let made = unsafe { made.as_ref() }?;
        (made.process == std::process::id()).then_some(&made.value)
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let made = *self.current.get_mut();
        // SAFETY: as in `of_this_process`; `self` is not borrowed.
        if unsafe { made.as_ref() }.is_some_and(|made| made.process == std::process::id()) {
            // SAFETY: from a Box, and no reference to it is left.
            drop(unsafe { Box::from_raw(made) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn threads_that_ask_at_once_get_the_same_value_and_the_others_are_dropped() {
        let (made, kept) = (AtomicUsize::new(0), Arc::new(()));
        let value = PerProcess::empty();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let got = value.get_or_make(|| {
                        made.fetch_add(1, Ordering::Relaxed);
                        Ok::<_, Infallible>(kept.clone())
                    });
                    assert!(Arc::ptr_eq(got.unwrap(), &kept));
                });
            }
        });
        assert!(made.into_inner() >= 1);
        assert_eq!(Arc::strong_count(&kept), 2, "one value is left");
        drop(value);
        assert_eq!(Arc::strong_count(&kept), 1);
    }

    #[test]
    fn a_value_that_could_not_be_made_is_asked_for_again() {
        let value = PerProcess::<u8>::empty();
        assert_eq!(value.get_or_make(|| Err("not yet")), Err("not yet"));
        assert_eq!(value.get_or_make(|| Ok::<_, &str>(7)), Ok(&7));
        assert_eq!(value.get_or_make(|| Err("too late")), Ok(&7));
    }
}
