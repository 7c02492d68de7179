//! Time and memory against B, side by side on logarithmic axes.

use std::ops::Range;

use plotters::prelude::*;

use super::Row;

const SIZE: (u32, u32) = (960, 400);

/// Told apart on white by those who see fewer colours, too.
const COLOURS: [RGBColor; 6] = [
    RGBColor(59, 130, 246),
    RGBColor(234, 118, 40),
    RGBColor(34, 160, 84),
    RGBColor(168, 85, 247),
    RGBColor(200, 60, 60),
    RGBColor(90, 90, 90),
];

/// Rows that differ in their batch alone.
struct Line {
    name: String,
    /// B, milliseconds, megabytes.
    points: Vec<(f64, f64, Option<f64>)>,
}

/// The figure as SVG.
///
/// # Errors
/// What the plotting library says.
pub fn plot(rows: &[Row]) -> std::result::Result<String, String> {
    draw(rows).map_err(|error| format!("cannot draw the plot: {error}"))
}

fn lines(rows: &[Row]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in rows {
        let name = format!("{}, D = {}", row.density.as_deref().unwrap_or("file"), row.dim);
        let point = (row.batch as f64, row.time_ms, row.peak_extra_bytes.map(|bytes| bytes as f64 / 1e6));
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name, points: vec![point] }),
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

fn draw(rows: &[Row]) -> std::result::Result<String, Box<dyn std::error::Error>> {
    let lines = lines(rows);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let halves = area.split_evenly((1, 2));
        let time = |line: &Line| line.points.iter().map(|p| (p.0, p.1)).collect();
        let memory = |line: &Line| line.points.iter().filter_map(|p| p.2.map(|bytes| (p.0, bytes))).collect();
        panel(&halves[0], "loss and gradient, ms", &lines, &time)?;
        panel(&halves[1], "extra memory, MB", &lines, &memory)?;
        area.present()?;
    }
    Ok(svg)
}

type Points = Vec<(f64, f64)>;

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    lines: &[Line],
    points: &dyn Fn(&Line) -> Points,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let all: Points = lines.iter().flat_map(points).collect();
    let (x, y) = (range(all.iter().map(|p| p.0)), range(all.iter().map(|p| p.1)));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(56)
        .build_cartesian_2d(x.log_scale(), y.log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("rows of the batch")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| format!("{value}"))
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS.into_iter().cycle()) {
        let points = points(line);
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(TRANSPARENT)
        .draw()?;
    Ok(())
}

/// From below the least to above the most; a single value has room on both sides.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) =
        values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    if low > high { 1.0..10.0 } else { low.max(1e-6) / 1.5..high.max(1e-6) * 1.5 }
}

#[cfg(test)]
mod tests {
    use super::super::Dtype;
    use super::*;

    fn row(batch: usize, peak_extra_bytes: Option<usize>) -> Row {
        Row {
            batch,
            references: None,
            dim: 8,
            dtype: Dtype::F32,
            tf32: false,
            backend: "cpu".into(),
            threads: 1,
            density: Some("late".into()),
            noise: None,
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
        let lines = lines(&[row(30, Some(1)), row(10, None), row(20, Some(3))]);
        let batches: Vec<f64> = lines[0].points.iter().map(|point| point.0).collect();
        assert_eq!((lines.len(), batches), (1, vec![10.0, 20.0, 30.0]));
    }

    #[test]
    fn one_point_and_unknown_memory_can_be_drawn() {
        let svg = plot(&[row(80, None)]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("late, D = 8"), "{svg}");
    }
}
