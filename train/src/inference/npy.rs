//! NumPy's array files: writes those of `embed`, and reads matrices and labels of other programs.
//!
//! Crates for this format bring a parser of Python literals and a dozen dependencies. The header is one line,
//! which NumPy has written in the same form since its first version.

use std::path::Path;

use ndarray::{Array2, ShapeBuilder};

use crate::{Error, Result};
use ddtas_io::tensors::{Dtype, floats_of, integers_of};

const MAGIC: &[u8] = b"\x93NUMPY";

/// The bytes of a matrix in format 1.0, little-endian float32 in C order.
pub(super) fn write(values: &Array2<f32>) -> Vec<u8> {
    let (rows, dim) = values.dim();
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}");
    // 10 bytes precede the header's text, which ends in a line feed; the data begin at a multiple of 64.
    let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.extend(std::iter::repeat_n(' ', length - 1 - header.len()));
    header.push('\n');
    let mut bytes = [MAGIC, b"\x01\x00"].concat();
    // Two numbers of at most 20 digits: far below the 65,535 bytes that format 1.0 allows.
    bytes.extend((length as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// An array as its header describes it.
struct Array<'a> {
    path: &'a Path,
    dtype: Dtype,
    /// Whether the data are in Fortran (column-major) order.
    by_columns: bool,
    shape: Vec<usize>,
    data: &'a [u8],
}

/// Reads a matrix of floats of any width.
///
/// # Errors
/// [`Format`](ddtas_io::Error::Format) if it is something else.
pub(super) fn matrix(path: &Path, bytes: &[u8]) -> Result<Array2<f32>> {
    let array = Array::parse(path, bytes, "give little-endian numbers")?;
    let [rows, dim] = array.shape[..] else {
        return Err(array.bad(format!("has {} dimensions, not 2", array.shape.len())));
    };
    let values = floats_of(array.dtype, array.data)
        .ok_or_else(|| array.bad(format!("holds {:?}, not floats", array.dtype)))?;
    let shape = (rows, dim).set_f(array.by_columns);
    let values = Array2::from_shape_vec(shape, values).map_err(|error| array.bad(error.to_string()))?;
    Ok(values.as_standard_layout().into_owned())
}

/// Reads labels: a one-dimensional array of integers of any width.
///
/// # Errors
/// [`Format`](ddtas_io::Error::Format) if it is something else.
pub(super) fn labels(path: &Path, bytes: &[u8]) -> Result<Vec<i64>> {
    let array = Array::parse(path, bytes, "labels are little-endian integers, a number for each class")?;
    if array.shape.len() != 1 {
        return Err(array.bad(format!("has {} dimensions, not 1", array.shape.len())));
    }
    integers_of(array.dtype, array.data).map_err(|reason| array.bad(reason))
}

impl<'a> Array<'a> {
    /// Parses a file; `wanted` says what to give in place of another type.
    fn parse(path: &'a Path, bytes: &'a [u8], wanted: &str) -> Result<Self> {
        let bad = |reason: &str| Error::format(path, reason);
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("not a .npy file"))?;
        let cut = || bad("the header of the .npy is cut short");
        let (length, rest) = match rest.first_chunk::<4>().ok_or_else(cut)? {
            [1, _, low, high] => (usize::from(u16::from_le_bytes([*low, *high])), &rest[4..]),
            _ => {
                let length = rest[2..].first_chunk::<4>().ok_or_else(cut)?;
                (u32::from_le_bytes(*length) as usize, &rest[6..])
            }
        };
        let (header, data) = rest.split_at_checked(length).ok_or_else(cut)?;
        let header = String::from_utf8_lossy(header);
        let after = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
        let unknown = || bad(&format!("unknown header of a .npy: {}", header.trim()));
        let descr = after("descr").and_then(|rest| rest.split('\'').nth(1)).ok_or_else(unknown)?;
        let dtype = dtype(descr).ok_or_else(|| bad(&format!("holds {descr}: {wanted}")))?;
        let by_columns = after("fortran_order").ok_or_else(unknown)?.starts_with("True");
        let shape =
            after("shape").and_then(|rest| rest.strip_prefix('(')?.split_once(')')).ok_or_else(unknown)?.0;
        let shape: Option<Vec<usize>> = shape
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .map(|part| part.parse().ok())
            .collect();
        let shape = shape.ok_or_else(unknown)?;
        let count = shape.iter().try_fold(1usize, |all, &side| all.checked_mul(side));
        if count.and_then(|count| count.checked_mul(dtype.bitsize() / 8)) != Some(data.len()) {
            return Err(bad(&format!("the .npy has {} bytes of data, not those of its shape", data.len())));
        }
        Ok(Self { path, dtype, by_columns, shape, data })
    }

    fn bad(&self, reason: String) -> Error {
        Error::format(self.path, reason)
    }
}

/// The type with NumPy's name `descr`.
fn dtype(descr: &str) -> Option<Dtype> {
    Some(match descr {
        "<f2" => Dtype::F16,
        "<f4" => Dtype::F32,
        "<f8" => Dtype::F64,
        "|i1" => Dtype::I8,
        "|u1" => Dtype::U8,
        "<i2" => Dtype::I16,
        "<u2" => Dtype::U16,
        "<i4" => Dtype::I32,
        "<u4" => Dtype::U32,
        "<i8" => Dtype::I64,
        "<u8" => Dtype::U64,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    /// A file as numpy.save writes it.
    fn saved(version: u8, descr: &str, order: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}   \n");
        let length = (header.len() as u32).to_le_bytes();
        let length = if version == 1 { &length[..2] } else { &length[..] };
        [MAGIC, &[version, 0], length, header.as_bytes(), data].concat()
    }

    #[test]
    fn matrices_are_read_in_either_order_and_width() {
        let path = Path::new("m.npy");
        let wanted = array![[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]];
        assert_eq!(matrix(path, &write(&wanted)).unwrap(), wanted);
        let doubles = |values: [f64; 6]| values.map(f64::to_le_bytes).concat();
        let rows = saved(2, "<f8", "False", "(2, 3)", &doubles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        assert_eq!(matrix(path, &rows).unwrap(), wanted);
        let columns = saved(1, "<f8", "True", "(2, 3)", &doubles([1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        assert_eq!(matrix(path, &columns).unwrap(), wanted);
        for (bytes, what) in [
            (saved(1, ">f4", "False", "(1, 1)", &[0; 4]), "little-endian"),
            (saved(1, "<f4", "False", "(2, 1)", &[0; 4]), "not those of its shape"),
            (saved(1, "<f4", "False", "(1,)", &[0; 4]), "1 dimensions"),
            (saved(1, "<i4", "False", "(1, 1)", &[0; 4]), "not floats"),
            (rows[..20].to_vec(), "cut short"),
            (b"text".to_vec(), "not a .npy"),
        ] {
            let said = matrix(path, &bytes).unwrap_err().to_string();
            assert!(said.contains(what) && said.contains("m.npy"), "{said}");
        }
    }

    #[test]
    fn labels_are_integers_of_any_type() {
        let path = Path::new("l.npy");
        for (descr, data) in [
            ("|i1", vec![7, 0xfe]),
            ("<i2", vec![7, 0, 0xfe, 0xff]),
            ("<i8", [7i64, -2].map(i64::to_le_bytes).concat()),
        ] {
            assert_eq!(labels(path, &saved(1, descr, "False", "(2,)", &data)).unwrap(), [7, -2], "{descr}");
        }
        for (descr, data) in
            [("|u1", vec![7, 0xfe]), ("<u2", vec![7, 0, 0xfe, 0]), ("<u4", vec![7, 0, 0, 0, 0xfe, 0, 0, 0])]
        {
            assert_eq!(labels(path, &saved(1, descr, "False", "(2,)", &data)).unwrap(), [7, 254], "{descr}");
        }
        for (descr, data, what) in [
            (
                "<u8",
                u64::MAX.to_le_bytes().to_vec(),
                "holds 18446744073709551615: at most 9223372036854775807",
            ),
            ("<f4", vec![0; 4], "holds F32: give integers"),
            ("<U3", vec![0; 12], "holds <U3: labels are little-endian integers"),
        ] {
            let said = labels(path, &saved(1, descr, "False", "(1,)", &data)).unwrap_err().to_string();
            assert!(said.contains(what) && said.contains("l.npy"), "{said}");
        }
    }
}
