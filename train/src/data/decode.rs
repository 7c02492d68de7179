//! Decodes picture files.

use std::io::Cursor;
use std::path::Path;

use crate::Error;
use ddtas_io::console::one_line;
use ddtas_io::files::check_regular;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage, imageops};
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::options::DecoderOptions;

/// A part of a picture in pixels: a bounding box of an annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelBox {
    /// Columns left of the part.
    pub left: u32,
    /// Rows above the part.
    pub top: u32,
    /// Columns of the part, at least 1.
    pub width: u32,
    /// Rows of the part, at least 1.
    pub height: u32,
}

/// Decodes by content, not by extension: data sets contain PNGs named .jpg. Applies the EXIF orientation,
/// puts transparent pixels over white, and takes the first frame of an animation.
///
/// # Errors
/// [`Io`](ddtas_io::Error::Io) if the system lacks memory or file handles, which is no fault of the file;
/// [`Undecodable`](Failure::Undecodable) has the reason in one line.
pub(super) fn decode(path: &Path) -> Result<RgbImage, Failure> {
    if check_regular(path).is_err() {
        return Err(Failure::Undecodable("it is a pipe or a device".into()));
    }
    let bytes = std::fs::read(path).map_err(|error| match is_of_system(&error) {
        true => Failure::System(Error::io("read", path)(error)),
        false => Failure::Undecodable(error.to_string()),
    })?;
    decoded(&bytes).map_err(Failure::Undecodable)
}

/// Whether the system lacks memory or file handles.
fn is_of_system(error: &std::io::Error) -> bool {
    #[cfg(unix)]
    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) {
        return true;
    }
    error.kind() == std::io::ErrorKind::OutOfMemory
}

/// Why there is no picture.
pub(super) enum Failure {
    /// The file is no readable picture.
    Undecodable(String),
    /// The system cannot read any file now.
    System(Error),
}

fn decoded(bytes: &[u8]) -> Result<RgbImage, String> {
    let format = image::guess_format(bytes).map_err(|_| {
        if bytes.is_empty() { "the file is empty" } else { "no JPEG, PNG, WebP, GIF, BMP or TIFF" }
    })?;
    let picture = match format {
        ImageFormat::Jpeg => decode_jpeg(bytes)?,
        _ => decode_bytes(bytes, format)?,
    };
    let picture = over_white(picture);
    if picture.width() == 0 || picture.height() == 0 {
        return Err("it has no pixels".into());
    }
    Ok(picture)
}

fn decode_bytes(bytes: &[u8], format: ImageFormat) -> Result<DynamicImage, String> {
    let mut decoder = decoder_of(bytes, format)?;
    let orientation = decoder.orientation().map_err(one_line)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(one_line)?;
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// A decoder that has read the header; an error if the pixels that the header announces would take more than 512 MiB.
fn decoder_of(bytes: &[u8], format: ImageFormat) -> Result<impl ImageDecoder, String> {
    let reader = ImageReader::with_format(Cursor::new(bytes), format);
    let decoder = reader.into_decoder().map_err(one_line)?;
    // `into_decoder` passes the limits to the decoder, but the buffer of pixels is allocated outside it.
    if Limits::default().reserve(decoder.total_bytes()).is_err() {
        let (width, height) = decoder.dimensions();
        return Err(format!("its {width} x {height} pixels take more than 512 MiB"));
    }
    Ok(decoder)
}

/// Decodes a JPEG and refuses one that was cut short, whose missing part the decoder would make up. A baseline JPEG without
/// end marker is decoded with several fillings after its end: if they change the picture, part of it was missing.
fn decode_jpeg(bytes: &[u8]) -> Result<DynamicImage, String> {
    let scan = match scan_of(bytes) {
        Some(scan) if !scan.is_progressive => scan.begin,
        // The scans of a progressive JPEG refine each other: only the end marker shows that none is missing.
        Some(scan) if !ends(&bytes[scan.begin..]) => return Err(ENDS_EARLY.into()),
        _ => return decode_bytes(bytes, ImageFormat::Jpeg),
    };
    if ends(&bytes[scan..]) {
        return decode_bytes(bytes, ImageFormat::Jpeg);
    }
    decoder_of(bytes, ImageFormat::Jpeg)?;
    // Removes half an end marker.
    let bytes = bytes.strip_suffix(&[0xff]).unwrap_or(bytes);
    let ended = |filling: u8| [bytes, &[filling; 64], &END].concat();
    // Four fillings: two may decode to the same coefficients by chance, or change pixels beyond the border only.
    let [first, others @ ..] = [0x00, 0x6d, 0x92, 0x55].map(|filling| decode_strictly(&ended(filling)));
    if first.is_none() || others.iter().any(|other| *other != first) {
        return Err(ENDS_EARLY.into());
    }
    decode_bytes(&ended(0x00), ImageFormat::Jpeg)
}

/// The pixels of a JPEG, or none if its coded data have any error.
fn decode_strictly(bytes: &[u8]) -> Option<Vec<u8>> {
    let options =
        DecoderOptions::default().set_strict_mode(true).set_max_width(usize::MAX).set_max_height(usize::MAX);
    zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options).decode().ok()
}

const ENDS_EARLY: &str = "the JPEG ends early: it was cut short";

/// End of image.
const END: [u8; 2] = [0xff, 0xd9];

/// Whether these coded data contain an end marker. Within coded data proper, 0xff is never followed by 0xd9.
fn ends(coded: &[u8]) -> bool {
    // From the end, where it is in nearly all files.
    coded.windows(2).rev().any(|pair| pair == END)
}

/// Where the coded data of a JPEG's first scan begin, and whether it is progressive.
struct Scan {
    begin: usize,
    is_progressive: bool,
}

/// Skips the segments before the coded data, with the thumbnails in them; none if there are no coded data.
fn scan_of(bytes: &[u8]) -> Option<Scan> {
    let mut begin = 2;
    let mut is_progressive = false;
    loop {
        let [mark, kind, high, low] = *bytes.get(begin..begin + 4)?.first_chunk()?;
        if mark != 0xff {
            return None;
        }
        if kind == 0xff {
            // Fill bytes may precede a marker.
            begin += 1;
            continue;
        }
        begin += 2 + usize::from(u16::from_be_bytes([high, low]));
        match kind {
            0xda => return Some(Scan { begin: begin.min(bytes.len()), is_progressive }),
            0xc2 => is_progressive = true,
            _ => {}
        }
    }
}

/// Removes the alpha channel by blending with white.
fn over_white(picture: DynamicImage) -> RgbImage {
    if !picture.color().has_alpha() {
        return picture.into_rgb8();
    }
    let picture = picture.into_rgba8();
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let [red, green, blue, alpha] = picture.get_pixel(x, y).0;
        let alpha = u32::from(alpha);
        let over = |value: u8| ((u32::from(value) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        image::Rgb([red, green, blue].map(over))
    })
}

/// The part of `picture` in `area`, clipped to the border; an error if the whole area is outside.
pub(super) fn cut(picture: &RgbImage, area: PixelBox) -> Result<RgbImage, String> {
    let width = picture.width().saturating_sub(area.left).min(area.width);
    let height = picture.height().saturating_sub(area.top).min(area.height);
    if width == 0 || height == 0 {
        return Err(format!(
            "its bounding box lies outside its {} x {} pixels",
            picture.width(),
            picture.height()
        ));
    }
    Ok(imageops::crop_imm(picture, area.left, area.top, width, height).to_image())
}
