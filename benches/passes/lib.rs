//! Empty; the benches of the CPU backend's passes are in `passes.rs`.
