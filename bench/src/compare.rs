//! Comparison of two outputs of `throughput --json`: ratios of time and memory.

use std::path::Path;

use super::Row;
use ddtas_io::{Error, Result};

/// Ratios of the second run to the first, for a row. Field names are those of `--json`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Ratio {
    /// Rows of the batch, B.
    pub batch: usize,
    /// Number of separate references, N; none where the batch is compared with itself.
    pub references: Option<usize>,
    /// Dimensions of a row, D.
    pub dim: usize,
    /// Name of the density, if the rows have one.
    pub density: Option<String>,
    /// Median time of the first run, milliseconds.
    pub first_ms: f64,
    /// Median time of the second run, milliseconds.
    pub second_ms: f64,
    /// The second time over the first.
    pub time: f64,
    /// Half the width of the range in which four of five such ratios lie: both runs' 10th to 90th percentiles.
    pub time_spread: f64,
    /// Ratio of the shortest times, which other programs on the machine affect less.
    pub time_best: f64,
    /// Ratio of the extra memory, if both runs counted it.
    pub memory: Option<f64>,
}

/// The comparison of two runs.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// Backend and threads of both runs.
    pub runs: [(String, usize); 2],
    /// A ratio for each row.
    pub ratios: Vec<Ratio>,
}

/// Reads what `throughput --json` printed.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it holds something else.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let rows: Vec<Row> = serde_json::from_slice(&text)
        .map_err(|error| Error::format(path, format!("not what `throughput --json` prints: {error}")))?;
    if rows.is_empty() {
        return Err(Error::format(path, "holds no measurement"));
    }
    Ok(rows)
}

/// Ratios of the rows of `second` to those of `first`.
///
/// # Errors
/// [`Error::Format`] names the first row that was measured otherwise: another shape, type or density of rows. Backend and
/// threads may differ: they are what is compared.
pub fn compare(first: (&Path, &[Row]), second: (&Path, &[Row])) -> Result<Comparison> {
    let ((one, first), (path, second)) = (first, second);
    if first.len() != second.len() {
        let (has, wanted) = (second.len(), first.len());
        return Err(Error::format(path, format!("has {has} rows, {} has {wanted}", one.display())));
    }
    let mut ratios = Vec::with_capacity(first.len());
    for (number, (a, b)) in first.iter().zip(second).enumerate() {
        if let Some((what, a, b)) = difference(a, b) {
            let reason = format!("row {}: {what} is {b}, in {} it is {a}", number + 1, one.display());
            return Err(Error::format(path, reason));
        }
        let time = b.time_ms / a.time_ms;
        let part = |row: &Row| row.time_spread_ms / row.time_ms / 2.0;
        ratios.push(Ratio {
            batch: a.batch,
            references: a.references,
            dim: a.dim,
            density: a.density.clone(),
            first_ms: a.time_ms,
            second_ms: b.time_ms,
            time,
            // The two spreads are independent.
            time_spread: time * part(a).hypot(part(b)),
            time_best: b.time_best_ms / a.time_best_ms,
            memory: a
                .peak_extra_bytes
                .zip(b.peak_extra_bytes)
                .filter(|(a, _)| *a > 0)
                .map(|(a, b)| b as f64 / a as f64),
        });
    }
    let run = |rows: &[Row]| (rows[0].backend.clone(), rows[0].threads);
    Ok(Comparison { runs: [run(first), run(second)], ratios })
}

/// The property in which two rows differ so that their times are incomparable, and its two values.
fn difference(a: &Row, b: &Row) -> Option<(&'static str, String, String)> {
    let text = |value: Option<String>| value.unwrap_or_else(|| "none".into());
    let facts = |row: &Row| {
        [
            ("B", row.batch.to_string()),
            ("N", text(row.references.map(|references| references.to_string()))),
            ("D", row.dim.to_string()),
            ("the type", row.dtype.to_string()),
            ("TF32", row.tf32.to_string()),
            ("the density", text(row.density.clone())),
            ("the noise", text(row.noise.map(|noise| noise.to_string()))),
        ]
    };
    facts(a).into_iter().zip(facts(b)).find(|(a, b)| a != b).map(|((what, a), (_, b))| (what, a, b))
}
