//! Pairs whose similarities lie at the bounds of mining or just beside them: up to a million.

use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::loss::ElementType;
use ddtas_cases::{AtBounds, check_at_bounds};

use super::device;

fn check(rows: AtBounds, seed: u64, hopper: bool) {
    check_at_bounds(rows, |budget| {
        let options = Options { budget: Some(budget), tf32: rows.tf32 };
        Box::new(DeviceBackend::new(device(seed, hopper), options))
    });
}

#[test]
fn similarities_at_the_bounds_count_alike_in_all_passes() {
    let rows = AtBounds { count: 1440, dim: 16, dtype: ElementType::F32, tf32: false, reversed: true };
    check(rows, 30, false);
    check(rows, 33, true);
    let rounded = AtBounds { tf32: true, ..rows };
    check(AtBounds { reversed: false, ..rounded }, 31, false);
    check(rounded, 32, true);
}

/// Several k blocks, and beyond 512 dimensions both operands are streamed.
fn check_wide(dtype: ElementType, hopper: bool) {
    for (count, dim, reversed) in [(300, 256, true), (200, 1024, false)] {
        check(AtBounds { count, dim, dtype, tf32: false, reversed }, 34, hopper);
    }
}

#[test]
fn similarities_of_wide_f32_rows_at_the_bounds_count_alike() {
    check_wide(ElementType::F32, false);
}

#[test]
fn similarities_of_wide_f32_rows_at_the_bounds_count_alike_on_hopper_s_kernels() {
    check_wide(ElementType::F32, true);
}

#[test]
fn similarities_of_wide_f16_rows_at_the_bounds_count_alike_on_hopper_s_kernels() {
    check_wide(ElementType::F16, true);
}

#[test]
fn similarities_of_wide_bf16_rows_at_the_bounds_count_alike_on_hopper_s_kernels() {
    check_wide(ElementType::Bf16, true);
}
