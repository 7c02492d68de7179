//! Where the passes of the CPU backend are timed: `passes.rs`.
