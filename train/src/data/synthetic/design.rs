//! What makes one car model differ from another.

use rand::{Rng, RngExt};

use super::canvas::Colour;

/// Kinds of body. Each has typical proportions, which vary between designs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Three boxes: bonnet, cabin, boot.
    Sedan,
    /// Two boxes, steep tail.
    Hatchback,
    /// Two boxes, long roof.
    Wagon,
    /// Low, two doors, sloping back.
    Coupe,
    /// High, two boxes, much ground clearance.
    OffRoader,
    /// Cabin in front of an open bed.
    Pickup,
    /// One box.
    Van,
    /// A roof that falls to the tail in one line.
    Liftback,
    /// Short and tall.
    Microcar,
}

impl Body {
    /// All kinds. Class `i` has kind `i` modulo their number, so that both splits contain all kinds.
    pub const ALL: [Self; 9] = [
        Self::Sedan,
        Self::Hatchback,
        Self::Wagon,
        Self::Coupe,
        Self::OffRoader,
        Self::Pickup,
        Self::Van,
        Self::Liftback,
        Self::Microcar,
    ];

    /// The word in a class's name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Sedan => "sedan",
            Self::Hatchback => "hatchback",
            Self::Wagon => "wagon",
            Self::Coupe => "coupe",
            Self::OffRoader => "off-roader",
            Self::Pickup => "pickup",
            Self::Van => "van",
            Self::Liftback => "liftback",
            Self::Microcar => "microcar",
        }
    }

    /// Typical proportions.
    fn template(self) -> Template {
        let t = |length, height, ride, roof, glass, deck, cowl, nose| Template {
            length,
            height,
            ride,
            roof,
            glass,
            deck,
            cowl,
            nose,
        };
        match self {
            Self::Sedan => t(4.7, 1.45, 0.19, (0.33, 0.55), (0.15, 0.72), 0.98, 0.96, 0.72),
            Self::Hatchback => t(4.1, 1.50, 0.18, (0.15, 0.54), (0.04, 0.74), 0.98, 0.98, 0.76),
            Self::Wagon => t(4.8, 1.48, 0.18, (0.10, 0.56), (0.03, 0.72), 0.98, 0.96, 0.72),
            Self::Coupe => t(4.4, 1.28, 0.15, (0.38, 0.52), (0.13, 0.68), 0.90, 0.86, 0.62),
            Self::OffRoader => t(4.6, 1.80, 0.30, (0.10, 0.56), (0.03, 0.70), 1.14, 1.14, 1.02),
            Self::Pickup => t(5.2, 1.78, 0.30, (0.46, 0.62), (0.42, 0.74), 1.08, 1.12, 1.00),
            Self::Van => t(4.8, 1.98, 0.20, (0.04, 0.68), (0.02, 0.87), 1.06, 1.08, 0.80),
            Self::Liftback => t(4.6, 1.40, 0.17, (0.36, 0.54), (0.05, 0.72), 0.96, 0.92, 0.68),
            Self::Microcar => t(3.1, 1.54, 0.17, (0.14, 0.56), (0.05, 0.82), 0.96, 0.98, 0.80),
        }
    }
}

struct Template {
    length: f32,
    height: f32,
    ride: f32,
    /// Rear and front end of the roof.
    roof: (f32, f32),
    /// Lower ends of the rear and the front window.
    glass: (f32, f32),
    deck: f32,
    cowl: f32,
    nose: f32,
}

/// Patterns of a wheel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rim {
    /// Number of spokes, and their width as a share of the rim's radius.
    Spokes(usize, f32),
    /// A disc with this many holes.
    Holes(usize),
    /// A plain disc with a ring.
    Disc,
    /// This many pairs of thin spokes.
    Twin(usize),
}

/// Shapes of lamps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lamp {
    Round,
    Slim,
    Upright,
    Block,
}

/// One model. Lengths in metres, x from the rear bumper to the front one, y up from the ground.
#[derive(Debug, Clone, PartialEq)]
pub struct Design {
    /// A made-up name with the kind of body, unique within a fleet.
    pub name: String,
    /// Kind of body.
    pub body: Body,
    pub(super) length: f32,
    pub(super) height: f32,
    /// Ground clearance.
    pub(super) ride: f32,
    /// Ends of the roof, rear and front.
    pub(super) roof: (f32, f32),
    /// How far the front of the roof lies below its rear.
    pub(super) roof_drop: f32,
    /// Lower ends of the rear and the front window.
    pub(super) glass: (f32, f32),
    pub(super) deck: f32,
    pub(super) cowl: f32,
    pub(super) nose: f32,
    /// How far tail and nose lean inwards at the top.
    pub(super) lean: (f32, f32),
    /// Radius of the body's corners.
    pub(super) softness: f32,
    /// Lower edge of the side windows above the deck, and how much it rises to the rear.
    pub(super) belt: (f32, f32),
    /// Height of the band between windows and roof line.
    pub(super) roof_band: f32,
    /// Pillars as shares of the way from the rear to the front foot of the windows.
    pub(super) pillars: Vec<f32>,
    pub(super) pillar_width: f32,
    /// Pillars painted like the body instead of black.
    pub(super) painted_pillars: bool,
    /// Metal in place of rear side windows (panel van, pickup bed).
    pub(super) blind_rear: bool,
    /// Wheel centres, rear and front.
    pub(super) axles: (f32, f32),
    pub(super) wheel: f32,
    /// Radius of the rim as a share of the wheel's.
    pub(super) rim_share: f32,
    pub(super) rim: Rim,
    pub(super) dark_rim: bool,
    /// Gap between tyre and arch.
    pub(super) arch: f32,
    pub(super) square_arch: bool,
    /// Unpainted plastic around arches and sill.
    pub(super) cladding: bool,
    /// Roof in a colour of its own.
    pub(super) roof_colour: Option<Colour>,
    /// Lower part of the side in another colour: its upper edge, 0 (sill) to 1 (belt), and the colour.
    pub(super) lower_side: Option<(f32, Colour)>,
    /// Bonnet in a colour of its own.
    pub(super) bonnet_colour: Option<Colour>,
    /// A stripe over bonnet, doors and tail: its height, 0 (sill) to 1 (belt), and the colour.
    pub(super) stripe: Option<(f32, Colour)>,
    pub(super) headlamp: Lamp,
    pub(super) tail_lamp: Lamp,
    /// Relative sizes of head and tail lamps.
    pub(super) lamp_size: (f32, f32),
    /// A crease along the side: its height, 0 (sill) to 1 (belt), and its slope.
    pub(super) crease: Option<(f32, f32)>,
    /// Height of a rubbing strip, 0 (sill) to 1 (belt).
    pub(super) strip: Option<f32>,
    pub(super) chrome: bool,
    pub(super) rails: bool,
    pub(super) spoiler: Option<f32>,
    /// Position of the aerial as a share of the roof's length.
    pub(super) aerial: Option<f32>,
    pub(super) spare_wheel: bool,
    pub(super) dark_bumpers: bool,
    pub(super) bumper_height: f32,
}

impl Design {
    /// Draws a random design for `class`.
    pub(in crate::data) fn draw(class: usize, rng: &mut impl Rng) -> Self {
        let body = Body::ALL[class % Body::ALL.len()];
        let t = body.template();
        let length = t.length * within(rng, 0.88, 1.12);
        let height = t.height * within(rng, 0.9, 1.1);
        let at = |rng: &mut _, share: f32, spread: f32| (share + within(rng, -spread, spread)) * length;
        let roof = (at(rng, t.roof.0, 0.07), at(rng, t.roof.1, 0.065));
        let glass = (at(rng, t.glass.0, 0.03).max(0.01 * length), at(rng, t.glass.1, 0.06));
        let roof = (roof.0.max(glass.0 + 0.05), roof.1.min(glass.1 - 0.22).max(roof.0 + 0.3));
        let deck = t.deck * within(rng, 0.93, 1.08);
        let cowl = (t.cowl * within(rng, 0.94, 1.07)).min(height - 0.32);
        let small_doors = matches!(body, Body::Coupe | Body::Pickup) || rng.random_bool(0.25);
        let pillars = match (small_doors, body) {
            (true, Body::Pickup) if rng.random_bool(0.5) => vec![within(rng, 0.4, 0.52)],
            (true, Body::Coupe | Body::Pickup) => vec![within(rng, 0.24, 0.4)],
            (true, _) => vec![within(rng, 0.4, 0.5)],
            (false, Body::Wagon | Body::Van | Body::OffRoader) => {
                vec![within(rng, 0.2, 0.3), within(rng, 0.5, 0.6)]
            }
            (false, _) => vec![within(rng, 0.12, 0.22), within(rng, 0.46, 0.56)],
        };
        let tall = matches!(body, Body::OffRoader | Body::Pickup);
        let wheel = within(rng, 0.27, 0.36) + if tall { within(rng, 0.03, 0.07) } else { 0.0 };
        let overhang = (within(rng, 0.13, 0.22) * length, within(rng, 0.13, 0.20) * length);
        let margin = wheel + 0.1;
        Self {
            name: name(class, body, rng),
            body,
            length,
            height,
            ride: t.ride * within(rng, 0.8, 1.2),
            roof,
            roof_drop: within(rng, 0.0, 0.09),
            glass,
            deck: deck.min(height - 0.3),
            cowl,
            nose: t.nose * within(rng, 0.9, 1.1),
            lean: (within(rng, 0.0, 0.16), within(rng, 0.0, 0.22)),
            softness: within(rng, 0.04, 0.36),
            belt: (within(rng, -0.06, 0.04), within(rng, 0.0, 0.10)),
            roof_band: within(rng, 0.07, 0.14),
            pillars,
            pillar_width: within(rng, 0.05, 0.13),
            painted_pillars: rng.random_bool(0.5),
            blind_rear: body == Body::Van && rng.random_bool(0.4),
            axles: (overhang.0.max(margin), length - overhang.1.max(margin)),
            wheel,
            rim_share: within(rng, 0.5, 0.82),
            rim: match rng.random_range(0..4) {
                0 => Rim::Spokes(rng.random_range(3..=8), within(rng, 0.14, 0.3)),
                1 => Rim::Holes(rng.random_range(5..=9)),
                2 => Rim::Disc,
                _ => Rim::Twin(rng.random_range(4..=6)),
            },
            dark_rim: rng.random_bool(0.3),
            arch: within(rng, 0.03, 0.10),
            square_arch: rng.random_bool(if tall { 0.5 } else { 0.15 }),
            cladding: rng.random_bool(if tall { 0.5 } else { 0.2 }),
            roof_colour: two_tone(rng, 0.4),
            lower_side: two_tone(rng, 0.35).map(|colour| (within(rng, 0.3, 0.6), colour)),
            bonnet_colour: two_tone(rng, 0.2),
            stripe: two_tone(rng, 0.25).map(|colour| (within(rng, 0.62, 0.85), colour)),
            headlamp: lamp(rng),
            tail_lamp: lamp(rng),
            lamp_size: (within(rng, 0.7, 1.6), within(rng, 0.7, 1.6)),
            crease: rng.random_bool(0.7).then(|| (within(rng, 0.4, 0.85), within(rng, -0.06, 0.12))),
            strip: rng.random_bool(0.35).then(|| within(rng, 0.15, 0.5)),
            chrome: rng.random_bool(0.35),
            rails: matches!(body, Body::Wagon | Body::OffRoader | Body::Van) && rng.random_bool(0.5),
            spoiler: rng.random_bool(0.22).then(|| within(rng, 0.08, 0.2)),
            aerial: rng.random_bool(0.35).then(|| within(rng, 0.05, 0.95)),
            spare_wheel: body == Body::OffRoader && rng.random_bool(0.45),
            dark_bumpers: rng.random_bool(0.35),
            bumper_height: within(rng, 0.14, 0.26),
        }
    }
}

pub(super) fn within(rng: &mut impl Rng, least: f32, most: f32) -> f32 {
    rng.random_range(least..most)
}

/// Black, white or silver with this `probability`: the colour of trim, the same for every paint of a model.
fn two_tone(rng: &mut impl Rng, probability: f64) -> Option<Colour> {
    const TRIM: [Colour; 3] = [[0.07, 0.07, 0.08], [0.93, 0.93, 0.91], [0.55, 0.57, 0.6]];
    rng.random_bool(probability).then(|| TRIM[rng.random_range(0..TRIM.len())])
}

fn lamp(rng: &mut impl Rng) -> Lamp {
    [Lamp::Round, Lamp::Slim, Lamp::Upright, Lamp::Block][rng.random_range(0..4)]
}

/// Two syllables, the class number (which makes it unique) and the kind of body.
fn name(class: usize, body: Body, rng: &mut impl Rng) -> String {
    const FIRST: [&str; 12] =
        ["Tal", "Vor", "Bel", "Nim", "Kes", "Ard", "Lum", "Sor", "Del", "Rav", "Ost", "Mir"];
    const SECOND: [&str; 10] = ["ena", "aro", "ix", "ida", "une", "ero", "is", "ando", "ou", "elle"];
    let (first, second) = (FIRST[rng.random_range(0..12)], SECOND[rng.random_range(0..10)]);
    format!("{first}{second} {} {}", class + 1, body.word())
}
