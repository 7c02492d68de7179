//! `ddtas-train eval`: prints what [`ddtas::inference::evaluate`] measures.

use ddtas::inference::{EvalSettings, Evaluation, evaluate};

use super::progress::{Progress, print_json, warn_of_skipped};

#[derive(clap::Args)]
pub struct EvalArguments {
    #[command(flatten)]
    settings: EvalSettings,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn eval(arguments: &EvalArguments) -> ddtas::Result<()> {
    let settings = &arguments.settings;
    let evaluation = Progress::during(|progress| evaluate(settings, &mut |event| progress.show(event)))?;
    warn_of_skipped(&evaluation.skipped);
    if arguments.json {
        return print_json(&evaluation);
    }
    print_table(&evaluation);
    Ok(())
}

fn print_table(evaluation: &Evaluation) {
    let recall = &evaluation.metrics.recall;
    let name = evaluation.dataset.clone().unwrap_or_else(|| evaluation.source.display().to_string());
    let against = match evaluation.gallery {
        Some(gallery) => format!("searched in a gallery of {gallery}"),
        None => "searched among themselves".to_owned(),
    };
    println!(
        "{name}: {} queries of {} classes, {against}; {} dimensions",
        recall.queries, evaluation.classes, evaluation.dim
    );
    if recall.without_match > 0 {
        println!(
            "{} more are ignored or have no other picture of their class to be found",
            recall.without_match
        );
    }
    println!();
    let line = |name: &str, share: f64| println!("{name:<14}{:>8.2}", 100.0 * share);
    for (k, share) in &recall.at {
        line(&format!("Recall@{k}"), *share);
    }
    line("R-precision", evaluation.metrics.r_precision);
    line("MAP@R", evaluation.metrics.map_at_r);
    if let Some(nmi) = evaluation.nmi {
        line("NMI", nmi);
    }
    println!("\nin per cent; {}", times(evaluation));
}

/// `12.3 s to embed, 4.5 s to search on cpu`
fn times(evaluation: &Evaluation) -> String {
    let mut parts = Vec::new();
    if evaluation.embedding_seconds > 0.0 {
        parts.push(format!("{:.1} s to embed", evaluation.embedding_seconds));
    }
    parts.push(format!("{:.1} s to search", evaluation.search_seconds));
    if evaluation.nmi.is_some() {
        parts.push(format!("{:.1} s to cluster", evaluation.clustering_seconds));
    }
    format!("{} on {}", parts.join(", "), evaluation.backend)
}
