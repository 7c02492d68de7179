//! Data elements: a type, a size, and that many bytes. Everything in a MAT-file is made of them.

/// What the bytes of an element are: the format's `mi` types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
    Matrix,
    Compressed,
    Utf8,
    Utf16,
    Utf32,
}

impl Kind {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            1 => Self::I8,
            2 => Self::U8,
            3 => Self::I16,
            4 => Self::U16,
            5 => Self::I32,
            6 => Self::U32,
            7 => Self::F32,
            9 => Self::F64,
            12 => Self::I64,
            13 => Self::U64,
            14 => Self::Matrix,
            15 => Self::Compressed,
            16 => Self::Utf8,
            17 => Self::Utf16,
            18 => Self::Utf32,
            _ => return None,
        })
    }
}

/// An element of a file, its bytes still in the file's order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Element<'a> {
    pub kind: Kind,
    pub bytes: &'a [u8],
    pub big_endian: bool,
}

/// Takes elements off the front of a stretch of bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Elements<'a> {
    rest: &'a [u8],
    big_endian: bool,
}

impl<'a> Elements<'a> {
    pub fn new(rest: &'a [u8], big_endian: bool) -> Self {
        Self { rest, big_endian }
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next element; `what` names it in errors.
    pub fn next(&mut self, what: &str) -> Result<Element<'a>, String> {
        let cut = || format!("the file ends within {what}");
        let (tag, rest) = self.rest.split_at_checked(8).ok_or_else(cut)?;
        let (first, second) = (word(tag, self.big_endian), word(&tag[4..], self.big_endian));
        let kind =
            |code| Kind::from_code(code).ok_or_else(|| format!("{what} has the unknown data type {code}"));
        // A small element has its size in the upper half of the type's word, and its bytes in the tag.
        let (kind, bytes, taken) = if first >> 16 != 0 {
            let size = (first >> 16) as usize;
            let bytes = tag[4..]
                .get(..size)
                .ok_or_else(|| format!("{what} claims {size} bytes in a tag that has 4"))?;
            (kind(first & 0xffff)?, bytes, 0)
        } else {
            let (kind, size) = (kind(first)?, second as usize);
            let bytes = rest.get(..size).ok_or_else(cut)?;
            // The next element starts at a multiple of 8; some writers leave the last one unpadded.
            let padded = if kind == Kind::Compressed { size } else { size.next_multiple_of(8) };
            (kind, bytes, padded.min(rest.len()))
        };
        self.rest = &rest[taken..];
        Ok(Element { kind, bytes, big_endian: self.big_endian })
    }

    /// The next element, which must be of `kind`.
    pub fn expect(&mut self, kind: Kind, what: &str) -> Result<Element<'a>, String> {
        let element = self.next(what)?;
        if element.kind != kind {
            return Err(format!("{what} is stored as {:?}, not {kind:?}", element.kind));
        }
        Ok(element)
    }
}

fn word(bytes: &[u8], big_endian: bool) -> u32 {
    let bytes = [bytes[0], bytes[1], bytes[2], bytes[3]];
    if big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
}

impl Element<'_> {
    /// The bytes in chunks of `N`, least significant byte first; an error if they do not come out even.
    fn chunks<const N: usize>(&self, what: &str) -> Result<impl Iterator<Item = [u8; N]>, String> {
        let (chunks, rest) = self.bytes.as_chunks::<N>();
        if !rest.is_empty() {
            return Err(format!("{what}: {} bytes are no whole number of values of {N}", self.bytes.len()));
        }
        let big_endian = self.big_endian;
        Ok(chunks.iter().map(move |&chunk| {
            let mut chunk = chunk;
            if big_endian {
                chunk.reverse();
            }
            chunk
        }))
    }

    /// The values as numbers, whatever they are stored as.
    pub fn numbers(&self, what: &str) -> Result<Vec<f64>, String> {
        Ok(match self.kind {
            Kind::I8 => self.bytes.iter().map(|&byte| f64::from(byte.cast_signed())).collect(),
            Kind::U8 => self.bytes.iter().map(|&byte| f64::from(byte)).collect(),
            Kind::I16 => self.chunks(what)?.map(|chunk| f64::from(i16::from_le_bytes(chunk))).collect(),
            Kind::U16 => self.chunks(what)?.map(|chunk| f64::from(u16::from_le_bytes(chunk))).collect(),
            Kind::I32 => self.chunks(what)?.map(|chunk| f64::from(i32::from_le_bytes(chunk))).collect(),
            Kind::U32 => self.chunks(what)?.map(|chunk| f64::from(u32::from_le_bytes(chunk))).collect(),
            Kind::F32 => self.chunks(what)?.map(|chunk| f64::from(f32::from_le_bytes(chunk))).collect(),
            Kind::F64 => self.chunks(what)?.map(f64::from_le_bytes).collect(),
            Kind::I64 => self.chunks(what)?.map(|chunk| i64::from_le_bytes(chunk) as f64).collect(),
            Kind::U64 => self.chunks(what)?.map(|chunk| u64::from_le_bytes(chunk) as f64).collect(),
            other => return Err(format!("{what}: numbers stored as {other:?}")),
        })
    }

    /// The values as characters.
    pub fn characters(&self, what: &str) -> Result<Vec<char>, String> {
        let bad = || format!("{what}: text that is not valid {:?}", self.kind);
        match self.kind {
            // MATLAB's 8-bit text is the first 256 characters of Unicode.
            Kind::I8 | Kind::U8 => Ok(self.bytes.iter().map(|&byte| char::from(byte)).collect()),
            Kind::Utf8 => Ok(std::str::from_utf8(self.bytes).map_err(|_| bad())?.chars().collect()),
            Kind::U16 | Kind::Utf16 => char::decode_utf16(self.chunks(what)?.map(u16::from_le_bytes))
                .collect::<Result<_, _>>()
                .map_err(|_| bad()),
            Kind::U32 | Kind::Utf32 => self
                .chunks(what)?
                .map(|chunk| char::from_u32(u32::from_le_bytes(chunk)).ok_or_else(bad))
                .collect(),
            other => Err(format!("{what}: text stored as {other:?}")),
        }
    }
}
