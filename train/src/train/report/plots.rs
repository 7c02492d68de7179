//! The plots of a run over its steps, as SVG in the colours of the page.

use ddtas_io::chart::{self, Axis, Chart, Ground, Line};

use super::findings::Report;
use crate::train::PairLoss;
use crate::train::records::{EvaluationRecord, StepRecord};
use crate::train::settings::TrainSettings;

/// Size of a plot, as wide as a phone's screen, so that its text is legible there.
const SIZE: (u32, u32) = (340, 225);

/// A plot with its heading.
pub(super) struct Plot {
    pub title: &'static str,
    /// A sentence that explains the plot.
    pub note: String,
    /// Colour (CSS) and name of each line.
    pub legend: Vec<(String, String)>,
    pub svg: String,
}

/// Contents of a plot.
struct Drawing {
    title: &'static str,
    note: String,
    is_logarithmic: bool,
    lines: Vec<Line>,
}

/// The plots of a run, and a line of text in place of each plot whose lines are constant. Plots without data are left out.
pub(super) fn plots(report: &Report) -> Result<(Vec<Plot>, Vec<String>), String> {
    // None if another version of the program wrote them.
    let settings: Option<TrainSettings> = report.settings.clone().try_into().ok();
    let has_lambda = settings.as_ref().is_none_or(|settings| settings.loss == PairLoss::SoftContrastive);
    let drawn = drawings(report, has_lambda);
    let drawn = drawn.into_iter().filter(|drawing| drawing.lines.iter().any(|line| line.points.len() > 1));
    let (flat, moving): (Vec<_>, Vec<_>) = drawn.partition(|drawing| drawing.lines.iter().all(is_flat));
    let flat = flat.into_iter().map(|Drawing { title, lines, .. }| {
        let value =
            |line: &Line| line.points.first().map(|point| format!("{} {}", line.name, short(&point.1)));
        let values: Vec<String> = lines.iter().filter_map(value).collect();
        format!("{title}: {}", values.join(", "))
    });
    let flat = flat.collect();
    // All plots have the same axis of steps.
    let of_steps = report.steps.last().map_or(1, |step| step.step + 1);
    let last = report.evaluations.last().map_or(of_steps, |evaluation| evaluation.step.max(of_steps)) as f64;
    let steps = -(report.rehearsal.len() as f64)..last;
    let marks = settings.map_or_else(Vec::new, |settings| marks(&settings));
    let plots = moving
        .into_iter()
        .map(|drawing| {
            let Drawing { title, note, lines, .. } = &drawing;
            let across = if *title == LAMBDA { steps.clone() } else { 0.0..last };
            let svg = draw(lines, across, drawing.is_logarithmic, &marks)
                .map_err(|error| format!("plot \"{title}\": {error}"))?;
            let legend =
                lines.iter().enumerate().map(|(i, line)| (chart::css(i), line.name.clone())).collect();
            Ok(Plot { title, note: note.clone(), legend, svg })
        })
        .collect::<Result<_, String>>()?;
    Ok((plots, flat))
}

/// All plots of a run; if its loss has no lambda, that of lambda shows the margin.
fn drawings(report: &Report, has_lambda: bool) -> Vec<Drawing> {
    let steps = |name: &str, noisy, value: &dyn Fn(&StepRecord) -> Option<f64>| {
        let finite = |step: &StepRecord| value(step).filter(|v| v.is_finite()).map(|v| (step.step as f64, v));
        Line {
            name: name.into(),
            points: report.steps.iter().filter_map(finite).collect(),
            is_noisy: noisy,
            is_marked: false,
        }
    };
    // The steps of the rehearsal precede those of the run, with negative numbers.
    let thresholds = |name: &str, value: fn(&StepRecord) -> f64| {
        let first = -(report.rehearsal.len() as f64);
        let rehearsed =
            report.rehearsal.iter().enumerate().map(|(step, record)| (first + step as f64, value(record)));
        let run = report.steps.iter().map(|record| (record.step as f64, value(record)));
        Line { name: name.into(), points: rehearsed.chain(run).collect(), is_noisy: false, is_marked: false }
    };
    let ks: Vec<usize> =
        report.evaluations.first().map(|e| e.recall.iter().map(|&(k, _)| k).collect()).unwrap_or_default();
    let recall = ks.iter().map(|&k| {
        let at =
            |e: &EvaluationRecord| e.recall.iter().find(|r| r.0 == k).map(|r| (e.step as f64, 100.0 * r.1));
        let points = report.evaluations.iter().filter_map(at).collect();
        Line { name: format!("Recall@{k}"), points, is_noisy: false, is_marked: true }
    });
    let bold = match chart::window(report.steps.len()) {
        1 => String::new(),
        window => format!("Bold: mean of {window} steps."),
    };
    let drawing = |title, note: String, lines| Drawing { title, note, is_logarithmic: false, lines };
    let of_thresholds = "Similarity at which a pair has half its weight.";
    let of_thresholds = match report.rehearsal.len() {
        0 => of_thresholds.to_owned(),
        _ => format!("{of_thresholds} Steps below 0: the rehearsal."),
    };
    let one_threshold = report.rehearsal.iter().chain(&report.steps).all(|s| s.lambda_pos == s.lambda_neg);
    vec![
        drawing(
            "Recall@K, %",
            "Share of queries with a picture of their class among the K nearest.".into(),
            recall.collect(),
        ),
        drawing("Loss", format!("Mean over the batch. {bold}"), vec![steps("loss", true, &|s| Some(s.loss))]),
        drawing(
            "Mean similarity of pairs",
            format!("Cosine similarity. {bold}"),
            vec![steps("positive", true, &|s| s.mean_pos), steps("negative", true, &|s| s.mean_neg)],
        ),
        drawing(
            "Mining tolerances",
            "gamma: how far a pair may be from the hardest pair of the other kind and still be mined.".into(),
            vec![
                steps("gamma positive", false, &|s| s.gamma_pos),
                steps("gamma negative", false, &|s| s.gamma_neg),
            ],
        ),
        drawing(
            LAMBDA,
            of_thresholds,
            if one_threshold {
                vec![thresholds(if has_lambda { "lambda" } else { "margin" }, |s| s.lambda_pos)]
            } else {
                vec![
                    thresholds("lambda positive", |s| s.lambda_pos),
                    thresholds("lambda negative", |s| s.lambda_neg),
                ]
            },
        ),
        Drawing {
            is_logarithmic: true,
            ..drawing(
                "Mined pairs and active anchors",
                format!("Per batch, logarithmic; 0 is drawn as 1. {bold}"),
                vec![
                    steps("positive pairs", true, &|s| Some((s.mined_pos as f64).max(1.0))),
                    steps("negative pairs", true, &|s| Some((s.mined_neg as f64).max(1.0))),
                    steps("active anchors", true, &|s| Some((s.active as f64).max(1.0))),
                ],
            )
        },
        drawing(
            "Learning rate",
            "Of the backbone, where the head has its own.".into(),
            vec![steps("learning rate", false, &|s| Some(s.learning_rate))],
        ),
    ]
}

/// Title of the plot that also shows the rehearsal.
const LAMBDA: &str = "Loss thresholds";

/// Whether a line is constant.
fn is_flat(line: &Line) -> bool {
    let first = line.points.first().map_or(0.0, |point| point.1);
    line.points.iter().all(|point| (point.1 - first).abs() <= 1e-9 * first.abs())
}

/// The end of the warm-up and the start of the memory, if they are within the run.
fn marks(settings: &TrainSettings) -> Vec<(f64, String)> {
    let warm_up = settings.warm_up_steps();
    let memory = (settings.memory_size > 0).then(|| settings.memory_start_step());
    let marks = match memory {
        Some(memory) if memory == warm_up => vec![(warm_up, "end of warm-up, memory")],
        Some(memory) => vec![(warm_up, "end of warm-up"), (memory, "memory")],
        None => vec![(warm_up, "end of warm-up")],
    };
    let within = marks.into_iter().filter(|(step, _)| (1..settings.steps).contains(step));
    within.map(|(step, name)| (step as f64, name.to_owned())).collect()
}

fn draw(
    lines: &[Line],
    across: std::ops::Range<f64>,
    logarithmic: bool,
    marks: &[(f64, String)],
) -> Result<String, String> {
    let values = || lines.iter().flat_map(|line| line.points.iter().copied());
    let (low, high) = values().fold((f64::MAX, f64::MIN), |(l, h), (_, y)| (l.min(y), h.max(y)));
    let whole = |value: &f64| format!("{value:.0}");
    // A constant line needs room around it, too.
    let room = ((high - low) * 0.08).max(high.abs() * 0.04).max(1e-9);
    let from = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - room };
    let linear = from..high + room;
    let label = chart::tick_label(&linear);
    let y = if logarithmic {
        Axis { range: 1.0..high.max(10.0) * 1.3, is_logarithmic: true, label: &whole }
    } else {
        Axis { range: linear, is_logarithmic: false, label: &label }
    };
    let x = Axis { range: across, is_logarithmic: false, label: &whole };
    let chart = Chart { title: None, x, x_title: Some("step"), y, lines, marks, has_legend: false };
    chart::svg(&[chart], SIZE, Ground::Page)
}

/// A number with about three significant digits, without trailing zeros.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axis_labels_are_short() {
        for (value, want) in
            [(0.0, "0"), (0.5, "0.5"), (12.25, "12.2"), (100.0, "100"), (0.0001, "1.0e-4"), (-1.5, "-1.5")]
        {
            assert_eq!(short(&value), want);
        }
    }
}
