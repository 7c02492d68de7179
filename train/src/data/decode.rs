//! From a file to a picture.

use std::io::Cursor;
use std::path::Path;

use ddtas_io::console::one_line;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage, imageops};
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::options::DecoderOptions;

/// A part of a picture in pixels: a bounding box of an annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelBox {
    /// Columns to the left of it.
    pub left: u32,
    /// Rows above it.
    pub top: u32,
    /// Columns in it, at least 1.
    pub width: u32,
    /// Rows in it, at least 1.
    pub height: u32,
}

/// Decodes by content, not by extension: data sets hold PNGs that are called .jpg. The picture is turned as its EXIF
/// orientation says, what is transparent in it lies over white, and of an animation it is the first frame.
///
/// # Errors
/// The reason in one line.
pub(super) fn decode(path: &Path) -> Result<RgbImage, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let format = image::guess_format(&bytes).map_err(|_| {
        if bytes.is_empty() { "the file is empty" } else { "no JPEG, PNG, WebP, GIF, BMP or TIFF" }
    })?;
    let picture = match format {
        ImageFormat::Jpeg => decode_jpeg(&bytes)?,
        _ => decode_bytes(&bytes, format)?,
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

/// A decoder that has read the header, if the pixels that the header announces are no more than memory may be taken for.
fn decoder_of(bytes: &[u8], format: ImageFormat) -> Result<impl ImageDecoder, String> {
    let reader = ImageReader::with_format(Cursor::new(bytes), format);
    let decoder = reader.into_decoder().map_err(one_line)?;
    // `into_decoder` hands the limits on, but the buffer of all pixels is not the decoder's.
    if Limits::default().reserve(decoder.total_bytes()).is_err() {
        let (width, height) = decoder.dimensions();
        return Err(format!("its {width} x {height} pixels take more than 512 MiB"));
    }
    Ok(decoder)
}

/// The decoder fills up what is missing of a JPEG that ends early. So one without an end marker is decoded strictly, again
/// and again with other bytes after its end: if the picture shows them, something of it was missing.
fn decode_jpeg(bytes: &[u8]) -> Result<DynamicImage, String> {
    let scan = match scan_of(bytes) {
        Some(scan) if !scan.is_progressive => scan.begin,
        // The passes of a progressive one refine each other: only the end marker tells that there is none to come.
        Some(scan) if !ends(&bytes[scan.begin..]) => return Err(ENDS_EARLY.into()),
        _ => return decode_bytes(bytes, ImageFormat::Jpeg),
    };
    if ends(&bytes[scan..]) {
        return decode_bytes(bytes, ImageFormat::Jpeg);
    }
    decoder_of(bytes, ImageFormat::Jpeg)?;
    // Half an end marker is none.
    let bytes = bytes.strip_suffix(&[0xff]).unwrap_or(bytes);
    let ended = |filling: u8| [bytes, &[filling; 64], &END].concat();
    // Four, since a block's coefficients may be the same by chance, or beyond the picture's border.
    let [first, others @ ..] = [0x00, 0x6d, 0x92, 0x55].map(|filling| decode_strictly(&ended(filling)));
    if first.is_none() || others.iter().any(|other| *other != first) {
        return Err(ENDS_EARLY.into());
    }
    decode_bytes(&ended(0x00), ImageFormat::Jpeg)
}

/// The pixels of a JPEG in whose coded data there is nothing wrong.
fn decode_strictly(bytes: &[u8]) -> Option<Vec<u8>> {
    let options =
        DecoderOptions::default().set_strict_mode(true).set_max_width(usize::MAX).set_max_height(usize::MAX);
    zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options).decode().ok()
}

const ENDS_EARLY: &str = "the JPEG ends early: it was cut short";

/// End of image.
const END: [u8; 2] = [0xff, 0xd9];

/// Whether an end marker is in these coded data: there, another byte cannot follow 0xff.
fn ends(coded: &[u8]) -> bool {
    // From the back, where it stands in nearly all files.
    coded.windows(2).rev().any(|pair| pair == END)
}

/// The first pass of a JPEG's coded data.
struct Scan {
    begin: usize,
    is_progressive: bool,
}

/// Walks the segments before the coded data, thumbnails within them included; none if there are no such data.
fn scan_of(bytes: &[u8]) -> Option<Scan> {
    let mut begin = 2;
    let mut is_progressive = false;
    loop {
        let [mark, kind, high, low] = *bytes.get(begin..begin + 4)?.first_chunk()?;
        if mark != 0xff {
            return None;
        }
        if kind == 0xff {
            // Fill bytes may stand before a marker.
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

/// Without alpha: what is transparent shows white.
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

/// What of `picture` lies in `area`; annotations may reach past the border, but not lie outside.
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
