//! From bytes to variables.

use std::io::Read;

use flate2::read::ZlibDecoder;

use super::element::{Elements, Kind};
use super::{Array, MAX_BYTES, Values, Variables};

/// Arrays in arrays: deeper ones are refused, so that a hostile file cannot exhaust the stack.
const MAX_DEPTH: usize = 32;
const HEADER: usize = 128;

/// Characters of a name, and of a whole error, that are shown: a file may hold any nonsense.
const LONGEST_NAME: usize = 40;
const LONGEST_REASON: usize = 300;

/// Parses a whole file.
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
    let (big_endian, version) = match &header[124..] {
        [low, high, b'I', b'M'] => (false, u16::from_le_bytes([*low, *high])),
        [high, low, b'M', b'I'] => (true, u16::from_be_bytes([*high, *low])),
        _ => return Err("not a MAT-file of level 5: it has no byte-order mark".into()),
    };
    if version != 0x0100 {
        return Err(format!("a MAT-file of version {version:#06x}: only 0x0100 (levels 5 to 7) is read"));
    }
    let mut parser = Parser { inflatable: MAX_BYTES };
    let mut elements = Elements::new(body, big_endian);
    let mut variables = Variables::default();
    while elements.left() > 0 {
        let what = format!("variable {}", variables.0.len() + 1);
        let element = elements.next(&what)?;
        let variable = match element.kind {
            Kind::Matrix => parser.matrix(Elements::new(element.bytes, big_endian), &what, 0)?,
            Kind::Compressed => {
                let inflated = parser.inflate(element.bytes, &what)?;
                let mut inner = Elements::new(&inflated, big_endian);
                let matrix = inner.expect(Kind::Matrix, &what)?;
                if inner.left() > 0 {
                    return Err(format!("{what}: {} bytes are left over behind it", inner.left()));
                }
                parser.matrix(Elements::new(matrix.bytes, big_endian), &what, 0)?
            }
            other => return Err(format!("{what} is stored as {other:?}, not as a matrix")),
        };
        variables.0.push(variable);
    }
    Ok(variables)
}

struct Parser {
    /// Bytes that may still be inflated.
    inflatable: usize,
}

/// Bits of an array's flags.
const COMPLEX: u32 = 0x0800;

impl Parser {
    fn inflate(&mut self, bytes: &[u8], what: &str) -> Result<Vec<u8>, String> {
        let mut inflated = Vec::new();
        // One more than allowed, to tell a file at the limit from one past it.
        let mut decoder = ZlibDecoder::new(bytes).take(self.inflatable as u64 + 1);
        decoder.read_to_end(&mut inflated).map_err(|error| format!("{what} cannot be inflated: {error}"))?;
        self.inflatable = self.inflatable.checked_sub(inflated.len()).ok_or_else(|| {
            format!("{what} inflates to more than the {MAX_BYTES} bytes that are read of a file")
        })?;
        Ok(inflated)
    }

    /// The name and the array of the matrix that is made of `parts`.
    fn matrix(
        &mut self,
        mut parts: Elements<'_>,
        what: &str,
        depth: usize,
    ) -> Result<(String, Array), String> {
        if parts.left() == 0 {
            // What MATLAB stores for a field or cell that nothing was put in.
            return Ok((String::new(), Array { shape: vec![0, 0], values: Values::Numbers(Vec::new()) }));
        }
        if depth > MAX_DEPTH {
            return Err(format!("arrays nested more than {MAX_DEPTH} deep: {what}"));
        }
        let flags = parts.expect(Kind::U32, &format!("the flags of {what}"))?.numbers(what)?;
        let [flags, _] = flags[..] else {
            return Err(format!("{what} has {} flag words, not 2", flags.len()));
        };
        let flags = flags as u32;
        let class = flags & 0xff;
        if class == 17 {
            // An opaque object, which has no dimensions.
            return Ok((
                String::new(),
                Array { shape: Vec::new(), values: Values::Other("an opaque object") },
            ));
        }
        let shape = shape(&mut parts, what)?;
        let count = shape.iter().try_fold(1usize, |count, &side| count.checked_mul(side));
        let count =
            count.ok_or_else(|| format!("{what} claims more elements than can be counted: {shape:?}"))?;
        let name = parts.expect(Kind::I8, &format!("the name of {what}"))?.characters(what)?;
        let name: String = name.into_iter().collect();
        let what = if depth == 0 && !name.is_empty() { &format!("variable {}", shown(&name)) } else { what };
        if flags & COMPLEX != 0 {
            return Err(format!("{what} holds complex numbers, which are not read"));
        }
        let values = match class {
            1 => Values::Cells(self.arrays(
                &mut parts,
                count,
                &|i| format!("cell {} of {what}", i + 1),
                depth,
            )?),
            2 => self.structs(&mut parts, count, what, depth)?,
            4 => text(&mut parts, &shape, count, what)?,
            6..=15 => numbers(&mut parts, count, what)?,
            3 => Values::Other("an object"),
            5 => Values::Other("a sparse matrix"),
            16 => Values::Other("a function handle"),
            other => return Err(format!("{what} is of the unknown class {other}")),
        };
        if parts.left() > 0 && !matches!(values, Values::Other(_)) {
            return Err(format!("{what}: {} bytes are left over behind its values", parts.left()));
        }
        Ok((name, Array { shape, values }))
    }

    /// `count` matrices, one behind the other.
    fn arrays(
        &mut self,
        parts: &mut Elements<'_>,
        count: usize,
        name: &dyn Fn(usize) -> String,
        depth: usize,
    ) -> Result<Vec<Array>, String> {
        // Each takes at least a tag.
        if count > parts.left() / 8 {
            return Err(format!("the file ends before {}", name(parts.left() / 8)));
        }
        let mut arrays = Vec::with_capacity(count);
        for i in 0..count {
            let element = parts.next(&name(i))?;
            if element.kind != Kind::Matrix {
                return Err(format!("{} is stored as {:?}, not as a matrix", name(i), element.kind));
            }
            let inner = Elements::new(element.bytes, element.big_endian);
            arrays.push(self.matrix(inner, &name(i), depth + 1)?.1);
        }
        Ok(arrays)
    }

    fn structs(
        &mut self,
        parts: &mut Elements<'_>,
        count: usize,
        what: &str,
        depth: usize,
    ) -> Result<Values, String> {
        let length = parts.expect(Kind::I32, &format!("the field-name length of {what}"))?.numbers(what)?;
        let width = match length[..] {
            [width] if (1.0..=4096.0).contains(&width) => width as usize,
            _ => return Err(format!("{what} has no field-name length of 1 to 4096")),
        };
        let names = parts.expect(Kind::I8, &format!("the field names of {what}"))?;
        if !names.bytes.len().is_multiple_of(width) {
            return Err(format!("{what}: {} bytes of field names of {width} each", names.bytes.len()));
        }
        let name = |bytes: &[u8]| {
            bytes.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect()
        };
        let fields: Vec<String> = names.bytes.chunks_exact(width).map(name).collect();
        let total = count
            .checked_mul(fields.len())
            .ok_or_else(|| format!("{what} claims {count} structs of {} fields", fields.len()))?;
        let label = |i: usize| {
            let field = shown(&fields[i % fields.len()]);
            format!("field {field} of struct {} of {what}", i / fields.len() + 1)
        };
        let values = self.arrays(parts, total, &label, depth)?;
        Ok(Values::Structs { fields, values })
    }
}

/// The first `most` characters of `text`.
fn first(text: &str, most: usize) -> String {
    let end = text.char_indices().nth(most).map_or(text.len(), |(end, _)| end);
    let dots = if end < text.len() { "..." } else { "" };
    format!("{}{dots}", &text[..end])
}

/// A name out of a file, on one line.
fn shown(name: &str) -> String {
    first(name, LONGEST_NAME).escape_debug().to_string()
}

fn shape(parts: &mut Elements<'_>, what: &str) -> Result<Vec<usize>, String> {
    let sides = parts.expect(Kind::I32, &format!("the dimensions of {what}"))?.numbers(what)?;
    if !(2..=32).contains(&sides.len()) {
        return Err(format!("{what} has {} dimensions, not 2 to 32", sides.len()));
    }
    if sides.iter().any(|&side| side < 0.0) {
        return Err(format!("{what} has the dimensions {sides:?}"));
    }
    Ok(sides.into_iter().map(|side| side as usize).collect())
}

fn numbers(parts: &mut Elements<'_>, count: usize, what: &str) -> Result<Values, String> {
    let values = parts.next(&format!("the values of {what}"))?.numbers(what)?;
    if values.len() != count {
        return Err(format!("{what} has {} values where its dimensions ask for {count}", values.len()));
    }
    Ok(Values::Numbers(values))
}

fn text(parts: &mut Elements<'_>, shape: &[usize], count: usize, what: &str) -> Result<Values, String> {
    let characters = parts.next(&format!("the text of {what}"))?.characters(what)?;
    // Dimensions count units of UTF-16.
    let units: usize = characters.iter().map(|character| character.len_utf16()).sum();
    if units != count {
        return Err(format!("{what} has {units} characters where its dimensions ask for {count}"));
    }
    let rows = shape[0];
    Ok(Values::Text(match (count, rows) {
        (0, _) => Vec::new(),
        (_, 1) => vec![characters.into_iter().collect()],
        _ if characters.len() == count => {
            (0..rows).map(|row| characters.iter().skip(row).step_by(rows).collect()).collect()
        }
        _ => return Err(format!("{what}: several rows of text with characters outside the basic plane")),
    }))
}
