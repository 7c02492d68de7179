//! Draws simple shapes with tiny-skia; the canvas's transform sets the units.

use tiny_skia::{
    Color, FillRule, GradientStop, LineCap, LinearGradient, Paint, Path, PathBuilder, Pixmap, Point, Shader,
    SpreadMode, Stroke, Transform,
};

/// Red, green, blue, 0 to 1 (clamped when painted).
pub(super) type Colour = [f32; 3];

/// A point, or a pair of lengths, in the canvas's units.
pub(super) type Xy = (f32, f32);

/// Linear interpolation: `colour` at `share` 0, `other` at 1.
pub(super) fn mix(colour: Colour, other: Colour, share: f32) -> Colour {
    std::array::from_fn(|c| colour[c] + (other[c] - colour[c]) * share)
}

/// `colour` times `factor`: darker below 1, lighter above.
pub(super) fn shade(colour: Colour, factor: f32) -> Colour {
    colour.map(|value| (value * factor).clamp(0.0, 1.0))
}

/// A pixmap, and the transform of the next shapes.
///
/// Shapes too small or degenerate for a path are not drawn.
pub(super) struct Canvas {
    pixmap: Pixmap,
    /// From units to pixels.
    pub transform: Transform,
}

impl Canvas {
    /// A black canvas; `None` if `side` is 0.
    pub fn new(side: u32) -> Option<Self> {
        Some(Self { pixmap: Pixmap::new(side, side)?, transform: Transform::identity() })
    }

    /// Premultiplied RGBA bytes, row by row.
    pub fn bytes(&self) -> &[u8] {
        self.pixmap.data()
    }

    /// A polygon.
    pub fn polygon(&mut self, points: &[Xy], colour: Colour, alpha: f32) {
        self.fill(polygon(points), solid(colour, alpha));
    }

    /// A polygon with rounded corners; a point is x, y and the radius of its corner.
    pub fn rounded(&mut self, points: &[(f32, f32, f32)], colour: Colour, alpha: f32) {
        self.fill(rounded(points), solid(colour, alpha));
    }

    /// A polygon with rounded corners, shaded from `low` at height `from` to `high` at height `to`.
    pub fn rounded_shaded(&mut self, points: &[(f32, f32, f32)], (from, to): Xy, low: Colour, high: Colour) {
        self.fill(rounded(points), vertical(from, to, low, high));
    }

    /// A rectangle from its corners, shaded from `low` at `y0` to `high` at `y1`.
    pub fn shaded(&mut self, (x0, y0): Xy, (x1, y1): Xy, low: Colour, high: Colour) {
        self.fill(polygon(&[(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), vertical(y0, y1, low, high));
    }

    /// A rectangle from its corners.
    pub fn rectangle(&mut self, (x0, y0): Xy, (x1, y1): Xy, colour: Colour, alpha: f32) {
        self.polygon(&[(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, alpha);
    }

    /// A disc.
    pub fn disc(&mut self, (x, y): Xy, radius: f32, colour: Colour, alpha: f32) {
        self.fill(PathBuilder::from_circle(x, y, radius), solid(colour, alpha));
    }

    /// An ellipse from its centre and half axes.
    pub fn ellipse(&mut self, (x, y): Xy, (rx, ry): Xy, colour: Colour, alpha: f32) {
        let oval = tiny_skia::Rect::from_xywh(x - rx, y - ry, 2.0 * rx, 2.0 * ry);
        self.fill(oval.and_then(PathBuilder::from_oval), solid(colour, alpha));
    }

    /// An open line through `points`.
    pub fn line(&mut self, points: &[Xy], width: f32, colour: Colour, alpha: f32) {
        let mut path = PathBuilder::new();
        for (i, &(x, y)) in points.iter().enumerate() {
            if i == 0 { path.move_to(x, y) } else { path.line_to(x, y) }
        }
        let stroke = Stroke { width, line_cap: LineCap::Round, ..Stroke::default() };
        if let Some(path) = path.finish() {
            let paint = Paint { shader: solid(colour, alpha), ..Paint::default() };
            self.pixmap.stroke_path(&path, &paint, &stroke, self.transform, None);
        }
    }

    fn fill(&mut self, path: Option<Path>, shader: Shader<'_>) {
        if let Some(path) = path {
            let paint = Paint { shader, ..Paint::default() };
            self.pixmap.fill_path(&path, &paint, FillRule::Winding, self.transform, None);
        }
    }
}

fn colour([red, green, blue]: Colour, alpha: f32) -> Color {
    let unit = |value: f32| value.clamp(0.0, 1.0);
    // The values are clamped, so the fallback is never used.
    Color::from_rgba(unit(red), unit(green), unit(blue), unit(alpha)).unwrap_or(Color::BLACK)
}

fn solid(rgb: Colour, alpha: f32) -> Shader<'static> {
    Shader::SolidColor(colour(rgb, alpha))
}

fn vertical(from: f32, to: f32, low: Colour, high: Colour) -> Shader<'static> {
    let stops = vec![GradientStop::new(0.0, colour(low, 1.0)), GradientStop::new(1.0, colour(high, 1.0))];
    let (start, end) = (Point::from_xy(0.0, from), Point::from_xy(0.0, to));
    LinearGradient::new(start, end, stops, SpreadMode::Pad, Transform::identity())
        .unwrap_or_else(|| solid(low, 1.0))
}

fn polygon(points: &[Xy]) -> Option<Path> {
    let mut path = PathBuilder::new();
    for (i, &(x, y)) in points.iter().enumerate() {
        if i == 0 { path.move_to(x, y) } else { path.line_to(x, y) }
    }
    path.close();
    path.finish()
}

/// Each corner becomes a quadratic curve that starts and ends `radius` away from it,
/// or half an edge away where the edge is short.
fn rounded(points: &[(f32, f32, f32)]) -> Option<Path> {
    let n = points.len();
    let mut path = PathBuilder::new();
    for i in 0..n {
        let (x, y, radius) = points[i];
        let towards = |(px, py, _): (f32, f32, f32)| {
            let (dx, dy) = (px - x, py - y);
            let length = dx.hypot(dy).max(1e-6);
            let step = radius.min(length / 2.0) / length;
            (x + dx * step, y + dy * step)
        };
        let (start, end) = (towards(points[(i + n - 1) % n]), towards(points[(i + 1) % n]));
        if i == 0 {
            path.move_to(start.0, start.1)
        } else {
            path.line_to(start.0, start.1)
        }
        path.quad_to(x, y, end.0, end.1);
    }
    path.close();
    path.finish()
}
