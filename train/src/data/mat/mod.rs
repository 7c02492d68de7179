//! MAT-files of level 5, what MATLAB writes unless told `-v7.3`: Cars196's annotations come in them.
//!
//! [`read`] and [`parse`] take all numeric types, logicals, text, cells and arrays of structs, compressed
//! or not, in both byte orders. Sparse matrices, objects and function handles are passed over as
//! [`Values::Other`]; complex numbers are refused.
//!
//! A size in a file is a claim: nothing is allocated on its word that the bytes at hand could not fill.

mod element;
mod parse;

use std::path::Path;

pub use parse::parse;

use crate::{Error, Result};

/// Bytes a file may have, and what it may inflate to: the largest known one, Cars196's, has some 7 MB.
pub const MAX_BYTES: usize = 64 << 20;

/// A MATLAB array.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Rows, columns, and further dimensions.
    pub shape: Vec<usize>,
    /// Its elements, in column-major order.
    pub values: Values,
}

/// The elements of an [`Array`].
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Numbers of any type, and logicals as 0 and 1. 64-bit integers past 2^53 are rounded.
    Numbers(Vec<f64>),
    /// Text, a string for each row.
    Text(Vec<String>),
    /// A cell array.
    Cells(Vec<Array>),
    /// An array of structs.
    Structs {
        /// Names of the fields.
        fields: Vec<String>,
        /// The fields of the first struct in the order of `fields`, then those of the second, ...
        values: Vec<Array>,
    },
    /// A kind of array that is not read, by its name.
    Other(&'static str),
}

/// The variables of a file, in its order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Variables(pub Vec<(String, Array)>);

impl Variables {
    /// The variable `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Array> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, array)| array)
    }
}

impl Array {
    /// One number.
    #[must_use]
    pub fn number(value: f64) -> Self {
        Self { shape: vec![1, 1], values: Values::Numbers(vec![value]) }
    }

    /// One row of text.
    #[must_use]
    pub fn text(text: &str) -> Self {
        let width = text.encode_utf16().count();
        let rows = if width == 0 { Vec::new() } else { vec![text.to_string()] };
        Self { shape: vec![rows.len(), width], values: Values::Text(rows) }
    }

    /// A row of cells.
    #[must_use]
    pub fn cells(values: Vec<Self>) -> Self {
        Self { shape: vec![1, values.len()], values: Values::Cells(values) }
    }

    /// A row of structs with these fields, their values as in [`Values::Structs`].
    #[must_use]
    pub fn structs(fields: &[&str], values: Vec<Self>) -> Self {
        let fields: Vec<String> = fields.iter().map(ToString::to_string).collect();
        let count = values.len().checked_div(fields.len()).unwrap_or(0);
        Self { shape: vec![1, count], values: Values::Structs { fields, values } }
    }

    /// The number, if it is just one.
    #[must_use]
    pub fn as_number(&self) -> Option<f64> {
        match &self.values {
            Values::Numbers(values) if values.len() == 1 => Some(values[0]),
            _ => None,
        }
    }

    /// The text, if it has one row or none.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match &self.values {
            Values::Text(rows) if rows.len() <= 1 => Some(rows.first().map_or("", String::as_str)),
            _ => None,
        }
    }

    /// The elements of a cell array.
    #[must_use]
    pub fn as_cells(&self) -> Option<&[Self]> {
        match &self.values {
            Values::Cells(cells) => Some(cells),
            _ => None,
        }
    }

    /// The field `name` of every struct of an array of them, in order.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<Vec<&Self>> {
        let Values::Structs { fields, values } = &self.values else { return None };
        let place = fields.iter().position(|field| field == name)?;
        Some(values.iter().skip(place).step_by(fields.len()).collect())
    }
}

/// Reads a file.
///
/// # Errors
/// [`Io`](ddtas_io::Error::Io); [`Format`](ddtas_io::Error::Format) as [`parse`].
pub fn read(path: &Path) -> Result<Variables> {
    let size = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    if size > MAX_BYTES as u64 {
        return Err(Error::format(
            path,
            format!("a MAT-file of {size} bytes: more than {MAX_BYTES} are not read"),
        ));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    parse(&bytes).map_err(|reason| Error::format(path, reason))
}
