//! Draws a [`Design`], seen from its right side.

use std::f32::consts::{FRAC_PI_2, PI, TAU};

use super::canvas::{Canvas, Colour, Xy, mix, shade};
use super::design::{Design, Lamp, Rim};

/// What differs between pictures of one model.
pub(super) struct Finish {
    /// Paint of the body.
    pub paint: Colour,
    /// Colours of the glass at the bottom, and at the top, where it reflects the sky.
    pub glass: (Colour, Colour),
    /// Rotation of the wheels, radians.
    pub wheel_angle: f32,
    /// Whether the lamps are lit.
    pub lit: bool,
    /// Position of a streak of light on the windows, 0 (rear) to 1 (front).
    pub glare: Option<f32>,
}

const RUBBER: Colour = [0.07, 0.07, 0.08];
const PLASTIC: Colour = [0.15, 0.15, 0.16];
const CHROME: Colour = [0.82, 0.84, 0.87];

/// Draws the car in metres: ground at y = 0, rear bumper at x = 0.
pub(super) fn draw(canvas: &mut Canvas, design: &Design, finish: &Finish) {
    shadow(canvas, design);
    if design.spare_wheel {
        let (y, r) = (design.ride + 0.55, design.wheel * 0.95);
        canvas.rounded(
            &[(-0.2, y - r, 0.08), (-0.2, y + r, 0.08), (0.1, y + r, 0.02), (0.1, y - r, 0.02)],
            RUBBER,
            1.0,
        );
    }
    body(canvas, design, finish);
    cabin(canvas, design, finish);
    side(canvas, design, finish);
    lamps(canvas, design, finish);
    for x in [design.axles.0, design.axles.1] {
        arch(canvas, design, x);
        wheel(canvas, design, x, finish.wheel_angle);
    }
}

/// A soft shadow on the ground: a stack of faint ellipses.
fn shadow(canvas: &mut Canvas, design: &Design) {
    let half = design.length / 2.0;
    for i in 0..5 {
        let spread = 0.72 + 0.09 * i as f32;
        canvas.ellipse(
            (half, 0.01),
            (half * spread * 1.02, 0.05 + 0.035 * i as f32),
            [0.02, 0.02, 0.03],
            0.22,
        );
    }
}

fn body(canvas: &mut Canvas, d: &Design, finish: &Finish) {
    let soft = d.softness;
    let tail = d.deck - 0.03;
    let (rear_lean, front_lean) = d.lean;
    let outline = [
        (0.05, d.ride, 0.06),
        (0.0, d.ride + 0.3, 0.08),
        (rear_lean * 0.5, tail, soft.min(0.16)),
        (d.glass.0.max(rear_lean * 0.5 + 0.02), d.deck, 0.06),
        (d.roof.0, d.height, soft + 0.1),
        ((d.roof.0 + d.roof.1) / 2.0, d.height + 0.02, 0.6),
        (d.roof.1, d.height - d.roof_drop, soft + 0.12),
        (d.glass.1, d.cowl, 0.08),
        (d.length - front_lean, d.nose, soft),
        (d.length, d.nose * 0.72, soft * 0.6),
        (d.length - 0.01, d.ride + 0.12, 0.06),
        (d.length - 0.09, d.ride, 0.05),
    ];
    let (low, high) = (shade(finish.paint, 0.62), mix(finish.paint, [1.0; 3], 0.16));
    canvas.rounded_shaded(&outline, (d.ride, d.height), low, high);

    if let Some((share, colour)) = d.lower_side {
        let top = |x| d.ride + (belt(d, x) - d.ride) * share;
        let (rear, front) = (0.04, d.length - 0.02);
        canvas.rounded(
            &[
                (rear, d.ride, 0.06),
                (rear, top(rear), 0.02),
                (front, top(front), 0.02),
                (front, d.ride + 0.05, 0.06),
            ],
            colour,
            1.0,
        );
    }
    if let Some(colour) = d.bonnet_colour {
        let (foot, tip) = ((d.glass.1, d.cowl), (d.length - front_lean, d.nose));
        canvas.polygon(&[foot, tip, (tip.0, tip.1 - 0.12), (foot.0, foot.1 - 0.14)], colour, 1.0);
    }
    if let Some((share, colour)) = d.stripe {
        let y = |x| d.ride + (belt(d, x) - d.ride) * share;
        canvas.line(&[(0.14, y(0.14)), (d.length - 0.3, y(d.length - 0.3))], 0.09, colour, 1.0);
    }
    let bumper = if d.dark_bumpers { PLASTIC } else { shade(finish.paint, 0.5) };
    let top = d.ride + d.bumper_height;
    canvas.rounded(
        &[(0.0, d.ride, 0.05), (0.0, top, 0.04), (0.42, top, 0.03), (0.42, d.ride, 0.02)],
        bumper,
        0.95,
    );
    let front = d.length - 0.42;
    canvas.rounded(
        &[(front, d.ride, 0.02), (front, top, 0.03), (d.length, top, 0.05), (d.length - 0.03, d.ride, 0.05)],
        bumper,
        0.95,
    );
    let sill = if d.cladding { (PLASTIC, 0.17) } else { (shade(finish.paint, 0.42), 0.07) };
    canvas.rectangle((d.axles.0, d.ride), (d.axles.1, d.ride + sill.1), sill.0, 1.0);
}

/// Height of the lower edge of the windows at `x`: it rises towards the rear.
fn belt(d: &Design, x: f32) -> f32 {
    let (rear, front) = d.glass;
    let way = ((front - x) / (front - rear)).clamp(0.0, 1.0);
    let base = d.cowl.min(d.deck) + (d.cowl.max(d.deck) - d.cowl.min(d.deck)) * 0.3;
    base + d.belt.0 + d.belt.1 * way
}

fn cabin(canvas: &mut Canvas, d: &Design, finish: &Finish) {
    let (rear, front) = d.glass;
    if let Some(colour) = d.roof_colour {
        let outline = [
            (rear, d.deck, 0.05),
            (d.roof.0, d.height, d.softness + 0.1),
            (d.roof.1, d.height - d.roof_drop, d.softness + 0.12),
            (front, d.cowl, 0.05),
        ];
        canvas.rounded(&outline, colour, 1.0);
    }
    // The windows are one area inside the cabin; pillars divide it afterwards.
    let (top_rear, top_front) = (d.height - d.roof_band, d.height - d.roof_drop - d.roof_band);
    let inset = 0.09;
    let area = [
        (rear + inset * 1.6, belt(d, rear)),
        (d.roof.0 + inset, top_rear),
        (d.roof.1 - inset * 0.4, top_front),
        (front - inset * 1.6, belt(d, front)),
    ];
    if !d.painted_pillars {
        let corners = area.map(|(x, y)| (x, y, 0.05));
        canvas.rounded(&corners, [0.05, 0.05, 0.06], 1.0);
    }
    if d.chrome {
        canvas.line(&[area[0], area[1], area[2], area[3], area[0]], 0.045, CHROME, 0.9);
    }
    let mut cuts = vec![area[0].0 - 1.0];
    for &pillar in &d.pillars {
        cuts.push(rear + (front - rear) * pillar);
    }
    cuts.push(area[3].0 + 1.0);
    let half = d.pillar_width / 2.0;
    for (i, pair) in cuts.windows(2).enumerate() {
        let pane = clip(&clip(&area, pair[0] + half, true), pair[1] - half, false);
        if pane.len() < 3 || (i == 0 && d.blind_rear) {
            continue;
        }
        let corners: Vec<_> = pane.iter().map(|&(x, y)| (x, y, 0.05)).collect();
        canvas.rounded_shaded(&corners, (belt(d, front), d.height), finish.glass.0, finish.glass.1);
        if let Some(glare) = finish.glare {
            let x = pair[0].max(rear) + (pair[1].min(front) - pair[0].max(rear)) * glare;
            let streak = clip(&clip(&pane, x, true), x + 0.14, false);
            canvas.polygon(&streak, [1.0; 3], 0.22);
        }
    }
}

/// The part of a convex polygon with x above (or below) `cut`.
fn clip(points: &[Xy], cut: f32, above: bool) -> Vec<Xy> {
    let inside = |(x, _): Xy| if above { x >= cut } else { x <= cut };
    let mut kept = Vec::with_capacity(points.len() + 1);
    for i in 0..points.len() {
        let (a, b) = (points[i], points[(i + 1) % points.len()]);
        if inside(a) {
            kept.push(a);
        }
        if inside(a) != inside(b) {
            kept.push((cut, a.1 + (b.1 - a.1) * (cut - a.0) / (b.0 - a.0)));
        }
    }
    kept
}

/// Details of doors and roof.
fn side(canvas: &mut Canvas, d: &Design, finish: &Finish) {
    let (rear, front) = d.glass;
    let seam = shade(finish.paint, 0.4);
    let height = |share: f32, x: f32| d.ride + (belt(d, x) - d.ride) * share;
    let (from, to) = (0.1, d.length - 0.25);
    if let Some((share, slope)) = d.crease {
        let ends = [(from, height(share + slope, from)), (to, height(share - slope, to))];
        canvas.line(&ends, 0.035, seam, 0.8);
        canvas.line(&ends.map(|(x, y)| (x, y - 0.035)), 0.03, mix(finish.paint, [1.0; 3], 0.4), 0.6);
    }
    if let Some(share) = d.strip {
        let colour = if d.chrome { CHROME } else { PLASTIC };
        canvas.line(&[(from, height(share, from)), (to, height(share, from))], 0.06, colour, 0.95);
    }
    // Doors: a seam under each pillar and at the front, a handle behind each seam but the last.
    let mut seams: Vec<f32> = d.pillars.iter().map(|p| rear + (front - rear) * p).collect();
    seams.push(front - 0.22);
    for (i, &x) in seams.iter().enumerate() {
        canvas.line(&[(x, belt(d, x)), (x, d.ride + 0.14)], 0.025, seam, 0.9);
        let wide_enough = seams.get(i + 1).is_some_and(|next| next - x > 0.5);
        if wide_enough {
            let (hx, hy) = (x + 0.1, height(0.86, x));
            canvas.line(&[(hx, hy), (hx + 0.16, hy)], 0.045, if d.chrome { CHROME } else { seam }, 1.0);
        }
    }
    let mirror = (front - 0.3, belt(d, front) + 0.09);
    canvas.ellipse(mirror, (0.1, 0.075), shade(finish.paint, 0.75), 1.0);
    if d.rails {
        let (a, b) = (d.roof.0 + 0.1, d.roof.1 - 0.1);
        canvas.line(&[(a, d.height + 0.06), (b, d.height - d.roof_drop + 0.06)], 0.045, PLASTIC, 1.0);
        for (x, y) in [(a, d.height), (b, d.height - d.roof_drop)] {
            canvas.line(&[(x, y), (x, y + 0.06)], 0.05, PLASTIC, 1.0);
        }
    }
    if let Some(size) = d.spoiler {
        // On the boot where there is one, else on the end of the roof.
        let (x, y) = if d.roof.0 > 0.25 * d.length { (0.12, d.deck) } else { (d.roof.0 + 0.05, d.height) };
        let blade = [(x - size, y + 0.05 + size * 0.4), (x + 0.28, y + 0.03), (x + 0.28, y - 0.05)];
        canvas.polygon(&blade, shade(finish.paint, 0.7), 1.0);
    }
    if let Some(place) = d.aerial {
        let x = d.roof.0 + (d.roof.1 - d.roof.0) * place;
        canvas.line(&[(x, d.height - 0.04), (x - 0.22, d.height + 0.28)], 0.025, RUBBER, 1.0);
    }
}

fn lamps(canvas: &mut Canvas, d: &Design, finish: &Finish) {
    let light = if finish.lit { [1.0, 0.98, 0.82] } else { [0.80, 0.84, 0.86] };
    let red = if finish.lit { [1.0, 0.16, 0.1] } else { [0.66, 0.06, 0.07] };
    let head = (d.length - 0.05 - d.lean.1 * 0.4, d.nose * 0.82);
    lamp(canvas, d.headlamp, head, -d.lamp_size.0, light);
    let tail = (0.03 + d.lean.0 * 0.2, d.deck - 0.2);
    lamp(canvas, d.tail_lamp, tail, d.lamp_size.1, red);
}

/// A lamp at (x, y). It extends towards the rear for a negative `size`, towards the front for a positive one.
fn lamp(canvas: &mut Canvas, shape: Lamp, (x, y): Xy, size: f32, colour: Colour) {
    let scale = size.abs();
    match shape {
        Lamp::Round => canvas.disc((x + 0.12 * size, y), 0.12 * scale, colour, 1.0),
        Lamp::Slim => canvas.polygon(
            &[(x, y - 0.05 * scale), (x, y + 0.05 * scale), (x + 0.52 * size, y + 0.09 * scale)],
            colour,
            1.0,
        ),
        Lamp::Upright => {
            canvas.rectangle((x, y - 0.22 * scale), (x + 0.13 * size, y + 0.13 * scale), colour, 1.0)
        }
        Lamp::Block => {
            canvas.rectangle((x, y - 0.09 * scale), (x + 0.32 * size, y + 0.08 * scale), colour, 1.0)
        }
    }
}

/// The dark wheel arch: the part of a disc above the sill, cut off at the top if it is square.
fn arch(canvas: &mut Canvas, d: &Design, x: f32) {
    let rim = d.wheel + d.arch;
    let opening = |radius: f32| -> Vec<Xy> {
        (0..=24)
            .map(|i| {
                let angle = PI * i as f32 / 24.0;
                let (s, c) = angle.sin_cos();
                let y = if d.square_arch { (s * 1.5).min(0.92) } else { s };
                (x + radius * c, d.wheel + radius * y)
            })
            .chain([(x - radius, d.ride), (x + radius, d.ride)])
            .collect()
    };
    if d.cladding {
        canvas.polygon(&opening(rim + 0.08), PLASTIC, 1.0);
    }
    canvas.polygon(&opening(rim), [0.03, 0.03, 0.035], 1.0);
}

fn wheel(canvas: &mut Canvas, d: &Design, x: f32, angle: f32) {
    let centre = (x, d.wheel);
    let rim = d.wheel * d.rim_share;
    let metal = if d.dark_rim { [0.30, 0.31, 0.33] } else { [0.76, 0.78, 0.80] };
    let gap = [0.11, 0.11, 0.12];
    canvas.disc(centre, d.wheel, RUBBER, 1.0);
    let spoke = |canvas: &mut Canvas, angle: f32, from: f32, to: f32, width: f32| {
        let (s, c) = angle.sin_cos();
        canvas.line(&[(x + c * from, d.wheel + s * from), (x + c * to, d.wheel + s * to)], width, metal, 1.0);
    };
    match d.rim {
        Rim::Spokes(count, width) => {
            canvas.disc(centre, rim, metal, 1.0);
            canvas.disc(centre, rim * 0.86, gap, 1.0);
            for i in 0..count {
                spoke(canvas, angle + TAU * i as f32 / count as f32, 0.0, rim * 0.82, rim * width);
            }
        }
        Rim::Twin(count) => {
            canvas.disc(centre, rim, metal, 1.0);
            canvas.disc(centre, rim * 0.88, gap, 1.0);
            for i in 0..count {
                let middle = angle + TAU * i as f32 / count as f32;
                for side in [-0.2, 0.2] {
                    spoke(canvas, middle + side, rim * 0.15, rim * 0.85, rim * 0.11);
                }
            }
        }
        Rim::Holes(count) => {
            canvas.disc(centre, rim, metal, 1.0);
            for i in 0..count {
                let (s, c) = (angle + FRAC_PI_2 + TAU * i as f32 / count as f32).sin_cos();
                canvas.disc((x + c * rim * 0.66, d.wheel + s * rim * 0.66), rim * 0.17, gap, 1.0);
            }
        }
        Rim::Disc => {
            canvas.disc(centre, rim, metal, 1.0);
            canvas.disc(centre, rim * 0.74, shade(metal, 0.72), 1.0);
            canvas.disc(centre, rim * 0.64, metal, 1.0);
        }
    }
    canvas.disc(centre, rim * 0.2, shade(metal, 0.6), 1.0);
}
