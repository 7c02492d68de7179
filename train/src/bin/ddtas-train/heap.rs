//! Keeps the memory of one step for the next.
//!
//! A training step takes and gives back the same dozens of activations of many megabytes. By default glibc asks the
//! kernel for each and returns it at once, and clearing the pages anew takes a sixth of the step.

/// Tells the allocator to serve large blocks from a heap that never shrinks. A hint: elsewhere than on glibc nothing
/// happens, and if the allocator declines, the program is only slower.
pub fn keep() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets two numbers of the allocator; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}
