//! Line charts as SVG.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Distinct on white and on black, and with colour blindness.
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

/// Ticks that a linear and a logarithmic axis have at most.
const TICKS: usize = 6;
const LOG_TICKS: usize = 10;

/// Sizes of text; plotters writes 1/1.24 of them as pixels.
const TEXT: u32 = 15;
const TITLE: u32 = 18;
/// Height of the text of a mark.
const MARK: i32 = 14;

/// plotters writes fixed colours: these two are placeholders for the page's own, and replaced afterwards.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(4, 5, 6);

/// A line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Name in the legend.
    pub name: String,
    /// Points (x, y) in order of x.
    pub points: Vec<(f64, f64)>,
    /// Drawn faint, with a running mean over it ([`window`]).
    pub is_noisy: bool,
    /// Each point is marked, and none averaged.
    pub is_marked: bool,
}

/// An axis.
pub struct Axis<'a> {
    /// First and last value; above 0 if the axis is logarithmic.
    pub range: Range<f64>,
    /// Whether equal steps are equal factors.
    pub is_logarithmic: bool,
    /// The text at a tick.
    pub label: &'a dyn Fn(&f64) -> String,
}

/// A chart.
pub struct Chart<'a> {
    /// Title.
    pub title: Option<&'a str>,
    /// The x axis.
    pub x: Axis<'a>,
    /// Title of the x axis.
    pub x_title: Option<&'a str>,
    /// The y axis.
    pub y: Axis<'a>,
    /// The lines, in order of their colours.
    pub lines: &'a [Line],
    /// Values of x that are marked by a thin vertical line, each with its text.
    pub marks: &'a [(f64, String)],
    /// Whether the lines' names are shown within the chart.
    pub has_legend: bool,
}

/// Background of a figure.
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
/// The plotting library's message.
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
type Context<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Ticked, Ticked>>;

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
    // The marks' texts are above the chart, one line each.
    builder
        .margin_top(8 + MARK * chart.marks.len() as i32)
        .margin_right(14)
        .x_label_area_size(26)
        .y_label_area_size(52);
    if let Some(title) = chart.title {
        builder.caption(title, ("sans-serif", TITLE).into_font().color(&INK));
    }
    if chart.x_title.is_some() {
        builder.x_label_area_size(38).margin_bottom(6);
    }
    lines_on(&mut builder.build_cartesian_2d(Ticked::new(&chart.x), Ticked::new(&chart.y))?, chart)
}

/// An axis with the ticks of [`ticks`] or [`log_ticks`]: plotters' own are as dense as their number is given, and those of
/// a narrow logarithmic axis may be none.
struct Ticked {
    axis: RangedCoordf64,
    scale: fn(f64) -> f64,
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ticked {
    fn new(axis: &Axis<'_>) -> Self {
        let range = axis.range.clone();
        let (scale, ticks): (fn(f64) -> f64, _) = if axis.is_logarithmic {
            (f64::ln, log_ticks(&range))
        } else {
            (|value| value, ticks(&range, TICKS).0)
        };
        Self { axis: (scale(range.start)..scale(range.end)).into(), scale, range, ticks }
    }
}

impl Ranged for Ticked {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.axis.map(&(self.scale)(*value), limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

fn lines_on<'a>(context: &mut Context<'a>, chart: &Chart<'_>) -> Result<(), Failure> {
    let text = ("sans-serif", TEXT).into_font().color(&INK);
    context
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(text.clone())
        .axis_desc_style(text.clone())
        .x_desc(chart.x_title.unwrap_or_default())
        .x_label_formatter(chart.x.label)
        .y_label_formatter(chart.y.label)
        .draw()?;
    marks_on(context, chart, &text)?;
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

/// Vertical lines with their text above, on the side that has more room.
fn marks_on<'a>(context: &mut Context<'a>, chart: &Chart<'_>, text: &TextStyle<'_>) -> Result<(), Failure> {
    let (Range { start, end }, y) = (&chart.x.range, &chart.y.range);
    let within = chart.marks.iter().enumerate().filter(|(_, (x, _))| (*start..=*end).contains(x));
    for (line, (x, name)) in within {
        let is_right = x - start > (end - start) / 2.0;
        let at = Pos::new(if is_right { HPos::Right } else { HPos::Left }, VPos::Bottom);
        let aside = (if is_right { 2 } else { -2 }, -MARK * line as i32);
        context.draw_series([PathElement::new([(*x, y.start), (*x, y.end)], INK.mix(0.5))])?;
        let name = Text::new(name.clone(), aside, text.pos(at));
        context.draw_series([EmptyElement::at((*x, y.end)) + name])?;
    }
    Ok(())
}

/// Points that the running mean of a noisy line of `points` is taken over: about a twentieth.
#[must_use]
pub fn window(points: usize) -> usize {
    points / 40 * 2 + 1
}

/// Mean over as many points before as after. It stops half a window before the ends, where there are not as many.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = window(points.len()) / 2;
    let sums: Vec<f64> = std::iter::once(0.0)
        .chain(points.iter().scan(0.0, |sum, point| {
            *sum += point.1;
            Some(*sum)
        }))
        .collect();
    let mean = |i: usize| {
        let (first, last) = (i - reach, i + reach + 1);
        (points[i].0, (sums[last] - sums[first]) / (last - first) as f64)
    };
    (reach..points.len() - reach).map(mean).collect()
}

/// The text at the ticks of an upright axis over `range`, with the same digits at all of them.
pub fn tick_label(range: &Range<f64>) -> impl Fn(&f64) -> String + use<> {
    let digits = ticks(range, TICKS).1;
    move |value| if digits > 4 { format!("{value:.1e}") } else { format!("{value:.digits$}") }
}

/// Ticks at equal distances of 1, 2 or 5 times a power of ten, from `range`, at most `most`, and the digits behind the point
/// that tell them apart.
#[must_use]
pub fn ticks(range: &Range<f64>, most: usize) -> (Vec<f64>, usize) {
    let span = range.end - range.start;
    if span.is_nan() || span <= 0.0 || most < 2 {
        return (Vec::new(), 0);
    }
    let magnitude = 10f64.powf((span / most as f64).log10().floor());
    let fits = |step: f64| (range.end / step).floor() - (range.start / step).ceil() < most as f64;
    let factors = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0];
    let step = factors.map(|factor| factor * magnitude).into_iter().find(|&step| fits(step)).unwrap_or(span);
    let (first, last) = ((range.start / step).ceil() as i64, (range.end / step).floor() as i64);
    let digits = (-step.log10().floor()).max(0.0) as usize;
    // By products, so that rounding errors do not add up; adding 0 turns -0 into 0.
    ((first..=last).map(|i| i as f64 * step + 0.0).collect(), digits)
}

/// Ticks of a logarithmic axis: 1, 2 and 5 times the powers of ten, the powers alone where those are too many, and equal
/// steps where they are too few.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let powers = range.start.log10().floor() as i32..=range.end.log10().floor() as i32;
    let times = |factors: &[f64], every: usize| -> Vec<f64> {
        let all = powers
            .clone()
            .step_by(every)
            .flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)));
        all.filter(|tick| range.contains(tick)).collect()
    };
    let fine = times(&[1.0, 2.0, 5.0], 1);
    match fine.len() {
        0..3 => ticks(range, TICKS).0,
        3..=LOG_TICKS => fine,
        _ => times(&[1.0], powers.clone().count().div_ceil(LOG_TICKS)),
    }
}

/// The text at a tick of a logarithmic axis: four significant digits, without trailing zeros.
#[must_use]
pub fn short_label(value: &f64) -> String {
    format!("{value:.3e}").parse::<f64>().unwrap_or(*value).to_string()
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
    fn a_running_mean_does_not_lag() {
        let ramp: Vec<_> = (0..400).map(|i| (f64::from(i), 3.0 * f64::from(i))).collect();
        let means = running_mean(&ramp);
        assert_eq!((means.len(), means[0].0, window(400)), (380, 10.0, 21));
        assert!(means.iter().all(|mean| (mean.1 - 3.0 * mean.0).abs() < 1e-9), "{means:?}");
        let noisy: Vec<_> = (0..400).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        assert!(running_mean(&noisy).iter().all(|mean| (mean.1 - 0.5).abs() < 0.05));
        assert!(running_mean(&[]).is_empty());
        assert_eq!(running_mean(&ramp[..3]), ramp[..3]);
    }

    #[test]
    fn every_logarithmic_axis_has_ticks_with_text() {
        assert_eq!(log_ticks(&(53.0..7680.0)), [100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0]);
        assert_eq!(log_ticks(&(53.0..240.0)), [100.0, 150.0, 200.0]);
        assert_eq!(log_ticks(&(0.5..1e6)), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
        assert!(log_ticks(&(1e-6..1e15)).len() <= LOG_TICKS);
        for step in 0..200 {
            let (low, width) = (1e-5 * 1.3f64.powi(step), 1.05 + f64::from(step % 17));
            let (range, most) = (low..low * width, LOG_TICKS);
            let ticks = log_ticks(&range);
            assert!(
                (2..=most).contains(&ticks.len()) && ticks.iter().all(|t| range.contains(t)),
                "{range:?}: {ticks:?}"
            );
        }
        assert_eq!(
            ["0.05", "0.0002", "1200"].map(|text| short_label(&text.parse().unwrap())),
            ["0.05", "0.0002", "1200"]
        );
        assert_eq!(short_label(&(3.0 * 0.1)), "0.3");
    }

    #[test]
    fn marks_stand_within_the_chart_with_their_text() {
        let line = Line {
            name: "a".into(),
            points: vec![(0.0, 1.0), (9.0, 2.0)],
            is_noisy: false,
            is_marked: false,
        };
        let (lines, marks) = ([line], [(3.0, "inside".to_owned()), (12.0, "outside".to_owned())]);
        let axis = |range| Axis { range, is_logarithmic: false, label: &short_label };
        let chart = Chart {
            title: None,
            x: axis(0.0..9.0),
            x_title: Some("step"),
            y: axis(1.0..2.0),
            lines: &lines,
            marks: &marks,
            has_legend: false,
        };
        let svg = svg(&[chart], (300, 200), Ground::White).unwrap();
        assert!(svg.contains("inside") && !svg.contains("outside") && svg.contains("step"), "{svg}");
    }

    #[test]
    fn ticks_are_equal_and_round() {
        assert_eq!(ticks(&(0.0..199.0), 6), (vec![0.0, 50.0, 100.0, 150.0], 0));
        assert_eq!(ticks(&(-0.1..0.62), 5), (vec![0.0, 0.2, 0.4, 0.6000000000000001], 1));
        let (small, digits) = ticks(&(0.0..0.0021), 5);
        let wanted = [0.0, 0.0005, 0.001, 0.0015, 0.002];
        assert!(small.iter().zip(wanted).all(|(got, want)| (got - want).abs() < 1e-12) && small.len() == 5);
        assert_eq!(digits, 4);
        assert_eq!(ticks(&(1.0..1.0), 5), (vec![], 0));
    }

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
