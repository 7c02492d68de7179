//! Copies of images and gradients in which every tap of a kernel is a constant offset.

use pulp::{Simd, WithSimd};

use super::geometry::Geometry;
use super::taps::channel_offsets;
use crate::vectors::dispatch;

/// Resizes a buffer and fills it with zeros.
pub fn zeroed(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    filled(buffer, length, 0.0)
}

/// A buffer of a length. If it had another, all of it is `padding`; else it holds what was last written. So where the same
/// places are written for every image, the padding between them stays.
pub fn sized(buffer: &mut Vec<f32>, length: usize, padding: f32) -> &mut [f32] {
    if buffer.len() != length {
        filled(buffer, length, padding);
    }
    buffer
}

/// Resizes a buffer and fills it with a value.
pub fn filled(buffer: &mut Vec<f32>, length: usize, value: f32) -> &mut [f32] {
    buffer.clear();
    buffer.resize(length, value);
    buffer
}

/// The positions of one phase that lie in the image: every `stride`th row and column from `first` on.
pub struct ImagePart {
    stride: usize,
    /// First row and column in the image.
    first: [usize; 2],
    /// Number of rows and columns.
    pub size: [usize; 2],
}

impl ImagePart {
    fn new(g: &Geometry, place: [PhasePlace; 2]) -> Self {
        Self { stride: g.stride, first: place.map(|axis| axis.first), size: place.map(|axis| axis.count) }
    }

    fn is_empty(&self) -> bool {
        self.size.contains(&0)
    }

    /// Copies the part from an image whose rows have `width` values to rows of `columns` values.
    fn read(&self, image: &[f32], width: usize, flat: &mut [f32], columns: usize) {
        let rows = image[self.first[0] * width..].chunks_exact(width).step_by(self.stride);
        for (to, row) in flat.chunks_mut(columns).zip(rows).take(self.size[0]) {
            copy_strided(&row[self.first[1]..], self.stride, &mut to[..self.size[1]]);
        }
    }

    /// The reverse of [`read`](Self::read).
    pub fn write(&self, flat: &[f32], columns: usize, image: &mut [f32], width: usize) {
        let rows = image[self.first[0] * width..].chunks_exact_mut(width).step_by(self.stride);
        for (row, from) in rows.zip(flat.chunks(columns)).take(self.size[0]) {
            let to = row[self.first[1]..].iter_mut().step_by(self.stride);
            to.zip(&from[..self.size[1]]).for_each(|(to, from)| *to = *from);
        }
    }
}

/// How an image is copied into phase planes.
pub struct PhasePlanes {
    /// Height and width of the image.
    image: [usize; 2],
    /// Columns of a plane.
    columns: usize,
    /// The part of each phase, and where it begins among the phase planes of a channel.
    parts: Vec<(ImagePart, usize)>,
}

impl PhasePlanes {
    pub fn new(g: &Geometry) -> Self {
        let columns = g.phase_plane()[1];
        let part = |phase: usize| {
            let place = PhasePlace::both(g, [phase / g.phases(), phase % g.phases()]);
            let [row, column] = place.map(|axis| axis.within);
            (ImagePart::new(g, place), phase * g.plane_length() + row * columns + column)
        };
        let parts = (0..g.phases() * g.phases()).map(part).filter(|(part, _)| !part.is_empty());
        Self { image: g.input, columns, parts: parts.collect() }
    }

    /// Copies an image into phase planes of padding; channel c starts at `c * channel_length`.
    pub fn split(&self, image: &[f32], planes: &mut [f32], channel_length: usize) {
        let [height, width] = self.image;
        for (part, start) in &self.parts {
            for (c, plane) in image.chunks_exact(height * width).enumerate() {
                part.read(plane, width, &mut planes[c * channel_length + start..], self.columns);
            }
        }
    }

    /// The reverse of [`split`](Self::split) for one plane: copies phase planes to a plane of zeros.
    pub fn join(&self, planes: &[f32], image: &mut [f32]) {
        for (part, start) in &self.parts {
            part.write(&planes[*start..], self.columns, image, self.image[1]);
        }
    }
}

/// Copies every `stride`th value of a row.
fn copy_strided(from: &[f32], stride: usize, to: &mut [f32]) {
    match stride {
        1 => copy(&from[..to.len()], to),
        // PERF: the compiler vectorises a constant stride alone.
        2 => to.iter_mut().zip(from.chunks(2)).for_each(|(to, from)| *to = from[0]),
        stride => to.iter_mut().zip(from.iter().step_by(stride)).for_each(|(to, from)| *to = *from),
    }
}

/// Copies a row.
// PERF: most rows are so short that a call of memcpy takes longer than the copy.
#[inline(always)]
pub fn copy(from: &[f32], to: &mut [f32]) {
    debug_assert_eq!(from.len(), to.len());
    match to.len() {
        4..=8 => copy_ends::<4>(from, to),
        9..=16 => copy_ends::<8>(from, to),
        17..=32 => copy_ends::<16>(from, to),
        _ => to.copy_from_slice(from),
    }
}

/// Copies rows of `width` values, which begin every `from_stride` values, to rows that begin every `to_stride` values, until one
/// side has no more.
pub fn copy_rows(from: &[f32], from_stride: usize, to: &mut [f32], to_stride: usize, width: usize) {
    for (from, to) in from.chunks(from_stride).zip(to.chunks_mut(to_stride)) {
        copy(&from[..width], &mut to[..width]);
    }
}

/// Copies a row of N to 2 N values: its first N, then its last N.
#[inline(always)]
fn copy_ends<const N: usize>(from: &[f32], to: &mut [f32]) {
    let (Some(first), Some(last)) = (from.first_chunk::<N>(), from.last_chunk::<N>()) else { return };
    if let Some(to) = to.first_chunk_mut::<N>() {
        *to = *first;
    }
    if let Some(to) = to.last_chunk_mut::<N>() {
        *to = *last;
    }
}

/// A plane of the output gradient with the zeros around it that the phases of the input read.
pub struct PaddedGradient {
    /// Rows and columns.
    pub size: [usize; 2],
    /// Zeros before the gradient.
    lead: [usize; 2],
}

impl PaddedGradient {
    pub fn new(g: &Geometry) -> Self {
        let (mut size, mut lead) = ([0; 2], [0; 2]);
        for axis in 0..2 {
            let extents = (0..g.phases()).map(|phase| PhasePlace::new(g, axis, phase));
            // Position q of a phase reads the gradient's outputs q - reach to q.
            let first = extents.clone().map(|extent| extent.within).min().unwrap_or(0).min(g.reach());
            let end = extents.map(|extent| extent.within + extent.count).max().unwrap_or(0);
            lead[axis] = g.reach() - first;
            size[axis] = lead[axis] + end.max(g.output()[axis]);
        }
        Self { size, lead }
    }

    /// Floats with the slack.
    pub fn length(&self, g: &Geometry) -> usize {
        self.size[0] * self.size[1] + g.slack()
    }

    /// Copies a plane of the output gradient into a zeroed padded plane.
    pub fn copy(&self, g: &Geometry, gradient: &[f32], plane: &mut [f32]) {
        let (width, start) = (g.output()[1], self.lead[0] * self.size[1] + self.lead[1]);
        copy_rows(gradient, width, &mut plane[start..], self.size[1], width);
    }

    /// All phases of the input that have positions in the image.
    pub fn phases(&self, g: &Geometry) -> Vec<InputPhase> {
        let phases = (0..g.phases()).flat_map(|y| (0..g.phases()).map(move |x| [y, x]));
        phases.map(|phase| InputPhase::new(g, self, phase)).filter(|phase| !phase.part.is_empty()).collect()
    }
}

/// The part of one phase of the input that lies in the image, along one axis.
#[derive(Clone, Copy)]
struct PhasePlace {
    /// First position of the phase.
    within: usize,
    /// The same, as a position of the image.
    first: usize,
    /// Number of positions that an output reads.
    count: usize,
}

impl PhasePlace {
    fn new(g: &Geometry, axis: usize, phase: usize) -> Self {
        // Position q of the phase is input row stride * q + phase - padding.
        let within = g.before()[axis].saturating_sub(phase).div_ceil(g.stride);
        let first = g.stride * within + phase - g.before()[axis];
        let last = g.output()[axis] + g.reach();
        let inside = g.input[axis].saturating_sub(first).div_ceil(g.stride);
        Self { within, first, count: inside.min(last.saturating_sub(within)) }
    }

    fn both(g: &Geometry, phase: [usize; 2]) -> [Self; 2] {
        [0, 1].map(|axis| Self::new(g, axis, phase[axis]))
    }
}

/// The gradient of one phase of the input, as a convolution of the padded output gradient.
pub struct InputPhase {
    /// Taps of the kernel that read this phase.
    pub kernel_taps: Vec<usize>,
    /// Offsets of these taps into the padded gradient, for each of its channels.
    pub offsets: Vec<usize>,
    /// The positions of the image that belong to the phase.
    pub part: ImagePart,
}

impl InputPhase {
    fn new(g: &Geometry, padded: &PaddedGradient, phase: [usize; 2]) -> Self {
        let (reach, columns) = (g.reach(), padded.size[1]);
        let place = PhasePlace::both(g, phase);
        let (mut kernel_taps, mut taps) = (Vec::new(), Vec::new());
        for y in (phase[0]..g.kernel).step_by(g.stride) {
            for x in (phase[1]..g.kernel).step_by(g.stride) {
                kernel_taps.push(y * g.kernel + x);
                taps.push((reach - y / g.stride) * columns + reach - x / g.stride);
            }
        }
        let [row, column] = [0, 1].map(|axis| place[axis].within + padded.lead[axis] - reach);
        let offsets = channel_offsets(g.channels_out, padded.length(g), &taps, row * columns + column);
        Self { kernel_taps, offsets, part: ImagePart::new(g, place) }
    }
}

/// Copies a matrix of rows as long as `places`, transposed: column c begins at `to[places[c]]`.
pub fn transpose(from: &[f32], places: &[usize], to: &mut [f32]) {
    dispatch(Transpose { from, places, to });
}

struct Transpose<'a> {
    from: &'a [f32],
    places: &'a [usize],
    to: &'a mut [f32],
}

/// Side of the squares that are transposed in registers.
const SQUARE: usize = 8;

impl WithSimd for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let columns = self.places.len();
        for (row, rows) in self.from.chunks(SQUARE * columns).enumerate() {
            let row = row * SQUARE;
            let whole = if rows.len() == SQUARE * columns { columns - columns % SQUARE } else { 0 };
            for (square, places) in self.places[..whole].chunks_exact(SQUARE).enumerate() {
                let mut values = [[0.0f32; SQUARE]; SQUARE];
                for (r, values) in values.iter_mut().enumerate() {
                    values.copy_from_slice(&rows[r * columns + square * SQUARE..][..SQUARE]);
                }
                for c in 0..SQUARE {
                    let column: [f32; SQUARE] = std::array::from_fn(|r| values[r][c]);
                    self.to[places[c] + row..][..SQUARE].copy_from_slice(&column);
                }
            }
            for c in whole..columns {
                for (r, values) in rows.chunks_exact(columns).enumerate() {
                    self.to[self.places[c] + row + r] = values[c];
                }
            }
        }
    }
}
