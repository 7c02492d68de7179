//! What every backend is held to: the reference cases, the table of cases, and the comparison with the truth.
//!
//! For the library's tests and `ddtas-bench verify`; not published.
#![allow(missing_docs, reason = "for this workspace's own tests")]

pub mod file;
pub mod parts;
pub mod random;
pub mod table;
pub mod verify;
