//! Lines over steps, as SVG that takes its colours from the page.

use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::Report;

const SIZE: (u32, u32) = (560, 250);

/// plotters writes fixed colours; these two stand for the page's own and are replaced afterwards.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(4, 5, 6);

/// Readable on white and on black.
const COLOURS: [RGBColor; 4] =
    [RGBColor(59, 130, 246), RGBColor(234, 118, 40), RGBColor(34, 160, 84), RGBColor(168, 85, 247)];

/// Points a line has at most; more are averaged in groups, to keep the page small.
const MOST_POINTS: usize = 300;

/// A plot with its heading.
pub(super) struct Plot {
    pub title: &'static str,
    /// A sentence that says how to read it.
    pub note: &'static str,
    /// Colour (CSS) and name of each line.
    pub legend: Vec<(String, String)>,
    pub svg: String,
}

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
    /// Noisy: drawn faint, with a running mean over it.
    noisy: bool,
    /// Few points, which are marked.
    marked: bool,
}

/// The plots of a run; those without data are left out.
pub(super) fn plots(report: &Report) -> Result<Vec<Plot>, String> {
    let steps = |name: &str, noisy, value: &dyn Fn(&super::StepRecord) -> Option<f64>| {
        let finite =
            |step: &super::StepRecord| value(step).filter(|v| v.is_finite()).map(|v| (step.step as f64, v));
        Line {
            name: name.into(),
            points: report.steps.iter().filter_map(finite).collect(),
            noisy,
            marked: false,
        }
    };
    // Before the run's own steps, those of the rehearsal that found its lambda.
    let thresholds = |name: &str, value: fn(&super::StepRecord) -> f64| {
        let first = -(report.rehearsal.len() as f64);
        let rehearsed =
            report.rehearsal.iter().enumerate().map(|(step, record)| (first + step as f64, value(record)));
        let run = report.steps.iter().map(|record| (record.step as f64, value(record)));
        Line { name: name.into(), points: rehearsed.chain(run).collect(), noisy: false, marked: false }
    };
    let ks: Vec<usize> =
        report.evaluations.first().map(|e| e.recall.iter().map(|&(k, _)| k).collect()).unwrap_or_default();
    let recall = ks.iter().map(|&k| {
        let at = |e: &super::EvaluationRecord| {
            e.recall.iter().find(|r| r.0 == k).map(|r| (e.step as f64, 100.0 * r.1))
        };
        let points = report.evaluations.iter().filter_map(at).collect();
        Line { name: format!("Recall@{k}"), points, noisy: false, marked: true }
    });
    let share = "Cosine: 1 is the same direction, 0 none in common.";
    let all = [
        (
            "Recall on unseen classes, %",
            "Share of queries with one of their class among the K nearest.",
            false,
            recall.collect(),
        ),
        (
            "Loss",
            "Mean over the batch; the bold line is a running mean.",
            false,
            vec![steps("loss", true, &|s| Some(s.loss))],
        ),
        (
            "Mean similarity of pairs",
            share,
            false,
            vec![steps("positive", true, &|s| s.mean_pos), steps("negative", true, &|s| s.mean_neg)],
        ),
        (
            "Mining tolerances",
            "gamma: how far a pair may lie from the hardest opposite one and still be mined.",
            false,
            vec![
                steps("gamma positive", false, &|s| s.gamma_pos),
                steps("gamma negative", false, &|s| s.gamma_neg),
            ],
        ),
        (
            "Loss thresholds",
            if report.rehearsal.is_empty() {
                "lambda: the similarity at which a pair counts half."
            } else {
                "lambda: the similarity at which a pair counts half. Below 0 the steps of the rehearsal."
            },
            false,
            vec![
                thresholds("lambda positive", |s| s.lambda_pos),
                thresholds("lambda negative", |s| s.lambda_neg),
            ],
        ),
        (
            "Mined pairs and active anchors",
            "Per batch, logarithmic; none is drawn as 1.",
            true,
            vec![
                steps("positive pairs", true, &|s| Some((s.mined_pos as f64).max(1.0))),
                steps("negative pairs", true, &|s| Some((s.mined_neg as f64).max(1.0))),
                steps("active anchors", true, &|s| Some((s.active as f64).max(1.0))),
            ],
        ),
        (
            "Learning rate",
            "Warm-up, then cosine.",
            false,
            vec![steps("learning rate", false, &|s| Some(s.learning_rate))],
        ),
    ];
    let drawn = all.into_iter().filter(|(.., lines)| lines.iter().any(|line: &Line| line.points.len() > 1));
    drawn
        .map(|(title, note, logarithmic, lines)| {
            let svg = draw(&lines, logarithmic).map_err(|error| format!("plot \"{title}\": {error}"))?;
            let legend = lines.iter().zip(COLOURS).map(|(line, c)| (css(c), line.name.clone())).collect();
            Ok(Plot { title, note, legend, svg })
        })
        .collect()
}

fn draw(lines: &[Line], logarithmic: bool) -> Result<String, Box<dyn std::error::Error>> {
    let values = || lines.iter().flat_map(|line| line.points.iter().copied());
    let (first, last) = values().fold((0.0, 1.0), |(l, h): (f64, f64), (x, _)| (l.min(x), h.max(x)));
    let (low, high) = values().fold((f64::MAX, f64::MIN), |(l, h), (_, y)| (l.min(y), h.max(y)));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut builder = ChartBuilder::on(&area);
        builder.margin_top(8).margin_right(14).x_label_area_size(26).y_label_area_size(52);
        if logarithmic {
            let mut chart =
                builder.build_cartesian_2d(first..last, (1.0..high.max(10.0) * 1.3).log_scale())?;
            lines_on(&mut chart, lines, &|value| format!("{value:.0}"))?;
        } else {
            // A line that never moves still needs room around it.
            let room = ((high - low) * 0.08).max(high.abs() * 0.04).max(1e-9);
            let from = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - room };
            let mut chart = builder.build_cartesian_2d(first..last, from..high + room)?;
            lines_on(&mut chart, lines, &short)?;
        }
        area.present()?;
    }
    let svg = svg.replace("#010203", "currentColor").replace("#040506", "var(--grid)").replacen(
        &format!("width=\"{}\" height=\"{}\" ", SIZE.0, SIZE.1),
        "",
        1,
    );
    Ok(svg)
}

type Chart<'a, 'b, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, Y>>;

fn lines_on<'b, Y>(
    chart: &mut Chart<'_, 'b, Y>,
    lines: &[Line],
    label: &dyn Fn(&f64) -> String,
) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'b> as DrawingBackend>::ErrorType>>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let text = ("sans-serif", 12).into_font().color(&INK);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(text)
        .x_labels(7)
        .y_labels(5)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&label)
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS) {
        let points = thinned(&line.points, MOST_POINTS);
        if line.noisy {
            chart.draw_series(LineSeries::new(points, colour.mix(0.3)))?;
            let mean = thinned(&running_mean(&line.points), MOST_POINTS);
            chart.draw_series(LineSeries::new(mean, colour.stroke_width(2)))?;
        } else {
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        }
        if line.marked {
            chart.draw_series(line.points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
        }
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

/// Three digits that matter, without trailing noughts.
fn short(value: &f64) -> String {
    if *value != 0.0 && value.abs() < 1e-3 {
        return format!("{value:.1e}");
    }
    let digits = if value.abs() >= 10.0 {
        1
    } else if value.abs() >= 1.0 {
        2
    } else {
        4
    };
    let text = format!("{value:.digits$}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn css(RGBColor(red, green, blue): RGBColor) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
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

    #[test]
    fn axis_labels_are_short() {
        for (value, want) in
            [(0.0, "0"), (0.5, "0.5"), (12.25, "12.2"), (100.0, "100"), (0.0001, "1.0e-4"), (-1.5, "-1.5")]
        {
            assert_eq!(short(&value), want);
        }
    }
}
