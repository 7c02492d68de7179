//! From variables to the bytes of a file, stored as MATLAB stores them.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::{Array, Values, Variables};

/// The order in which the bytes of a number lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteOrder {
    /// Least significant first: what every present machine writes.
    Little,
    /// Most significant first: files from old workstations.
    Big,
}

/// The file that holds `variables`, each compressed (level 7, MATLAB's default) or not (level 6).
///
/// Numbers are doubles, kept in the smallest integer type that holds them. Text with characters outside Latin-1
/// is kept as UTF-16. [`Values::Other`] becomes an empty array.
#[must_use]
pub fn encode(variables: &Variables, order: ByteOrder, compressed: bool) -> Vec<u8> {
    let writer = Writer { order };
    let mut file = b"MATLAB 5.0 MAT-file, written by ddtas".to_vec();
    file.resize(124, b' ');
    file.extend(writer.half(0x0100));
    file.extend(if order == ByteOrder::Little { b"IM" } else { b"MI" });
    for (name, array) in &variables.0 {
        let matrix = writer.matrix(name, array);
        if compressed {
            let deflated = deflate(&matrix);
            file.extend(writer.word(15));
            file.extend(writer.word(deflated.len() as u32));
            file.extend(deflated);
        } else {
            file.extend(matrix);
        }
    }
    file
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    // Writing to memory cannot fail.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

struct Writer {
    order: ByteOrder,
}

impl Writer {
    fn word(&self, value: u32) -> [u8; 4] {
        if self.order == ByteOrder::Little { value.to_le_bytes() } else { value.to_be_bytes() }
    }

    fn half(&self, value: u16) -> [u8; 2] {
        if self.order == ByteOrder::Little { value.to_le_bytes() } else { value.to_be_bytes() }
    }

    /// A tag and its bytes: up to 4 of them lie in the tag itself, more are padded to 8.
    fn element(&self, code: u32, bytes: &[u8]) -> Vec<u8> {
        let size = bytes.len() as u32;
        let mut element = Vec::with_capacity(bytes.len() + 16);
        if (1..=4).contains(&bytes.len()) {
            element.extend(self.word(size << 16 | code));
        } else {
            element.extend(self.word(code));
            element.extend(self.word(size));
        }
        element.extend(bytes);
        element.resize(element.len().next_multiple_of(8), 0);
        element
    }

    fn words(&self, code: u32, values: impl Iterator<Item = u32>) -> Vec<u8> {
        let bytes: Vec<u8> = values.flat_map(|value| self.word(value)).collect();
        self.element(code, &bytes)
    }

    fn matrix(&self, name: &str, array: &Array) -> Vec<u8> {
        let class = match &array.values {
            Values::Cells(_) => 1,
            Values::Structs { .. } => 2,
            Values::Text(_) => 4,
            Values::Numbers(_) | Values::Other(_) => 6,
        };
        let shape: &[usize] = if matches!(array.values, Values::Other(_)) { &[0, 0] } else { &array.shape };
        let mut parts = self.words(6, [class, 0].into_iter());
        parts.extend(self.words(5, shape.iter().map(|&side| side as u32)));
        parts.extend(self.element(1, name.as_bytes()));
        match &array.values {
            Values::Numbers(values) => parts.extend(self.numbers(values)),
            Values::Other(_) => parts.extend(self.numbers(&[])),
            Values::Text(rows) => parts.extend(self.text(rows)),
            Values::Cells(cells) => cells.iter().for_each(|cell| parts.extend(self.matrix("", cell))),
            Values::Structs { fields, values } => {
                let width = fields.iter().map(String::len).max().unwrap_or(0) + 1;
                parts.extend(self.words(5, [width as u32].into_iter()));
                let mut names = Vec::with_capacity(width * fields.len());
                for (i, field) in fields.iter().enumerate() {
                    names.extend(field.as_bytes());
                    names.resize((i + 1) * width, 0);
                }
                parts.extend(self.element(1, &names));
                values.iter().for_each(|value| parts.extend(self.matrix("", value)));
            }
        }
        let mut matrix = self.word(14).to_vec();
        matrix.extend(self.word(parts.len() as u32));
        matrix.extend(parts);
        matrix
    }

    fn numbers(&self, values: &[f64]) -> Vec<u8> {
        let within = |most: f64| {
            values.iter().all(|&x| x.fract() == 0.0 && (0.0..=most).contains(&x) && !negative_zero(x))
        };
        if within(255.0) {
            let bytes: Vec<u8> = values.iter().map(|&value| value as u8).collect();
            self.element(2, &bytes)
        } else if within(65_535.0) {
            let bytes: Vec<u8> = values.iter().flat_map(|&value| self.half(value as u16)).collect();
            self.element(4, &bytes)
        } else {
            let double = |value: f64| {
                if self.order == ByteOrder::Little { value.to_le_bytes() } else { value.to_be_bytes() }
            };
            let bytes: Vec<u8> = values.iter().flat_map(|&value| double(value)).collect();
            self.element(9, &bytes)
        }
    }

    /// Rows of one width, column by column.
    fn text(&self, rows: &[String]) -> Vec<u8> {
        let characters: Vec<Vec<char>> = rows.iter().map(|row| row.chars().collect()).collect();
        let width = characters.iter().map(Vec::len).max().unwrap_or(0);
        let columns = (0..width).flat_map(|column| characters.iter().filter_map(move |row| row.get(column)));
        let columns: String = columns.collect();
        if columns.is_ascii() {
            return self.element(16, columns.as_bytes());
        }
        let bytes: Vec<u8> = columns.encode_utf16().flat_map(|unit| self.half(unit)).collect();
        self.element(17, &bytes)
    }
}

fn negative_zero(value: f64) -> bool {
    value == 0.0 && value.is_sign_negative()
}
