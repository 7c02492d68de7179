//! Draws one picture: a car of a given design in a random pose, scene and light.
//!
//! What this file chooses does not depend on the design, and a network must learn to ignore it. That includes
//! the paint, since real models come in all colours.

use image::RgbImage;
use rand::{Rng, RngExt};
use tiny_skia::Transform;

use super::canvas::{Canvas, Colour, Xy, mix, shade};
use super::car::{self, Finish};
use super::design::{Design, within};

/// Pictures are drawn at twice the size and then averaged, which gives softer edges.
const OVERSAMPLING: u32 = 2;

/// A picture of `size` x `size` pixels.
pub(super) fn draw(design: &Design, size: u32, rng: &mut impl Rng) -> RgbImage {
    let Some(mut canvas) = Canvas::new(size * OVERSAMPLING) else { return RgbImage::new(size, size) };
    // The scene's unit is the frame's side; y points down.
    let side = (size * OVERSAMPLING) as f32;
    let frame = Transform::from_scale(side, side);
    canvas.transform = frame;
    let pose = Pose::draw(design, rng);
    background(&mut canvas, pose.ground, rng);
    canvas.transform = pose.transform(design).post_concat(frame);
    car::draw(&mut canvas, design, &finish(rng));
    canvas.transform = frame;
    if rng.random_bool(0.25) {
        foreground(&mut canvas, &pose, rng);
    }
    develop(&canvas, size, rng)
}

/// Position of the car, and the view of it.
struct Pose {
    /// Distance of the ground under the car from the top, as a share of the frame.
    ground: f32,
    centre: f32,
    /// Length of the car as a share of the frame.
    extent: f32,
    flip: bool,
    /// Rotation, degrees.
    turn: f32,
    /// Shear along x and y, as if the camera did not face the car squarely.
    shear: Xy,
    /// Factor on the ratio of height to length.
    stretch: f32,
}

impl Pose {
    fn draw(design: &Design, rng: &mut impl Rng) -> Self {
        let extent = within(rng, 0.84, 1.02);
        let height = extent * design.height / design.length;
        let slack = (1.0 - extent).max(0.0) / 2.0 + 0.02;
        Self {
            ground: within(rng, (height + 0.06).max(0.5), 0.93),
            centre: 0.5 + within(rng, -slack, slack),
            extent,
            flip: rng.random_bool(0.5),
            turn: within(rng, -4.0, 4.0),
            shear: (within(rng, -0.06, 0.06), within(rng, -0.025, 0.025)),
            stretch: within(rng, 0.95, 1.06),
        }
    }

    /// From the car's metres to shares of the frame.
    fn transform(&self, design: &Design) -> Transform {
        let scale = self.extent / design.length;
        let mirror = if self.flip { -1.0 } else { 1.0 };
        Transform::from_translate(-design.length / 2.0, 0.0)
            .post_concat(Transform::from_row(1.0, self.shear.1, self.shear.0, 1.0, 0.0, 0.0))
            .post_concat(Transform::from_scale(mirror * scale, -scale * self.stretch))
            .post_concat(Transform::from_rotate(self.turn))
            .post_concat(Transform::from_translate(self.centre, self.ground))
    }
}

fn finish(rng: &mut impl Rng) -> Finish {
    // Greys are as common as colours, as on the road.
    let paint = if rng.random_bool(0.45) {
        let grey = within(rng, 0.12, 0.93);
        [grey + within(rng, -0.02, 0.02), grey, grey + within(rng, -0.02, 0.03)]
    } else {
        hsv(within(rng, 0.0, 1.0), within(rng, 0.35, 0.95), within(rng, 0.3, 0.92))
    };
    let dark = within(rng, 0.08, 0.26);
    let sky = mix([dark; 3], [0.62, 0.72, 0.82], within(rng, 0.15, 0.75));
    Finish {
        paint,
        glass: ([dark, dark * 1.05, dark * 1.12], sky),
        wheel_angle: within(rng, 0.0, std::f32::consts::TAU),
        lit: rng.random_bool(0.25),
        glare: rng.random_bool(0.5).then(|| within(rng, 0.1, 0.8)),
    }
}

fn background(canvas: &mut Canvas, ground: f32, rng: &mut impl Rng) {
    let horizon = ground - within(rng, 0.03, 0.3);
    let (high, low) = (any_colour(rng), any_colour(rng));
    canvas.shaded((0.0, 0.0), (1.0, 1.0), high, low);
    match rng.random_range(0..5) {
        0 => street(canvas, horizon, rng),
        1 => country(canvas, horizon, rng),
        2 => clutter(canvas, rng),
        3 => wall(canvas, horizon, rng),
        _ => {} // A studio: the gradient alone, and a floor.
    }
    let floor = mix(any_colour(rng), [within(rng, 0.2, 0.7); 3], 0.6);
    canvas.shaded((0.0, horizon), (1.0, 1.0), shade(floor, 1.15), shade(floor, within(rng, 0.5, 1.0)));
    if rng.random_bool(0.5) {
        let (y, dash) = (within(rng, ground, 1.05), within(rng, 0.08, 0.4));
        let mut x = within(rng, -0.3, 0.0);
        while x < 1.0 {
            canvas.rectangle((x, y), (x + dash, y + 0.02), [0.9, 0.9, 0.82], 0.7);
            x += dash * 2.0;
        }
    }
    for _ in 0..rng.random_range(0..8) {
        let (x, y) = (within(rng, 0.0, 1.0), within(rng, horizon, 1.0));
        let half = (within(rng, 0.03, 0.2), within(rng, 0.005, 0.03));
        canvas.ellipse((x, y), half, shade(floor, within(rng, 0.5, 1.5)), 0.5);
    }
}

/// House fronts with windows.
fn street(canvas: &mut Canvas, horizon: f32, rng: &mut impl Rng) {
    let mut x = within(rng, -0.2, 0.0);
    while x < 1.0 {
        let (width, top) = (within(rng, 0.14, 0.4), within(rng, -0.1, horizon - 0.1));
        let colour = any_colour(rng);
        canvas.rectangle((x, top), (x + width, horizon + 0.02), colour, 1.0);
        let (step, pane) = (within(rng, 0.07, 0.13), shade(colour, within(rng, 0.3, 1.7)));
        let mut y = top + 0.03;
        while y < horizon {
            let mut column = x + 0.02;
            while column + step * 0.6 < x + width {
                canvas.rectangle((column, y), (column + step * 0.55, y + step * 0.6), pane, 0.9);
                column += step;
            }
            y += step * 1.1;
        }
        x += width;
    }
}

/// Hills and trees.
fn country(canvas: &mut Canvas, horizon: f32, rng: &mut impl Rng) {
    let green = hsv(within(rng, 0.18, 0.42), within(rng, 0.2, 0.7), within(rng, 0.25, 0.7));
    for _ in 0..rng.random_range(1..4) {
        let (x, rise) = (within(rng, 0.0, 1.0), within(rng, 0.05, 0.35));
        canvas.ellipse((x, horizon), (within(rng, 0.3, 0.8), rise), shade(green, within(rng, 0.6, 1.5)), 1.0);
    }
    for _ in 0..rng.random_range(2..9) {
        let (x, height) = (within(rng, 0.0, 1.0), within(rng, 0.1, 0.5));
        let (leaf, top) = (shade(green, within(rng, 0.4, 1.3)), horizon - height);
        canvas.rectangle((x - 0.012, top), (x + 0.012, horizon), [0.25, 0.18, 0.12], 1.0);
        for _ in 0..4 {
            let at = (x + within(rng, -0.07, 0.07), top + within(rng, -0.05, 0.12));
            canvas.disc(at, within(rng, 0.04, 0.1), shade(leaf, within(rng, 0.8, 1.2)), 1.0);
        }
    }
}

/// Random shapes, whose edges distract from the car.
fn clutter(canvas: &mut Canvas, rng: &mut impl Rng) {
    for _ in 0..rng.random_range(8..22) {
        let colour = any_colour(rng);
        let at = (within(rng, 0.0, 1.0), within(rng, 0.0, 1.0));
        match rng.random_range(0..3) {
            0 => canvas.disc(at, within(rng, 0.03, 0.16), colour, 0.9),
            1 => canvas.line(
                &[at, (within(rng, 0.0, 1.0), within(rng, 0.0, 1.0))],
                within(rng, 0.01, 0.05),
                colour,
                0.9,
            ),
            _ => {
                let corner = |rng: &mut _| (at.0 + within(rng, -0.25, 0.25), at.1 + within(rng, -0.2, 0.2));
                canvas.polygon(&[corner(rng), corner(rng), corner(rng), corner(rng)], colour, 0.9);
            }
        }
    }
}

/// Planks, vertical or horizontal.
fn wall(canvas: &mut Canvas, horizon: f32, rng: &mut impl Rng) {
    let (colour, step) = (any_colour(rng), within(rng, 0.05, 0.16));
    let upright = rng.random_bool(0.5);
    let mut at = -within(rng, 0.0, step);
    while at < 1.0 {
        let plank = shade(colour, within(rng, 0.75, 1.25));
        if upright {
            canvas.rectangle((at, 0.0), (at + step * 0.92, horizon), plank, 1.0);
        } else {
            canvas.rectangle((0.0, at), (1.0, (at + step * 0.92).min(horizon)), plank, 1.0);
        }
        at += step;
    }
}

/// One or two objects between camera and car.
fn foreground(canvas: &mut Canvas, pose: &Pose, rng: &mut impl Rng) {
    for _ in 0..rng.random_range(1..=2) {
        let x = pose.centre + within(rng, -0.5, 0.5) * pose.extent;
        let colour = any_colour(rng);
        match rng.random_range(0..3) {
            0 => canvas.rectangle((x, 0.0), (x + within(rng, 0.015, 0.05), 1.0), colour, 1.0),
            1 => {
                let foot = pose.ground + within(rng, 0.02, 0.12);
                for _ in 0..6 {
                    let at = (x + within(rng, -0.09, 0.09), foot - within(rng, 0.0, 0.09));
                    canvas.disc(at, within(rng, 0.03, 0.07), shade(colour, within(rng, 0.7, 1.3)), 1.0);
                }
            }
            _ => {
                // A pedestrian.
                let foot = pose.ground + within(rng, 0.02, 0.1);
                let tall = pose.extent * within(rng, 0.3, 0.4);
                canvas.line(&[(x, foot), (x, foot - tall * 0.45)], 0.035, shade(colour, 0.5), 1.0);
                canvas.line(&[(x, foot - tall * 0.45), (x, foot - tall * 0.8)], 0.055, colour, 1.0);
                canvas.disc((x, foot - tall * 0.95), tall * 0.09, [0.72, 0.55, 0.45], 1.0);
            }
        }
    }
}

/// Averages the oversampled pixels, then applies light, blur and noise.
fn develop(canvas: &Canvas, size: u32, rng: &mut impl Rng) -> RgbImage {
    let (n, wide) = (size as usize, (size * OVERSAMPLING) as usize);
    let over = OVERSAMPLING as usize;
    let share = 1.0 / (255 * over * over) as f32;
    let source = canvas.bytes();
    let mut pixels = vec![0.0f32; n * n * 3];
    for (i, pixel) in pixels.chunks_exact_mut(3).enumerate() {
        let (row, column) = (i / n * over, i % n * over);
        for (dy, dx) in (0..over).flat_map(|dy| (0..over).map(move |dx| (dy, dx))) {
            let at = ((row + dy) * wide + column + dx) * 4;
            for c in 0..3 {
                pixel[c] += f32::from(source[at + c]) * share;
            }
        }
    }
    if rng.random_bool(0.15) {
        pixels = blurred(&pixels, n);
    }

    let exposure = within(rng, 0.75, 1.3);
    let contrast = within(rng, 0.75, 1.25);
    let tint: Colour = [within(rng, 0.88, 1.12), within(rng, 0.95, 1.05), within(rng, 0.88, 1.12)];
    // Light falls off along a random direction.
    let (falloff, angle) = (within(rng, 0.0, 0.45), within(rng, 0.0, std::f32::consts::TAU));
    let (dy, dx) = angle.sin_cos();
    let grain = within(rng, 0.01, 0.045);
    let mut image = RgbImage::new(size, size);
    for (i, (pixel, out)) in pixels.chunks_exact(3).zip(image.pixels_mut()).enumerate() {
        let (x, y) = ((i % n) as f32 / n as f32 - 0.5, (i / n) as f32 / n as f32 - 0.5);
        let light = exposure * (1.0 + falloff * 2.0 * (x * dx + y * dy));
        for c in 0..3 {
            // Triangular noise needs no `ln` or `cos`, so it has the same bits on every machine.
            let noise = grain * (rng.random::<f32>() + rng.random::<f32>() - 1.0);
            let value = ((pixel[c] - 0.5) * contrast + 0.5) * light * tint[c] + noise;
            out.0[c] = (value.clamp(0.0, 1.0) * 255.0).round() as u8;
        }
    }
    image
}

/// Mean over 3 x 3, edges repeated.
fn blurred(pixels: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![0.0; pixels.len()];
    for (i, value) in out.iter_mut().enumerate() {
        let (row, column, c) = (i / 3 / n, i / 3 % n, i % 3);
        for y in [row.saturating_sub(1), row, (row + 1).min(n - 1)] {
            for x in [column.saturating_sub(1), column, (column + 1).min(n - 1)] {
                *value += pixels[(y * n + x) * 3 + c] / 9.0;
            }
        }
    }
    out
}

fn any_colour(rng: &mut impl Rng) -> Colour {
    hsv(within(rng, 0.0, 1.0), within(rng, 0.0, 0.5), within(rng, 0.25, 0.95))
}

/// Hue, saturation, value, each 0 to 1.
fn hsv(hue: f32, saturation: f32, value: f32) -> Colour {
    let channel = |offset: f32| {
        let k = (offset + hue * 6.0) % 6.0;
        value - value * saturation * k.min(4.0 - k).clamp(0.0, 1.0)
    };
    [channel(5.0), channel(3.0), channel(1.0)]
}
