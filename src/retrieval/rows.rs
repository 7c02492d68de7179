//! Rows that take part in a search, and their places in the caller's matrix.

use std::collections::HashMap;

use crate::Error;
use crate::loss::{OwnedEmbeddings, Rows};

/// Number of answers of each query, 0 if it is ignored, by the labels of the queries and of the gallery.
pub(super) fn answers(queries: &[i64], gallery: Option<&[i64]>) -> Vec<u32> {
    let mut sizes = HashMap::<i64, u32>::new();
    for label in gallery.unwrap_or(queries) {
        *sizes.entry(*label).or_default() += 1;
    }
    let itself = u32::from(gallery.is_none());
    let of = |label: &i64| if *label < 0 { 0 } else { sizes.get(label).map_or(0, |size| size - itself) };
    queries.iter().map(of).collect()
}

/// The rows that are not ignored; `None` if no row is ignored.
pub(super) fn kept(labels: &[i64]) -> Option<Vec<u32>> {
    if labels.iter().all(|&label| label >= 0) {
        return None;
    }
    Some((0..labels.len() as u32).filter(|&row| labels[row as usize] >= 0).collect())
}

/// Rows without the ignored ones, copied only if there are any.
pub(super) struct KeptRows<'a> {
    all: Rows<'a>,
    some: Option<CopiedRows>,
    original: Vec<u32>,
}

impl<'a> KeptRows<'a> {
    pub(super) fn new(rows: &'a Rows<'_>) -> Self {
        let all = rows.view();
        let Some(original) = kept(all.labels) else {
            return Self { all, some: None, original: Vec::new() };
        };
        Self { some: Some(CopiedRows::new(rows, &original)), all, original }
    }

    pub(super) fn len(&self) -> usize {
        self.rows().labels.len()
    }

    pub(super) fn rows(&self) -> Rows<'_> {
        self.some.as_ref().map_or_else(|| self.all.view(), CopiedRows::rows)
    }

    /// The caller's row behind a row of [`rows`](Self::rows).
    pub(super) fn original(&self, row: u32) -> u32 {
        if self.some.is_none() { row } else { self.original[row as usize] }
    }

    pub(super) fn label(&self, row: u32) -> i64 {
        self.all.labels[self.original(row) as usize]
    }
}

/// The error with a bad row of `rows` renamed to its place in the caller's matrix, which is called `whose`.
pub(super) fn with_row(error: Error, rows: &str, whose: &'static str, place: impl Fn(usize) -> u32) -> Error {
    match error {
        Error::NotFinite { rows: bad, row } if bad == rows => {
            Error::NotFinite { rows: whose, row: place(row) as usize }
        }
        Error::NotUnit { rows: bad, row, norm } if bad == rows => {
            Error::NotUnit { rows: whose, row: place(row) as usize, norm }
        }
        other => other,
    }
}

/// Copies of some rows, in an order of their own.
pub(super) struct CopiedRows {
    values: OwnedEmbeddings,
    labels: Vec<i64>,
}

impl CopiedRows {
    pub(super) fn new(rows: &Rows<'_>, wanted: &[u32]) -> Self {
        let wanted: Vec<usize> = wanted.iter().map(|&row| row as usize).collect();
        Self {
            values: rows.embeddings.select(&wanted),
            labels: wanted.iter().map(|&row| rows.labels[row]).collect(),
        }
    }

    pub(super) fn rows(&self) -> Rows<'_> {
        Rows { embeddings: self.values.view(), labels: &self.labels }
    }
}
