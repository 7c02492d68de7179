//! Direct 2D convolution on the CPU: forward, and the gradient of the input.
//!
//! Burn's own CPU convolution builds patches (im2col) for a matrix product; with few channels, writing and
//! reading the patches costs more than the product. Here an image is copied once into padded planes in which
//! every tap of the kernel is a constant offset: output position p of the flattened plane and tap t read
//! `plane[p + offset_t]`. So one loop over contiguous memory serves every width, and a strided convolution is
//! the same loop over the input split into `stride²` phases.
//!
//! Layouts are Burn's: images `[N, C, H, W]`, weights `[out, in, k, k]`.
//! Work is divided by image, so results do not depend on the number of threads.

use super::buffer::written;
use super::geometry::Geometry;
use super::planes::{PaddedGradient, PhasePlanes, copy_rows, sized};
use super::taps::{PackedWeights, TapProduct, channel_offsets};

/// `[N, out, H', W']` from `[N, in, H, W]` and `[out, in, k, k]`.
pub fn forward(g: &Geometry, input: &[f32], weight: &[f32]) -> Vec<f32> {
    let taps = g.taps();
    let packed = PackedWeights::new(g.channels_out, g.channels_in, taps.len(), |o, i, t| {
        weight[(o * g.channels_in + i) * taps.len() + t]
    });
    let offsets = channel_offsets(g.channels_in, g.channel_length(), &taps, 0);
    let phases = PhasePlanes::new(g);
    let [height, width] = g.output();
    let columns = g.phase_plane()[1];
    written(g.images * g.output_length(), g.output_length(), |scratch: &mut Scratch, image, output| {
        let input = &input[image * g.input_length()..][..g.input_length()];
        let planes = sized(&mut scratch.planes, g.channels_in * g.channel_length(), 0.0);
        phases.split(input, planes, g.channel_length());
        let product = TapProduct { planes, offsets: &offsets, packed: &packed, positions: g.positions() };
        product.run(&mut scratch.accumulators, |o, flat| {
            copy_rows(flat, columns, &mut output[o * height * width..][..height * width], width, width);
        });
    })
}

/// dL/d(input), `[N, in, H, W]`, from dL/d(output), `[N, out, H', W']`.
///
/// For each phase of the input it is a convolution of the padded output gradient with the taps that read this
/// phase, flipped.
pub fn input_gradient(g: &Geometry, output_gradient: &[f32], weight: &[f32]) -> Vec<f32> {
    let padded = PaddedGradient::new(g);
    let (area, channel_length) = (g.output().iter().product(), padded.length(g));
    let taps_per_pair = g.kernel * g.kernel;
    let phases = padded.phases(g);
    let packed: Vec<PackedWeights> = phases
        .iter()
        .map(|phase| {
            PackedWeights::new(g.channels_in, g.channels_out, phase.kernel_taps.len(), |i, o, t| {
                weight[(o * g.channels_in + i) * taps_per_pair + phase.kernel_taps[t]]
            })
        })
        .collect();

    written(g.images * g.input_length(), g.input_length(), |scratch: &mut Scratch, image, gradient| {
        let output_gradient = &output_gradient[image * g.output_length()..][..g.output_length()];
        let planes = sized(&mut scratch.planes, g.channels_out * channel_length, 0.0);
        for (plane, source) in planes.chunks_exact_mut(channel_length).zip(output_gradient.chunks_exact(area))
        {
            padded.copy(g, source, plane);
        }
        for (phase, packed) in phases.iter().zip(&packed) {
            let positions = phase.part.size[0] * padded.size[1];
            let product = TapProduct { planes, offsets: &phase.offsets, packed, positions };
            product.run(&mut scratch.accumulators, |i, flat| {
                let plane = &mut gradient[i * g.input[0] * g.input[1]..][..g.input[0] * g.input[1]];
                phase.part.write(flat, padded.size[1], plane, g.input[1]);
            });
        }
    })
}

/// Buffers that a thread reuses.
#[derive(Default)]
struct Scratch {
    planes: Vec<f32>,
    accumulators: Vec<f32>,
}
