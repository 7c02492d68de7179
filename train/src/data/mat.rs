//! Reads MAT-files of level 5, as far as Cars196's annotations use them: numbers, lines of text, cells and
//! arrays of structs, compressed or not, little-endian. Anything else is an error that names it.
//!
//! Sizes in a file are not trusted: nothing is allocated that the remaining bytes could not fill. Since a few kilobytes can
//! inflate to millions of empty arrays, the memory of arrays is also counted, before it is allocated.

use std::cell::Cell;
use std::io::Read;
use std::path::Path;

use flate2::read::ZlibDecoder;

use crate::{Error, Result};

/// Largest size of a file, and of its inflated contents, in bytes. The largest of Cars196 has some 7 MB.
pub const MAX_BYTES: usize = 64 << 20;

/// Bytes of memory that a file's arrays may take. Those of Cars196 take some 10 MB.
const MAX_MEMORY: usize = 128 << 20;

/// Bytes counted for the name of a field, besides its characters.
const NAME: usize = 64;

/// Deepest nesting of arrays that is accepted, so that a malicious file cannot exhaust the stack.
const MAX_DEPTH: usize = 32;
const HEADER: usize = 128;

/// Characters shown of a name from a file, and of a whole error message.
const LONGEST_NAME: usize = 40;
const LONGEST_REASON: usize = 300;

/// Types of data elements, `mi...` in the format's specification.
const I8: u32 = 1;
const I32: u32 = 5;
const U32: u32 = 6;
const MATRIX: u32 = 14;
const COMPRESSED: u32 = 15;

/// A MATLAB array, its elements in column-major order.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Numbers of any type, and logicals as 0 and 1. 64-bit integers past 2^53 are rounded.
    Numbers(Vec<f64>),
    /// One line of text; empty if there is none.
    Text(String),
    /// A cell array.
    Cells(Vec<Array>),
    /// An array of structs.
    Structs {
        /// Names of the fields.
        fields: Vec<String>,
        /// Values of the first struct's fields in the order of `fields`, then those of the second, and so on.
        values: Vec<Array>,
    },
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
    /// The number, if the array is a single one.
    #[must_use]
    pub fn as_number(&self) -> Option<f64> {
        match self {
            Self::Numbers(values) if values.len() == 1 => Some(values[0]),
            _ => None,
        }
    }

    /// The text, if the array is text.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The elements, if it is a cell array.
    #[must_use]
    pub fn as_cells(&self) -> Option<&[Self]> {
        match self {
            Self::Cells(cells) => Some(cells),
            _ => None,
        }
    }

    /// The field `name` of every struct in order, if it is an array of structs that has it.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<Vec<&Self>> {
        let Self::Structs { fields, values } = self else { return None };
        let place = fields.iter().position(|field| field == name)?;
        Some(values.iter().skip(place).step_by(fields.len()).collect())
    }
}

/// Reads the file `path`.
///
/// # Errors
/// [`Io`](ddtas_io::Error::Io); [`Format`](ddtas_io::Error::Format) as [`parse`].
pub fn read(path: &Path) -> Result<Variables> {
    let size = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    if size > MAX_BYTES as u64 {
        let reason = format!("a MAT-file of {size} bytes: more than {MAX_BYTES} are not read");
        return Err(Error::format(path, reason));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    parse(&bytes).map_err(|reason| Error::format(path, reason))
}

/// Parses the bytes of a whole file.
///
/// # Errors
/// What is wrong with the file, in one line.
pub fn parse(bytes: &[u8]) -> Result<Variables, String> {
    parse_file(bytes).map_err(|reason| first(&reason, LONGEST_REASON))
}

fn parse_file(bytes: &[u8]) -> Result<Variables, String> {
    if bytes.starts_with(b"\x89HDF") || bytes.starts_with(b"MATLAB 7.3 MAT-file") {
        return Err(
            "a MAT-file of level 7.3 (HDF5), of which only levels 5 to 7 are read: save it with -v7".into()
        );
    }
    let (header, body) = bytes.split_at_checked(HEADER).ok_or("not a MAT-file: shorter than its header")?;
    if header[124..] != [0, 1, b'I', b'M'] {
        return Err("not a little-endian MAT-file of level 5".into());
    }
    let mut inflatable = MAX_BYTES;
    let memory = Cell::new(MAX_MEMORY);
    let mut elements = Elements { bytes: body, memory: &memory };
    let mut variables = Variables::default();
    while !elements.bytes.is_empty() {
        let what = format!("variable {}", variables.0.len() + 1);
        elements.claim(1, NAME + size_of::<Array>(), &what)?;
        let (kind, bytes) = elements.next(&what)?;
        let inflated;
        let bytes = match kind {
            MATRIX => bytes,
            COMPRESSED => {
                inflated = inflate(bytes, &mut inflatable, &what)?;
                Elements { bytes: &inflated, memory: &memory }.expect(MATRIX, &what)?
            }
            other => return Err(format!("{what} is of type {other}, no matrix")),
        };
        variables.0.push(matrix(Elements { bytes, memory: &memory }, &what, 0)?);
    }
    Ok(variables)
}

fn inflate(bytes: &[u8], inflatable: &mut usize, what: &str) -> Result<Vec<u8>, String> {
    let mut inflated = Vec::new();
    // Reads one byte more than allowed, to detect contents above the limit.
    let mut decoder = ZlibDecoder::new(bytes).take(*inflatable as u64 + 1);
    decoder.read_to_end(&mut inflated).map_err(|error| format!("{what} cannot be inflated: {error}"))?;
    *inflatable = inflatable.checked_sub(inflated.len()).ok_or_else(|| {
        format!("{what} inflates to more than the {MAX_BYTES} bytes that are read of a file")
    })?;
    Ok(inflated)
}

/// Reads data elements one after the other. An element is a type, a size and that many bytes.
struct Elements<'a> {
    bytes: &'a [u8],
    /// Bytes of memory that the file's arrays may still take.
    memory: &'a Cell<usize>,
}

impl<'a> Elements<'a> {
    /// Type and bytes of the next element; `what` names it in errors.
    fn next(&mut self, what: &str) -> Result<(u32, &'a [u8]), String> {
        let cut = || format!("the file ends within {what}");
        let (tag, rest) = self.bytes.split_at_checked(8).ok_or_else(cut)?;
        let (first, size) = (word(&tag[..4]), word(&tag[4..]) as usize);
        // A small element has its size in the upper half of the type's word, and its bytes in the tag itself.
        if first >> 16 != 0 {
            let size = (first >> 16) as usize;
            let small = tag[4..].get(..size);
            self.bytes = rest;
            let bytes = small.ok_or_else(|| format!("{what} claims {size} bytes in a tag that has 4"))?;
            return Ok((first & 0xffff, bytes));
        }
        let bytes = rest.get(..size).ok_or_else(cut)?;
        // The next element starts at a multiple of 8; some writers leave the last one unpadded.
        let padded = if first == COMPRESSED { size } else { size.next_multiple_of(8) };
        self.bytes = &rest[padded.min(rest.len())..];
        Ok((first, bytes))
    }

    /// The bytes of the next element, which must be of `kind`.
    fn expect(&mut self, kind: u32, what: &str) -> Result<&'a [u8], String> {
        match self.next(what)? {
            (found, bytes) if found == kind => Ok(bytes),
            (found, _) => Err(format!("{what} is of type {found}, not {kind}")),
        }
    }

    /// Counts the memory of `count` items of `size` bytes that `what` will take; an error if it exceeds the limit.
    fn claim(&self, count: usize, size: usize, what: &str) -> Result<(), String> {
        let left = self.memory.get().checked_sub(count.saturating_mul(size));
        let told =
            || format!("{what} does not fit the {MAX_MEMORY} bytes of memory that a file's arrays may take");
        self.memory.set(left.ok_or_else(told)?);
        Ok(())
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Name and array of a matrix element with the contents `parts`.
fn matrix(mut parts: Elements<'_>, what: &str, depth: usize) -> Result<(String, Array), String> {
    if parts.bytes.is_empty() {
        // MATLAB stores a field or cell without value so.
        return Ok((String::new(), Array::Numbers(Vec::new())));
    }
    if depth > MAX_DEPTH {
        return Err(format!("arrays nested more than {MAX_DEPTH} deep: {what}"));
    }
    let flags = parts.expect(U32, &format!("the flags of {what}"))?;
    let class = flags.first().copied().unwrap_or(0);
    let is_complex = flags.get(1).is_some_and(|bits| bits & 8 != 0);
    let sides = parts.expect(I32, &format!("the dimensions of {what}"))?;
    let sides: Vec<usize> = sides.as_chunks::<4>().0.iter().map(|side| word(side) as usize).collect();
    let count = sides.iter().try_fold(1usize, |count, &side| count.checked_mul(side));
    let count = count.ok_or_else(|| format!("{what} claims more elements than can be counted: {sides:?}"))?;
    let name = text_of(I8, parts.expect(I8, &format!("the name of {what}"))?, what)?;
    let what = if depth == 0 && !name.is_empty() { &format!("variable {}", shown(&name)) } else { what };
    let array = match class {
        _ if is_complex => return Err(format!("{what} holds complex numbers, which are not read")),
        1 => Array::Cells(arrays(&mut parts, count, &|i| format!("cell {} of {what}", i + 1), depth)?),
        2 => structs(&mut parts, count, what, depth)?,
        4 => {
            let (kind, bytes) = parts.next(&format!("the text of {what}"))?;
            if count > 0 && sides.first() != Some(&1) {
                return Err(format!("{what} is a block of text, of which only lines are read"));
            }
            parts.claim(bytes.len(), 2, what)?;
            Array::Text(text_of(kind, bytes, what)?)
        }
        6..=15 => {
            let (kind, bytes) = parts.next(&format!("the values of {what}"))?;
            parts.claim(count.min(bytes.len()), size_of::<f64>(), what)?;
            Array::Numbers(numbers_of(kind, bytes, count, what)?)
        }
        other => return Err(format!("{what} is of class {other}, which is not read")),
    };
    Ok((name, array))
}

/// Reads `count` consecutive matrices.
fn arrays(
    parts: &mut Elements<'_>,
    count: usize,
    name: &dyn Fn(usize) -> String,
    depth: usize,
) -> Result<Vec<Array>, String> {
    // Each has at least a tag of 8 bytes.
    if count > parts.bytes.len() / 8 {
        return Err(format!("the file ends before {}", name(parts.bytes.len() / 8)));
    }
    parts.claim(count, size_of::<Array>(), &name(0))?;
    let mut arrays = Vec::with_capacity(count);
    for i in 0..count {
        let what = name(i);
        let bytes = parts.expect(MATRIX, &what)?;
        arrays.push(matrix(Elements { bytes, ..*parts }, &what, depth + 1)?.1);
    }
    Ok(arrays)
}

fn structs(parts: &mut Elements<'_>, count: usize, what: &str, depth: usize) -> Result<Array, String> {
    let width = parts.expect(I32, &format!("the field-name length of {what}"))?;
    let width = if width.len() == 4 { word(width) as usize } else { 0 };
    let names = parts.expect(I8, &format!("the field names of {what}"))?;
    if width == 0 || names.is_empty() || !names.len().is_multiple_of(width) {
        return Err(format!("{what}: {} bytes of field names of {width} each", names.len()));
    }
    parts.claim(names.len() / width, NAME + width, what)?;
    let name =
        |bytes: &[u8]| bytes.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect();
    let fields: Vec<String> = names.chunks_exact(width).map(name).collect();
    let total = count
        .checked_mul(fields.len())
        .ok_or_else(|| format!("{what} claims {count} structs of {} fields", fields.len()))?;
    let label = |i: usize| {
        let field = shown(&fields[i % fields.len()]);
        format!("field {field} of struct {} of {what}", i / fields.len() + 1)
    };
    let values = arrays(parts, total, &label, depth)?;
    Ok(Array::Structs { fields, values })
}

/// Converts `count` values of the stored type `kind` to f64.
fn numbers_of(kind: u32, bytes: &[u8], count: usize, what: &str) -> Result<Vec<f64>, String> {
    fn each<const N: usize>(bytes: &[u8], count: usize, number: impl Fn([u8; N]) -> f64) -> Option<Vec<f64>> {
        let (chunks, rest) = bytes.as_chunks::<N>();
        let whole = rest.is_empty() && chunks.len() == count;
        whole.then(|| chunks.iter().map(|&chunk| number(chunk)).collect())
    }
    let values = match kind {
        I8 => each(bytes, count, |[byte]| f64::from(byte.cast_signed())),
        2 => each(bytes, count, |[byte]| f64::from(byte)),
        3 => each(bytes, count, |chunk| f64::from(i16::from_le_bytes(chunk))),
        4 => each(bytes, count, |chunk| f64::from(u16::from_le_bytes(chunk))),
        I32 => each(bytes, count, |chunk| f64::from(i32::from_le_bytes(chunk))),
        U32 => each(bytes, count, |chunk| f64::from(u32::from_le_bytes(chunk))),
        7 => each(bytes, count, |chunk| f64::from(f32::from_le_bytes(chunk))),
        9 => each(bytes, count, f64::from_le_bytes),
        12 => each(bytes, count, |chunk| i64::from_le_bytes(chunk) as f64),
        13 => each(bytes, count, |chunk| u64::from_le_bytes(chunk) as f64),
        other => return Err(format!("{what}: numbers of type {other}")),
    };
    values.ok_or_else(|| {
        format!("{what} has {} bytes of type {kind} where its dimensions ask for {count} values", bytes.len())
    })
}

/// Decodes text stored as Latin-1, UTF-8 or UTF-16.
fn text_of(kind: u32, bytes: &[u8], what: &str) -> Result<String, String> {
    let bad = || format!("{what}: text that is not valid");
    match kind {
        I8 | 2 => Ok(bytes.iter().map(|&byte| char::from(byte)).collect()),
        16 => Ok(std::str::from_utf8(bytes).map_err(|_| bad())?.to_owned()),
        4 | 17 => {
            let (units, rest) = bytes.as_chunks::<2>();
            let units = units.iter().map(|&unit| u16::from_le_bytes(unit));
            let text = char::decode_utf16(units).collect::<Result<String, _>>().map_err(|_| bad())?;
            if rest.is_empty() { Ok(text) } else { Err(bad()) }
        }
        other => Err(format!("{what}: text of type {other}")),
    }
}

/// The first `most` characters of `text`, with dots if there are more.
fn first(text: &str, most: usize) -> String {
    let end = text.char_indices().nth(most).map_or(text.len(), |(end, _)| end);
    let dots = if end < text.len() { "..." } else { "" };
    format!("{}{dots}", &text[..end])
}

/// A name from a file for a message: shortened, on one line.
fn shown(name: &str) -> String {
    first(name, LONGEST_NAME).escape_debug().to_string()
}
