//! The test of every backend: a float64 reference implementation (the truth), a table of cases, and a comparison.
//!
//! | file | what |
//! | --- | --- |
//! | `bounds.rs` | pairs at the bounds of mining |
//! | `case.rs` | a batch with its expected results |
//! | `expected.rs` | the truth's results, a backend's errors against them, and bounds for these |
//! | `file.rs` | the reference cases of SPEC 7, in `.safetensors` files |
//! | `table.rs` | the table: reference cases and shapes that those do not have, in every type, form and way of mining |
//! | `parts.rs` | a batch in parts, a backend each |
//! | `random.rs` | batches to draw at random |
//! | `run.rs` | a case through a backend |
//!
//! For the tests of `ddtas` and for `ddtas-bench verify`; not published.

mod bounds;
mod case;
mod expected;
mod file;
pub mod parts;
pub mod random;
mod run;
mod table;

pub use bounds::{AtBounds, check_at_bounds};
pub use case::{Case, Side, is_clear};
pub use expected::{Bounds, Expected, Report, SINGLE_PRECISION, TF32};
pub use file::{find, metadata_of, settings_of};
pub use run::{
    check_nearest, check_outputs_are_refilled, check_what_is_remembered, run, run_all, run_all_tf32,
    run_tf32, to_tf32,
};
pub use table::{
    generated, generated_case, generated_to_round, golden, golden_in, in_every_way, sparse, widths,
};
