//! Time and memory against B, side by side on logarithmic axes.

use std::ops::Range;

use ddtas_io::chart::{self, Axis, Chart, Ground, Line};

use super::Row;

const SIZE: (u32, u32) = (960, 400);

/// The figure as SVG.
///
/// # Errors
/// The plotting library's message.
pub fn plot(rows: &[Row]) -> Result<String, String> {
    let time = lines(rows, |row| Some(row.time_ms));
    let memory = lines(rows, |row| row.peak_extra_bytes.map(|bytes| bytes as f64 / 1e6));
    let panels = [panel("loss and gradient, ms", &time), panel("extra memory, MB", &memory)];
    chart::svg(&panels, SIZE, Ground::White)
}

/// A line for the rows that differ in their batch alone, in order of it.
fn lines(rows: &[Row], value: impl Fn(&Row) -> Option<f64>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in rows {
        let name = format!("{}, D = {}", row.density.as_deref().unwrap_or("file"), row.dim);
        let point = value(row).map(|value| (row.batch as f64, value));
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.extend(point),
            None => {
                let points = point.into_iter().collect();
                lines.push(Line { name, points, is_noisy: false, is_marked: true });
            }
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

fn panel<'a>(title: &'a str, lines: &'a [Line]) -> Chart<'a> {
    let of = |part: fn(&(f64, f64)) -> f64| range(lines.iter().flat_map(|line| &line.points).map(part));
    let axis = |range, label| Axis { range, is_logarithmic: true, label };
    Chart {
        title: Some(title),
        x: axis(of(|point| point.0), &|value: &f64| format!("{value:.0}")),
        x_title: Some("rows of the batch"),
        y: axis(of(|point| point.1), &chart::short_label),
        lines,
        marks: &[],
        has_legend: true,
    }
}

/// A range that holds all values with room on both sides.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) =
        values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    if low > high { 1.0..10.0 } else { low.max(1e-6) / 1.5..high.max(1e-6) * 1.5 }
}

#[cfg(test)]
mod tests {
    use super::super::ElementType;
    use super::*;

    fn row(batch: usize, peak_extra_bytes: Option<usize>) -> Row {
        Row {
            batch,
            references: None,
            dim: 8,
            dtype: ElementType::F32,
            tf32: false,
            backend: "cpu".into(),
            threads: 1,
            density: Some("late".into()),
            noise: None,
            seed: None,
            mined_share: 0.0,
            time_ms: batch as f64,
            time_best_ms: 0.0,
            time_spread_ms: 0.0,
            gflops: 1.0,
            floor_share: None,
            peak_extra_bytes,
        }
    }

    #[test]
    fn lines_have_their_points_in_order_of_the_batch() {
        let lines = lines(&[row(30, Some(1)), row(10, None), row(20, Some(3))], |row| Some(row.time_ms));
        let batches: Vec<f64> = lines[0].points.iter().map(|point| point.0).collect();
        assert_eq!((lines.len(), batches), (1, vec![10.0, 20.0, 30.0]));
    }

    #[test]
    fn one_point_and_unknown_memory_can_be_drawn() {
        let svg = plot(&[row(80, None)]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("late, D = 8"), "{svg}");
    }
}
