//! `ddtas-train eval`: prints what [`ddtas_train::inference::evaluate`] measures.

use std::io::{self, Write};
use std::path::PathBuf;

use ddtas_io::console::{print_result, printable};
use ddtas_train::inference::{EvalSettings, Evaluation, check_page, evaluate, write_page};

use super::progress::{during, warn_of_skipped};

#[derive(clap::Args)]
pub struct EvalArguments {
    #[command(flatten)]
    settings: EvalSettings,
    /// Also write the figures into this HTML file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn eval(arguments: &EvalArguments, quiet: bool) -> ddtas_train::Result<()> {
    let settings = &arguments.settings;
    arguments.html.as_deref().map_or(Ok(()), |path| check_page(path, settings.inputs()))?;
    let evaluation = during(quiet, |tell| evaluate(settings, tell))?;
    warn_of_skipped(&evaluation.skipped);
    if let Some(path) = &arguments.html {
        write_page(&evaluation, path)?;
    }
    Ok(print_result(arguments.json, &evaluation, table)?)
}

fn table(out: &mut Vec<u8>, evaluation: &Evaluation) -> io::Result<()> {
    let recall = &evaluation.metrics.recall;
    let name = evaluation.dataset.clone().unwrap_or_else(|| evaluation.source.display().to_string());
    let against = match evaluation.gallery {
        Some(gallery) => format!("searched in a gallery of {gallery}"),
        None => "searched among themselves".to_owned(),
    };
    writeln!(
        out,
        "{}: {} queries of {} classes, {against}; {} dimensions",
        printable(&name),
        recall.queries,
        evaluation.classes,
        evaluation.dim
    )?;
    if recall.without_match > 0 {
        writeln!(
            out,
            "{} more are ignored or have no other picture of their class to be found",
            recall.without_match
        )?;
    }
    writeln!(out)?;
    let mut figures: Vec<(String, f64)> =
        recall.at.iter().map(|(k, share)| (format!("Recall@{k}"), *share)).collect();
    figures.push(("R-precision".into(), evaluation.metrics.r_precision));
    figures.push(("MAP@R".into(), evaluation.metrics.map_at_r));
    figures.extend(evaluation.nmi.map(|nmi| ("NMI".into(), nmi)));
    for (name, share) in figures {
        writeln!(out, "{name:<14}{:>8.2}", 100.0 * share)?;
    }
    writeln!(out, "\nin per cent; {}", times(evaluation))
}

/// `12.3 s to embed, 4.5 s to search on cpu`
fn times(evaluation: &Evaluation) -> String {
    let mut parts = Vec::new();
    if evaluation.embedding_seconds > 0.0 {
        parts.push(format!("{:.1} s to embed", evaluation.embedding_seconds));
    }
    parts.push(format!("{:.1} s to search", evaluation.search_seconds));
    if let Some(seed) = evaluation.nmi_seed {
        parts.push(format!("{:.1} s to cluster (seed {seed})", evaluation.clustering_seconds));
    }
    format!("{} on {}", parts.join(", "), evaluation.backend)
}
