//! The results of an evaluation as one HTML file.

use std::path::Path;

use super::evaluation::Evaluation;
use crate::Result;
use crate::pages::{document, escape, figures, grouped, push};
use ddtas_io::files::write_atomic;

/// Writes the page of an evaluation.
///
/// # Errors
/// [`Io`](ddtas_io::Error::Io) if the file cannot be written.
pub fn write(evaluation: &Evaluation, path: &Path) -> Result<()> {
    let name = evaluation.dataset.clone().unwrap_or_else(|| evaluation.source.display().to_string());
    let title = format!("Retrieval on {name}");
    let recall = &evaluation.metrics.recall;
    let mut body = String::new();
    push(&mut body, &format!("<header><h1>{}</h1>", escape(&title)));
    let searched = match evaluation.gallery {
        Some(gallery) => format!("searched in a gallery of {}", grouped(gallery)),
        None => "searched among themselves, each left out of its own list".to_owned(),
    };
    push(
        &mut body,
        &format!(
            "<p>{} queries of {} classes, {searched}. In per cent, means over the queries: Recall@K is the share with one of \
             their class among the K nearest; R-P is R-precision, M@R is MAP@R.</p></header>",
            grouped(recall.queries),
            grouped(evaluation.classes)
        ),
    );
    let mut heads: Vec<String> = recall.at.iter().map(|(k, _)| format!("R@{k}")).collect();
    let mut values: Vec<Option<f64>> = recall.at.iter().map(|(_, share)| Some(*share)).collect();
    heads.extend(["R-P".to_owned(), "M@R".to_owned()]);
    values.extend([Some(evaluation.metrics.r_precision), Some(evaluation.metrics.map_at_r)]);
    if let Some(nmi) = evaluation.nmi {
        heads.push("NMI".to_owned());
        values.push(Some(nmi));
    }
    let source = evaluation.source.file_name().unwrap_or_default().to_string_lossy().into_owned();
    push(&mut body, "<section>");
    figures(&mut body, &heads, &[(source, values)]);
    push(&mut body, "</section><section><h2>How</h2><dl>");
    let seconds = |seconds: f64| format!("{seconds:.1} s");
    for (name, value) in [
        ("file", evaluation.source.display().to_string()),
        ("dimensions", evaluation.dim.to_string()),
        ("ignored or without an answer", grouped(recall.without_match)),
        ("pictures that cannot be read", grouped(evaluation.skipped.len())),
        ("searched on", evaluation.backend.clone()),
        ("embedding", seconds(evaluation.embedding_seconds)),
        ("search", seconds(evaluation.search_seconds)),
    ] {
        push(&mut body, &format!("<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value)));
    }
    push(&mut body, "</dl></section>");
    Ok(write_atomic(path, document(&title, &body).as_bytes())?)
}
