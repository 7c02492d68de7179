//! Reuses the memory of one step for the next.
//!
//! A training step allocates and frees the same dozens of activations of many megabytes. By default glibc
//! gets each from the kernel and returns it at once, and clearing the pages again takes a sixth of the step.

/// Makes the allocator serve large blocks from a heap that never shrinks. Does nothing without glibc; if the
/// allocator refuses, the program is only slower.
pub fn keep() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets two parameters of the allocator, and no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}
