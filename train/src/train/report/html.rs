//! The HTML of a report.

use super::findings::Report;
use super::plots;
use super::strip::{self, Query};
use crate::pages::{document, escape, figures, grouped, percent, push, section};
use crate::train::records::EvaluationRecord;
use crate::train::settings::before_training;
use ddtas_io::console::counted_as;

/// The whole page; all external text is escaped.
pub(super) fn page(report: &Report) -> Result<String, String> {
    let findings = &report.findings;
    let title = format!("{} on {}", report.name, findings.dataset);
    let mut body = String::new();
    heading(&mut body, report, &title);
    recall_table(&mut body, report);
    if !findings.queries.is_empty() {
        neighbours(&mut body, &findings.queries);
    }
    let (plots, flat) = plots::plots(report)?;
    if !plots.is_empty() || !flat.is_empty() {
        section(&mut body, "Training", "Over the steps of the run.");
        push(&mut body, "<div class=\"plots\">");
        for plot in &plots {
            figure(&mut body, plot);
        }
        push(&mut body, "</div>");
        if !flat.is_empty() {
            push(
                &mut body,
                &format!("<p class=\"flat\">Unchanged throughout. {}.</p>", escape(&flat.join(". "))),
            );
        }
        push(&mut body, "</section>");
    }
    settings(&mut body, &report.settings);
    Ok(document(&title, &body))
}

fn heading(body: &mut String, report: &Report, title: &str) {
    push(body, &format!("<header><h1>{}</h1>", escape(title)));
    let f = &report.findings;
    push(
        body,
        &format!(
            "<p>Trained on {} pictures of {} classes, tested on {} pictures of {} classes{}.</p>",
            grouped(f.train.pictures),
            grouped(f.train.classes),
            grouped(f.test.pictures),
            grouped(f.test.classes),
            if f.seen { ", some of which trained" } else { " it never saw" }
        ),
    );
    let mut cards = Vec::new();
    if let Some((first, best)) = first_and_best(report) {
        let at_1 = |recall: &[(usize, f64)]| recall.first().map(|&(_, value)| percent(value));
        if let (Some(before), Some(after)) = (at_1(&first.recall), at_1(&best.recall)) {
            let k = first.recall[0].0;
            cards.push((
                format!("{after} <small>%</small>"),
                format!(
                    "Recall@{k}, from {before} % before {}",
                    if report.begins_with("init") { "this run" } else { "training" }
                ),
            ));
        }
    }
    if let Some(last) = report.steps.last() {
        cards.push((grouped(last.step + 1), format!("steps, {:.1} epochs", last.epoch)));
    }
    cards.push((duration(f.training_seconds), "of training".into()));
    if let Some(seed) = report.settings.get("seed") {
        cards.push((escape(&seed.to_string()), "seed".into()));
    }
    push(body, "<div class=\"cards\">");
    for (value, label) in cards {
        push(body, &format!("<div><b>{value}</b><span>{label}</span></div>"));
    }
    push(body, "</div></header>");
}

/// The evaluation before training and the best one by its first K.
fn first_and_best(report: &Report) -> Option<(&EvaluationRecord, &EvaluationRecord)> {
    let at_1 = |e: &EvaluationRecord| e.recall.first().map_or(0.0, |r| r.1);
    let first = report.evaluations.first()?;
    // Of equal evaluations the earliest, like the best checkpoint.
    let best = report.evaluations.iter().rev().max_by(|a, b| at_1(a).total_cmp(&at_1(b)))?;
    Some((first, best))
}

fn recall_table(body: &mut String, report: &Report) {
    let Some((first, best)) = first_and_best(report) else { return };
    let findings = &report.findings;
    let mut rows: Vec<Row> =
        findings.baselines.iter().map(|b| Row::new(&b.name, &b.recall, [None, None])).collect();
    let after = |step: usize| format!("after {}", counted_as(grouped(step), step, "step"));
    let before = match first.step {
        0 => before_training(report.begins_with("init"), report.begins_with("weights")).into(),
        step => after(step),
    };
    rows.push(Row::of(&before, first));
    if let Some(last) = report.evaluations.last().filter(|last| last.step > first.step) {
        if best.step > first.step && best.step < last.step {
            rows.push(Row::of(&format!("best, {}", after(best.step)), best));
        }
        rows.push(Row::of(&format!("trained, {}", after(last.step)), last));
    }
    let unseen = if findings.seen { "" } else { "unseen " };
    section(
        body,
        "Retrieval",
        &format!(
            "Recall@K on {unseen}classes, in per cent: the share of queries with a picture of their class among the K nearest; R-P is R-precision, M@R is MAP@R."
        ),
    );
    let ks = first.recall.iter().map(|(k, _)| *k).collect::<Vec<_>>();
    let has_r = rows.iter().any(|row| row.of_r.iter().any(Option::is_some));
    let cells = |row: &Row| -> Vec<Option<f64>> {
        let at = |k: &usize| row.recall.iter().find(|r| r.0 == *k).map(|r| r.1);
        ks.iter().map(at).chain(row.of_r.into_iter().filter(|_| has_r)).collect()
    };
    let heads: Vec<String> = ks
        .iter()
        .map(|k| format!("R@{k}"))
        .chain(has_r.then(|| "R-P".into()))
        .chain(has_r.then(|| "M@R".into()))
        .collect();
    let table: Vec<(String, Vec<Option<f64>>)> =
        rows.iter().map(|row| (row.name.clone(), cells(row))).collect();
    figures(body, &heads, &table);
    push(body, "</section>");
}

/// A row of the table: name, Recall@K, and R-precision and MAP@R if known.
struct Row<'a> {
    name: String,
    recall: &'a [(usize, f64)],
    of_r: [Option<f64>; 2],
}

impl<'a> Row<'a> {
    fn new(name: &str, recall: &'a [(usize, f64)], of_r: [Option<f64>; 2]) -> Self {
        Self { name: name.to_owned(), recall, of_r }
    }

    fn of(name: &str, evaluation: &'a EvaluationRecord) -> Self {
        Self::new(name, &evaluation.recall, [evaluation.r_precision, evaluation.map_at_r])
    }
}

fn neighbours(body: &mut String, queries: &[Query]) {
    section(
        body,
        "Nearest neighbours",
        "Test pictures drawn at random, and what the best network finds for each, nearest first, with the cosine \
         similarity. <i class=\"right\">✓, solid green frame</i>: same class; <i class=\"wrong\">✗, dashed red frame</i>: \
         another class.",
    );
    push(body, "<div class=\"scroll\"><div class=\"strip\">");
    for query in queries {
        push(body, "<div class=\"row\">");
        let class = escape(&query.class);
        push(
            body,
            &format!(
                "<figure class=\"query\"><img alt=\"query: {class}\" src=\"data:image/png;base64,{}\">\
                 <figcaption>{class}</figcaption></figure>",
                query.png
            ),
        );
        for answer in &query.answers {
            let (word, mark) = if answer.right { ("right", '✓') } else { ("wrong", '✗') };
            let class = escape(&answer.class);
            push(
                body,
                &format!(
                    "<figure class=\"{word}\"><img alt=\"{word}: {class}\" title=\"{class}\" \
                     src=\"data:image/png;base64,{}\"><figcaption><i class=\"{word}\">{mark}</i> {class} <span>{:.2}</span></figcaption></figure>",
                    answer.png, answer.similarity
                ),
            );
        }
        push(body, "</div>");
    }
    push(body, "</div></div></section>");
}

fn figure(body: &mut String, plot: &plots::Plot) {
    push(body, &format!("<figure><h3>{}</h3><p class=\"legend\">", plot.title));
    if plot.legend.len() > 1 {
        for (colour, name) in &plot.legend {
            push(body, &format!("<span><i style=\"background:{colour}\"></i>{}</span>", escape(name)));
        }
    }
    push(body, &format!("</p>{}<figcaption>{}</figcaption></figure>", plot.svg, plot.note));
}

fn settings(body: &mut String, table: &toml::Table) {
    section(body, "Settings", "As in config.toml; the same settings and seed give the same run again.");
    push(body, "<dl>");
    flatten(body, "", table);
    push(body, "</dl></section>");
}

fn flatten(body: &mut String, prefix: &str, table: &toml::Table) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(inner) => flatten(body, &name, inner),
            toml::Value::String(text) => entry(body, &name, text),
            other => entry(body, &name, &other.to_string()),
        }
    }
}

fn entry(body: &mut String, name: &str, value: &str) {
    push(body, &format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value)));
}

fn duration(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 => format!("{whole} <small>s</small>"),
        60..3600 => format!("{}:{:02} <small>min</small>", whole / 60, whole % 60),
        _ => format!("{}:{:02} <small>h</small>", whole / 3600, whole % 3600 / 60),
    }
}

const _: () = assert!(strip::RIGHT[1] == 160 && strip::WRONG[0] == 214, "page.css uses the same colours");
