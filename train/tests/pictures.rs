//! Reading pictures: rotated by EXIF, cut short, transparent, in every format; and the user's own splits.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::fs;
use std::io::Cursor;
use std::path::Path;

use ddtas_train::data::{Dataset, FolderSettings, Split, TrainClasses, folder};
use image::codecs::gif::GifEncoder;
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, Frame, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};

/// Reads a picture file as the program does.
fn read(bytes: &[u8]) -> Result<RgbImage, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.jpg");
    fs::write(&path, bytes).unwrap();
    let split = Split::from_files(vec![("one".into(), vec![path])], 0);
    split.picture(0).map(|picture| (*picture).clone()).map_err(|error| error.to_string())
}

/// A picture of 20 x 12: red on the left, blue on the right, green in the upper left corner.
fn flag() -> RgbImage {
    RgbImage::from_fn(20, 12, |x, y| match (x, y) {
        (0..6, 0..4) => Rgb([20, 220, 30]),
        (0..10, _) => Rgb([220, 20, 30]),
        _ => Rgb([20, 30, 220]),
    })
}

fn encoded(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn jpeg(picture: &RgbImage, quality: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, quality).encode_image(picture).unwrap();
    bytes
}

/// A JPEG with an EXIF segment that gives its orientation.
fn oriented(bytes: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    let length = (exif.len() as u16 + 2).to_be_bytes();
    [&bytes[..2], &[0xff, 0xe1], &length, &exif, &bytes[2..]].concat()
}

/// Whether a pixel is near a colour, which JPEG does not keep exactly.
fn near(picture: &RgbImage, (x, y): (u32, u32), colour: [u8; 3]) -> bool {
    picture.get_pixel(x, y).0.iter().zip(colour).all(|(&got, want)| got.abs_diff(want) < 60)
}

#[test]
fn exif_orientation_turns_the_picture() {
    let plain = jpeg(&flag(), 95);
    // EXIF's orientation, then the green corner's place and the size.
    let rows = [
        (1, (1, 1), (20, 12)),
        (2, (18, 1), (20, 12)),
        (3, (18, 10), (20, 12)),
        (4, (1, 10), (20, 12)),
        (5, (1, 1), (12, 20)),
        (6, (10, 1), (12, 20)),
        (7, (10, 18), (12, 20)),
        (8, (1, 18), (12, 20)),
    ];
    for (orientation, corner, size) in rows {
        let picture = read(&oriented(&plain, orientation)).unwrap();
        assert_eq!(picture.dimensions(), size, "{orientation}");
        assert!(
            near(&picture, corner, [20, 220, 30]),
            "{orientation}: {:?}",
            picture.get_pixel(corner.0, corner.1)
        );
    }
}

/// A progressive grey JPEG of 16 x 16 pixels, by Pillow with quality 5: `image` cannot encode one.
const PROGRESSIVE: &[u8] = include_bytes!("pictures/progressive.jpg");

#[test]
fn a_jpeg_that_ends_early_is_bad_unless_it_lacks_the_end_marker_alone() {
    let noise = |x: u32, y: u32| (x * 97 + y * 57 + x * y * 31 + (x ^ y) * 13) as u8;
    let rough = RgbImage::from_fn(45, 37, |x, y| Rgb([noise(x, y), noise(y, x + 9), noise(x + 3, y)]));
    let flat = RgbImage::from_pixel(64, 40, Rgb([200, 40, 60]));
    for (name, picture, quality) in [("rough", &rough, 90), ("coarse", &rough, 20), ("flat", &flat, 75)] {
        let bytes = jpeg(picture, quality);
        let whole = read(&bytes).unwrap();
        for missing in 1..bytes.len() {
            let got = read(&bytes[..bytes.len() - missing]);
            match missing {
                1 | 2 => assert_eq!(got.as_ref(), Ok(&whole), "{name} without {missing} bytes"),
                // The last byte may hold only padding.
                3 => {}
                _ => assert!(got.is_err(), "{name} without {missing} bytes"),
            }
        }
        let said = read(&bytes[..bytes.len() - 9]).unwrap_err();
        assert!(said.contains("ends early") && said.lines().count() == 1, "{said}");
        // Bytes behind the end marker are ignored: cameras write some.
        assert_eq!(read(&[&bytes, &b"more"[..]].concat()), Ok(whole));
    }
    assert_eq!(read(PROGRESSIVE).unwrap().dimensions(), (16, 16));
    for length in 0..PROGRESSIVE.len() {
        assert!(read(&PROGRESSIVE[..length]).is_err(), "a progressive one of {length} bytes");
    }
}

#[test]
fn every_format_is_read_whatever_the_file_is_called() {
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff] {
        let bytes = encoded(flag(), format);
        assert_eq!(read(&bytes).unwrap(), flag(), "{format:?}");
        assert!(read(&bytes[..bytes.len() / 2]).is_err(), "half a {format:?}");
    }
    let mut animation = Vec::new();
    let rgba = |picture: &RgbImage| DynamicImage::from(picture.clone()).into_rgba8();
    let second = RgbImage::from_pixel(20, 12, Rgb([0; 3]));
    let frames = [Frame::new(rgba(&flag())), Frame::new(rgba(&second))];
    GifEncoder::new(&mut animation).encode_frames(frames).unwrap();
    let first = read(&animation).unwrap();
    assert!(near(&first, (1, 1), [20, 220, 30]) && near(&first, (15, 5), [20, 30, 220]), "the first frame");
    for other in [&b""[..], b"GIF89a", b"not a picture"] {
        let said = read(other).unwrap_err();
        assert!(said.lines().count() == 1, "{said}");
    }
}

#[test]
fn a_header_that_announces_more_pixels_than_memory_is_an_unreadable_picture() {
    let mut png = encoded(flag(), ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]);
    // The header is read only with its checksum.
    let sum = crc32fast::hash(&png[12..29]).to_be_bytes();
    png[29..33].copy_from_slice(&sum);
    let said = read(&png).unwrap_err();
    assert!(said.contains("100000 x 100000 pixels"), "{said}");
    // A JPEG without its end marker is decoded another way.
    let mut jpeg = jpeg(&flag(), 75);
    let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
    for length in [jpeg.len(), jpeg.len() - 2] {
        let said = read(&jpeg[..length]).unwrap_err();
        assert!(said.contains("65500 x 65500 pixels"), "{said}");
    }
}

#[test]
fn what_is_transparent_shows_white() {
    let glass = RgbaImage::from_fn(3, 1, |x, _| Rgba([200, 100, 0, [0, 128, 255][x as usize]]));
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Tiff] {
        let got = read(&encoded(glass.clone(), format)).unwrap();
        let pixels: Vec<[u8; 3]> = got.pixels().map(|pixel| pixel.0).collect();
        assert_eq!(pixels, [[255, 255, 255], [227, 177, 127], [200, 100, 0]], "{format:?}");
    }
}

fn classes(root: &Path, names: &[&str], pictures: usize) {
    for name in names {
        fs::create_dir_all(root.join(name)).unwrap();
        for number in 0..pictures {
            flag().save(root.join(name).join(format!("{number}.png"))).unwrap();
        }
    }
}

fn open(root: &Path, train_classes: Option<TrainClasses>) -> ddtas_train::Result<Dataset> {
    folder(root, &FolderSettings { train_classes, ..FolderSettings::default() })
}

fn warnings(dataset: &Dataset) -> String {
    dataset.warnings.join("\n")
}

#[test]
fn folders_named_train_and_test_are_the_split() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path();
    classes(&root.join("train"), &["a", "b", "c"], 2);
    classes(&root.join("test"), &["d", "e"], 3);
    fs::write(root.join("readme.md"), "").unwrap();
    let dataset = open(root, None).unwrap();
    assert_eq!((dataset.train.class_names().len(), dataset.train.len()), (3, 6));
    assert_eq!((dataset.test.class_names(), dataset.test.len()), (&["d".to_owned(), "e".to_owned()][..], 6));
    assert!(dataset.gallery.is_none() && !dataset.seen);
    assert!(warnings(&dataset).contains("1 file beside train and test"), "{}", warnings(&dataset));
    let said = open(root, Some(TrainClasses::First(2))).unwrap_err().to_string();
    assert!(said.contains("--train-classes") && said.contains("split of its own"), "{said}");

    // A class on both sides is no longer unseen, which a warning says.
    classes(&root.join("test"), &["c"], 2);
    let dataset = open(root, None).unwrap();
    assert!(dataset.seen && warnings(&dataset).contains("1 of the 3 test classes train as well"));

    classes(&root.join("query"), &["d", "e"], 1);
    classes(&root.join("gallery"), &["d", "f"], 2);
    let dataset = open(root, None).unwrap();
    let gallery = dataset.gallery.as_ref().unwrap();
    assert_eq!(dataset.test.class_names(), gallery.class_names(), "labels mean the same on both sides");
    assert_eq!((dataset.test.len(), gallery.len()), (2, 4));
    fs::remove_dir_all(root.join("gallery/d")).unwrap();
    assert!(open(root, None).unwrap_err().to_string().contains("nothing to retrieve"));
}

#[test]
fn lists_are_the_split() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path();
    classes(root, &["a", "b c", "d", "e"], 2);
    fs::write(
        root.join("train.txt"),
        "# pictures\na/0.png,7\na/1.png,7\r\n\nb c/0.png\tblue\nb c/1.png\tblue\n",
    )
    .unwrap();
    // Lines without a class, whose paths hold blanks and a comma.
    fs::create_dir(root.join("b c/d")).unwrap();
    for name in ["one, 7.png", "two 8"] {
        fs::copy(root.join("d/0.png"), root.join("b c/d").join(name)).unwrap();
    }
    fs::write(root.join("test.txt"), "b c/d/one, 7.png\nb c/d/two 8\ne/0.png\ne/1.png\n").unwrap();
    let dataset = open(root, None).unwrap();
    assert_eq!(dataset.train.class_names(), ["7", "blue"]);
    assert_eq!(dataset.test.class_names(), ["d", "e"]);
    assert_eq!((dataset.train.len(), dataset.test.len()), (4, 4));
    for (list, what) in [
        ("d/0.png\nd/9.png\n", "line 2: there is no picture"),
        ("d/0.png\n", "names 1 class:"),
        ("path,label\nd/0.png,d\n", "line 1: there is no picture"),
        ("path,label\nd/0.png,d\n", "path; a list is no CSV file"),
        ("\"d/0.png\",d\n", "a list is no CSV file"),
        ("d\\0.png d\n", "a list is no CSV file"),
        ("d/0.png,d,1\n", "a list is no CSV file"),
        ("d/0.png\ne/0.png\nd/./0.png\n", "line 3: names"),
    ] {
        fs::write(root.join("test.txt"), list).unwrap();
        let said = open(root, None).unwrap_err().to_string();
        assert!(said.contains("test.txt") && said.contains(what), "{said}");
        assert!(what != "line 2: there is no picture" || !said.contains("CSV"), "{said}");
    }
    // A byte order mark, and pictures that train as well, by another path.
    fs::write(root.join("test.txt"), "\u{feff}d/0.png,d\nd/1.png,d\ne/../a/1.png,f\na/0.png,f\n").unwrap();
    let dataset = open(root, None).unwrap();
    assert_eq!(dataset.test.class_names(), ["d", "f"]);
    let first = root.join("a/1.png").canonicalize().unwrap();
    let wanted = format!("both in training and test: 2 pictures, the first {}: ", first.display());
    assert!(warnings(&dataset).contains(&wanted), "{}", warnings(&dataset));
}

#[test]
fn all_classes_train_where_that_is_wanted() {
    let place = tempfile::tempdir().unwrap();
    classes(place.path(), &["a", "b"], 2);
    let dataset = open(place.path(), Some("all".parse().unwrap())).unwrap();
    assert_eq!((dataset.train.len(), dataset.test.len()), (4, 4));
    assert!(dataset.seen && warnings(&dataset).contains("2 of the 2 test classes train as well"));
    assert!(open(place.path(), None).unwrap_err().to_string().contains("--train-classes all"));
    assert!("most".parse::<TrainClasses>().is_err());
}

#[test]
fn what_is_no_picture_is_counted_by_its_kind() {
    let place = tempfile::tempdir().unwrap();
    classes(place.path(), &["a", "b", "c", "d"], 2);
    for name in ["a/x.HEIC", "b/y.heic", "c/notes.txt", "list.csv", "d/Thumbs", "a/.hidden"] {
        fs::write(place.path().join(name), "").unwrap();
    }
    classes(&place.path().join("b"), &["deeper"], 1);
    let said = warnings(&open(place.path(), None).unwrap());
    let wanted = "passed over, not read as pictures: 2 .heic, 1 .csv, 1 .txt, 1 without extension, 1 folder within class folders";
    assert_eq!(said, wanted);
    fs::copy(place.path().join("a/0.png"), place.path().join("stray.PNG")).unwrap();
    let said = warnings(&open(place.path(), None).unwrap());
    assert_eq!(said, format!("1 picture beside the class folders, passed over\n{wanted}"));
}
