//! The references: embeddings of regions seen earlier, in a ring.

use ddtas::loss::Rows;
use ndarray::{Array2, ArrayView2, s};

/// At most `capacity` rows; the oldest make room for new ones.
pub struct Bank {
    rows: Array2<f32>,
    labels: Vec<i64>,
    next: usize,
    capacity: usize,
}

impl Bank {
    pub fn new(capacity: usize, dim: usize) -> Self {
        Self { rows: Array2::zeros((capacity, dim)), labels: Vec::new(), next: 0, capacity }
    }

    /// Adds rows with their labels.
    pub fn push(&mut self, rows: ArrayView2<'_, f32>, labels: &[i64]) {
        for (row, &label) in rows.outer_iter().zip(labels) {
            self.rows.row_mut(self.next).assign(&row);
            if self.next < self.labels.len() {
                self.labels[self.next] = label;
            } else {
                self.labels.push(label);
            }
            self.next = (self.next + 1) % self.capacity;
        }
    }

    /// What it holds, as the references of a batch.
    pub fn rows(&self) -> Rows<'_> {
        Rows::new(self.rows.slice(s![..self.labels.len(), ..]), &self.labels)
    }
}
