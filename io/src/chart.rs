//! Line charts as SVG.

use std::ops::Range;

use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

/// Told apart on white and on black, by those who see fewer colours, too.
const COLOURS: [RGBColor; 6] = [
    RGBColor(59, 130, 246),
    RGBColor(234, 118, 40),
    RGBColor(34, 160, 84),
    RGBColor(168, 85, 247),
    RGBColor(200, 60, 60),
    RGBColor(90, 90, 90),
];

/// Points that a line without marks has at most; more are averaged in groups, to keep the file small.
const MOST_POINTS: usize = 300;

/// plotters writes fixed colours; these two stand for the page's own and are replaced afterwards.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(4, 5, 6);

/// A line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What the legend says.
    pub name: String,
    /// In order of x.
    pub points: Vec<(f64, f64)>,
    /// Drawn faint, with a running mean over it.
    pub is_noisy: bool,
    /// Each point is marked, and none averaged.
    pub is_marked: bool,
}

/// An axis.
pub struct Axis<'a> {
    /// From its first to its last value; above 0 where it is logarithmic.
    pub range: Range<f64>,
    /// Whether equal steps are equal factors.
    pub is_logarithmic: bool,
    /// The text at a tick.
    pub label: &'a dyn Fn(&f64) -> String,
}

/// A chart.
pub struct Chart<'a> {
    /// Above it.
    pub title: Option<&'a str>,
    /// Across. Logarithmic only together with `y`.
    pub x: Axis<'a>,
    /// Below the x axis.
    pub x_title: Option<&'a str>,
    /// Upwards.
    pub y: Axis<'a>,
    /// The lines, in order of their colours.
    pub lines: &'a [Line],
    /// Whether names stand within it.
    pub has_legend: bool,
}

/// What a figure stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// A file of its own: white, at its full size.
    White,
    /// An HTML page, whose text colour, `--grid` and width it takes.
    Page,
}

/// Charts side by side, `size` pixels in all.
///
/// # Errors
/// What the plotting library says.
pub fn svg(charts: &[Chart<'_>], size: (u32, u32), ground: Ground) -> Result<String, String> {
    draw(charts, size, ground).map_err(|error| format!("cannot draw the chart: {error}"))
}

/// The colour of a line by its number, for CSS.
#[must_use]
pub fn css(line: usize) -> String {
    let RGBColor(red, green, blue) = COLOURS[line % COLOURS.len()];
    format!("#{red:02x}{green:02x}{blue:02x}")
}

type Failure = Box<dyn std::error::Error>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Context<'a, X, Y> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>;

fn draw(charts: &[Chart<'_>], size: (u32, u32), ground: Ground) -> Result<String, Failure> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        if ground == Ground::White {
            area.fill(&WHITE)?;
        }
        for (chart, area) in charts.iter().zip(area.split_evenly((1, charts.len()))) {
            panel(&area, chart)?;
        }
        area.present()?;
    }
    Ok(match ground {
        Ground::White => svg.replace("#010203", "#000000").replace("#040506", "#D0D0D0"),
        Ground::Page => {
            let fixed = format!("width=\"{}\" height=\"{}\" ", size.0, size.1);
            svg.replace("#010203", "currentColor").replace("#040506", "var(--grid)").replacen(&fixed, "", 1)
        }
    })
}

fn panel<'a>(area: &Area<'a>, chart: &Chart<'_>) -> Result<(), Failure> {
    let mut builder = ChartBuilder::on(area);
    builder.margin_top(8).margin_right(14).x_label_area_size(26).y_label_area_size(52);
    if let Some(title) = chart.title {
        builder.caption(title, ("sans-serif", 15).into_font().color(&INK));
    }
    if chart.x_title.is_some() {
        builder.x_label_area_size(38).margin_bottom(6);
    }
    let (x, y) = (chart.x.range.clone(), chart.y.range.clone());
    match (chart.x.is_logarithmic, chart.y.is_logarithmic) {
        (true, _) => lines_on(&mut builder.build_cartesian_2d(x.log_scale(), y.log_scale())?, chart),
        (false, true) => lines_on(&mut builder.build_cartesian_2d(x, y.log_scale())?, chart),
        (false, false) => lines_on(&mut builder.build_cartesian_2d(x, y)?, chart),
    }
}

fn lines_on<'a, X, Y>(context: &mut Context<'a, X, Y>, chart: &Chart<'_>) -> Result<(), Failure>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let text = ("sans-serif", 12).into_font().color(&INK);
    context
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(text.clone())
        .axis_desc_style(text.clone())
        .x_desc(chart.x_title.unwrap_or_default())
        .x_labels(if chart.x.is_logarithmic { 10 } else { 7 })
        .y_labels(if chart.x.is_logarithmic { 10 } else { 5 })
        .x_label_formatter(&chart.x.label)
        .y_label_formatter(&chart.y.label)
        .draw()?;
    for (line, colour) in chart.lines.iter().zip(COLOURS.into_iter().cycle()) {
        if line.is_marked {
            context.draw_series(line.points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
        }
        let bold = if line.is_noisy {
            let faint = thinned(&line.points, MOST_POINTS);
            context.draw_series(LineSeries::new(faint, colour.mix(0.3)))?;
            thinned(&running_mean(&line.points), MOST_POINTS)
        } else if line.is_marked {
            line.points.clone()
        } else {
            thinned(&line.points, MOST_POINTS)
        };
        context
            .draw_series(LineSeries::new(bold, colour.stroke_width(2)))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    if chart.has_legend {
        context
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(TRANSPARENT)
            .label_font(text)
            .draw()?;
    }
    Ok(())
}

/// Exponential mean whose memory is a twentieth of the line; starts at the first value.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let weight = (20.0 / points.len().max(1) as f64).min(1.0);
    let mut mean = points.first().map_or(0.0, |point| point.1);
    points
        .iter()
        .map(|&(x, y)| {
            mean += weight * (y - mean);
            (x, mean)
        })
        .collect()
}

/// At most about `most` points: means of equal groups.
fn thinned(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(most).max(1);
    let mean = |group: &[(f64, f64)]| {
        let n = group.len() as f64;
        (group.iter().map(|p| p.0).sum::<f64>() / n, group.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(group).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_thinned_to_group_means() {
        let points: Vec<_> = (0..1000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let thin = thinned(&points, 300);
        assert_eq!(thin.len(), 250);
        assert!(thin.iter().all(|point| point.1 == 0.5));
        assert_eq!(thin[0].0, 1.5);
        assert_eq!(thinned(&points[..7], 300), points[..7]);
    }
}
