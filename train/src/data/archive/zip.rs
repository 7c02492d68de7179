//! ZIP archives: the directory at the end, then one member after the other, stored or deflated, with 64-bit sizes.
//!
//! Own code because it is short: the crate for it would bring formats and ciphers that no data set is packed with. Sizes
//! and sums are checked as members are read; nothing is allocated on a header's word alone.

use std::io::{self, Read, Seek, SeekFrom};

use flate2::Crc;
use flate2::read::DeflateDecoder;

/// One entry of the directory.
#[derive(Debug, Clone)]
pub(super) struct Member {
    /// Path within the archive.
    pub name: String,
    /// Whether it is a symbolic link.
    pub is_link: bool,
    encrypted: bool,
    method: u16,
    sum: u32,
    packed: u64,
    size: u64,
    offset: u64,
}

impl Member {
    /// Whether it is a folder.
    pub fn is_folder(&self) -> bool {
        self.name.ends_with('/')
    }
}

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;
const ENTRY: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// Length of the end record, and of the longest comment behind it.
const END_LENGTH: usize = 22;
const LONGEST_COMMENT: u64 = 0xffff;

const STORED: u16 = 0;
const DEFLATED: u16 = 8;

/// The members of an archive, from its directory.
pub(super) fn members(archive: &mut (impl Read + Seek)) -> io::Result<Vec<Member>> {
    let length = archive.seek(SeekFrom::End(0))?;
    let tail_start = length.saturating_sub(END_LENGTH as u64 + LONGEST_COMMENT);
    let tail = read_at(archive, tail_start, length - tail_start)?;
    let end = (0..=tail.len().saturating_sub(END_LENGTH))
        .rev()
        .find(|&at| tail[at..].len() >= END_LENGTH && u32_at(&tail, at) == Some(END))
        .ok_or_else(|| bad("it has no directory, so it is no ZIP archive or was cut short"))?;
    let field = |at| bad_unless(u32_at(&tail, end + at));
    let (mut size, mut offset) = (u64::from(field(12)?), u64::from(field(16)?));
    let mut count = u64::from(bad_unless(u16_at(&tail, end + 10))?);
    if count == 0xffff || size == 0xffff_ffff || offset == 0xffff_ffff {
        // The true figures are in a record before, which a locator in front of this one points to.
        let locator = end.checked_sub(20).filter(|&at| u32_at(&tail, at) == Some(LOCATOR_64));
        if let Some(locator) = locator {
            let record = read_at(archive, bad_unless(u64_at(&tail, locator + 8))?, 56)?;
            if u32_at(&record, 0) != Some(END_64) {
                return Err(bad("its 64-bit directory record is missing"));
            }
            let field = |at| bad_unless(u64_at(&record, at));
            (count, size, offset) = (field(32)?, field(40)?, field(48)?);
        }
    }
    let directory = read_at(archive, offset, size)?;
    let mut rest = directory.as_slice();
    let mut members = Vec::new();
    for _ in 0..count {
        members.push(entry(&mut rest)?);
    }
    Ok(members)
}

/// The content of `member`; reading it to the end fails if its size or sum is not as the directory says.
pub(super) fn open<'a, R: Read + Seek>(
    archive: &'a mut R,
    member: &Member,
) -> io::Result<impl Read + use<'a, R>> {
    if member.encrypted {
        return Err(bad("it needs a password"));
    }
    let local = read_at(archive, member.offset, 30)?;
    if u32_at(&local, 0) != Some(LOCAL) {
        return Err(bad("a member is not where the directory says"));
    }
    let skipped = [26, 28].map(|at| u64::from(u16_at(&local, at).unwrap_or(0))).iter().sum::<u64>();
    archive.seek(SeekFrom::Start(member.offset.saturating_add(30 + skipped)))?;
    let packed = archive.take(member.packed);
    let content: Box<dyn Read + 'a> = match member.method {
        STORED => Box::new(packed),
        DEFLATED => Box::new(DeflateDecoder::new(packed)),
        other => return Err(bad(&format!("compression method {other} is neither store nor deflate"))),
    };
    Ok(Checked { content, crc: Crc::new(), sum: member.sum, size: member.size })
}

fn entry(rest: &mut &[u8]) -> io::Result<Member> {
    let cut = || bad("its directory is cut short");
    let head = rest.get(..46).filter(|head| u32_at(head, 0) == Some(ENTRY)).ok_or_else(cut)?;
    let short = |at| usize::from(u16_at(head, at).unwrap_or(0));
    let word = |at| u32_at(head, at).unwrap_or(0);
    let (name, extra, comment) = (short(28), short(30), short(32));
    let tail = &rest[46..];
    let (name, after) = tail.split_at_checked(name).ok_or_else(cut)?;
    let (extra, after) = after.split_at_checked(extra).ok_or_else(cut)?;
    let mut wide = wide_fields(extra);
    // Sizes that do not fit 32 bits follow in the extra field, in this order.
    let mut field = |at| match word(at) {
        0xffff_ffff => wide.next().ok_or_else(cut),
        value => Ok(u64::from(value)),
    };
    let (size, packed, offset) = (field(24)?, field(20)?, field(42)?);
    let made_on_unix = short(4) >> 8 == 3;
    let member = Member {
        name: String::from_utf8_lossy(name).into_owned(),
        is_link: made_on_unix && word(38) >> 16 & 0o170_000 == 0o120_000,
        encrypted: short(8) & 1 != 0,
        method: u16_at(head, 10).unwrap_or(0),
        sum: word(16),
        packed,
        size,
        offset,
    };
    *rest = after.get(comment..).ok_or_else(cut)?;
    Ok(member)
}

/// The 64-bit values in an extra field.
fn wide_fields(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut values = Vec::new();
    while let (Some(kind), Some(length)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let Some(content) = extra.get(4..4 + usize::from(length)) else { break };
        if kind == 1 {
            values.extend(content.as_chunks::<8>().0.iter().map(|&value| u64::from_le_bytes(value)));
        }
        extra = &extra[4 + content.len()..];
    }
    values.into_iter()
}

/// Exactly `count` bytes from `start` on; memory grows with what is really there.
fn read_at(archive: &mut (impl Read + Seek), start: u64, count: u64) -> io::Result<Vec<u8>> {
    archive.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    archive.take(count).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == count { Ok(bytes) } else { Err(bad("it was cut short")) }
}

/// Counts and sums what passes through.
struct Checked<R> {
    content: R,
    crc: Crc,
    sum: u32,
    size: u64,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.content.read(buffer)?;
        self.crc.update(&buffer[..count]);
        self.size =
            self.size.checked_sub(count as u64).ok_or_else(|| bad("a member is longer than it says"))?;
        if count == 0 && !buffer.is_empty() && (self.size > 0 || self.crc.sum() != self.sum) {
            return Err(bad("a member is damaged"));
        }
        Ok(count)
    }
}

fn bad(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

fn bad_unless<T>(value: Option<T>) -> io::Result<T> {
    value.ok_or_else(|| bad("it was cut short"))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
