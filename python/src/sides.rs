//! A batch as Python passes it.

use ddtas::loss::{Batch, Rows, UnitCheck};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::input::{Known, Labels, Matrix};

/// Names of the two sides and of the arguments in messages.
pub struct Names {
    anchors: &'static str,
    labels: &'static str,
    /// The arguments of the other side.
    others: [&'static str; 2],
}

/// Names of a loss.
pub const LOSS: Names =
    Names { anchors: "anchors", labels: "labels", others: ["references", "reference_labels"] };

/// Names of a search.
pub const SEARCH: Names =
    Names { anchors: "queries", labels: "labels of the queries", others: ["gallery", "gallery_labels"] };

/// Both sides of a batch, each with its labels.
pub struct Sides<'py> {
    pub anchors: (Matrix<'py>, Labels<'py>),
    pub references: Option<(Matrix<'py>, Labels<'py>)>,
    pub identity: Known,
}

impl<'py> Sides<'py> {
    pub fn new(
        names: &Names,
        anchors: (&Bound<'py, PyAny>, &Bound<'py, PyAny>),
        references: (Option<&Bound<'py, PyAny>>, Option<&Bound<'py, PyAny>>),
        identity: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let references = match references {
            (None, None) => None,
            (Some(rows), Some(labels)) => {
                Some((Matrix::new("references", rows)?, Labels::new("labels of the references", labels)?))
            }
            _ => {
                let [rows, labels] = names.others;
                let message = format!("{rows} and {labels} belong together: give both or neither");
                return Err(PyValueError::new_err(message));
            }
        };
        let labels = Labels::new(names.labels, anchors.1)?;
        let sides = Self {
            anchors: (Matrix::new(names.anchors, anchors.0)?, labels),
            references,
            identity: Known::new(identity)?,
        };
        if identity.is_some() && sides.references.is_none() {
            let message = "identity says which references are anchors, and there are no references";
            return Err(PyValueError::new_err(message));
        }
        Ok(sides)
    }

    pub fn is_double(&self) -> bool {
        self.anchors.0.is_double()
    }

    pub fn batch(&self, reference_gradient: bool, check: UnitCheck) -> PyResult<Batch<'_>> {
        let references = self.references.as_ref().map(rows).transpose()?;
        Ok(Batch {
            anchors: rows(&self.anchors)?,
            references,
            identity: self.identity.as_library(),
            reference_gradient,
            total: None,
            check,
        })
    }
}

pub fn rows<'a>((matrix, labels): &'a (Matrix<'_>, Labels<'_>)) -> PyResult<Rows<'a>> {
    Ok(Rows { embeddings: matrix.single()?, labels: labels.as_slice()? })
}

pub fn unit_check(check: bool) -> UnitCheck {
    if check { UnitCheck::Check } else { UnitCheck::Trust }
}
