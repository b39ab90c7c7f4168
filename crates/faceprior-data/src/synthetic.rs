//! Synthetic faces: a parametric renderer with known identities and landmarks.
//!
//! An [`Identity`] is who somebody is (bones, colours, hair), a [`Nuisance`] is how a picture was taken (pose, light,
//! expression, background, camera). Both are drawn from continuous distributions: no two identities coincide, similar
//! ones exist, and the nuisance moves pixels more than the identity does, so that telling people apart takes more than
//! comparing pixels. [`render`] is a pure function: same parameters, same bytes.
//!
//! # Coordinates
//! Face units: the origin lies between the eyes, `u` to the image's right, `v` down; the eyes are 0.88 apart on
//! average, which is 0.3 of the picture's side, and the mouth lies at `v` = 0.92: about the frame of the usual
//! five-point alignment.
//!
//! # How
//! Each pixel is computed on its own, back to front: background, hair behind, neck, ears, face, features, hair in
//! front, glasses. Shapes are signed distances, whose edges are spread over one pixel, so that every size is free of
//! jaggies. Turning the head shifts each point of the face by its depth times the angle (parallax). Colours are mixed
//! in linear light (gamma 2, which needs only products and a square root).

use std::collections::HashSet;

use rand::Rng;

use crate::random::{below, permutation, stream, unit};
use crate::{DataError, Dataset, Image, Pair};

/// Left eye, right eye, nose tip, left and right corner of the mouth (the image's left and right), as `[x, y]` in
/// pixels; pixel centres lie at `.5`.
pub type Landmarks = [[f32; 2]; 5];

type Color = [f32; 3];

/// Side of a face unit, as a share of the picture's side.
const UNIT: f32 = 0.342;
/// Where the point between the eyes lies in an undisturbed picture.
const ORIGIN: [f32; 2] = [0.5, 0.465];
/// Level of the widest part of the face.
const CHEEK: f32 = 0.14;

/// Who somebody is. Lengths are in face units, colours are display colours in `[0, 1]`, shares in `[0, 1]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity {
    /// Skin colour.
    pub skin: [f32; 3],
    /// Half the face's width at the cheeks.
    pub face_width: f32,
    /// Height of the skull above the eyes.
    pub skull_height: f32,
    /// Distance from mouth to chin.
    pub chin_length: f32,
    /// How angular the jaw is: 0 oval, 0.7 square.
    pub jaw_angle: f32,
    /// How much the face narrows towards the chin.
    pub jaw_taper: f32,
    /// Half the distance between the eyes.
    pub eye_spacing: f32,
    /// Half the width of an eye.
    pub eye_width: f32,
    /// Height of the open eye above its axis.
    pub eye_height: f32,
    /// Slope of the eye's axis; positive lifts the outer corner.
    pub eye_tilt: f32,
    /// Radius of the iris.
    pub iris_radius: f32,
    /// Colour of the iris.
    pub iris: [f32; 3],
    /// Height of the fold above the eye; small is a single lid.
    pub lid_fold: f32,
    /// Height of the brows above the eyes.
    pub brow_height: f32,
    /// Half the thickness of the brows.
    pub brow_thickness: f32,
    /// Half the length of the brows.
    pub brow_length: f32,
    /// Height of the brows' arch.
    pub brow_arch: f32,
    /// Slope of the brows; positive lifts the outer end.
    pub brow_slope: f32,
    /// Level of the nose tip.
    pub nose_length: f32,
    /// Half the width of the nose at the nostrils.
    pub nose_width: f32,
    /// How far the ridge stands out.
    pub nose_height: f32,
    /// Level of the mouth.
    pub mouth_level: f32,
    /// Half the width of the mouth at rest.
    pub mouth_width: f32,
    /// Thickness of the upper lip.
    pub upper_lip: f32,
    /// Thickness of the lower lip.
    pub lower_lip: f32,
    /// Depth of the cupid's bow.
    pub lip_bow: f32,
    /// Colour of the lips.
    pub lips: [f32; 3],
    /// Size of the ears.
    pub ear_size: f32,
    /// Colour of hair, brows and beard.
    pub hair: [f32; 3],
    /// How much of the head's hair there is; 0 is bald.
    pub hair_cover: f32,
    /// Level where the hair behind ends: about 0 is short, more than 1 is long.
    pub hair_length: f32,
    /// How far the hair stands off the skull.
    pub hair_volume: f32,
    /// Level of the hairline in the middle of the forehead (negative: above the eyes).
    pub hairline: f32,
    /// How much lower the fringe is on one side.
    pub hair_part: f32,
    /// How wavy the hair's edge is.
    pub hair_curl: f32,
    /// Where hair begins to cover the cheeks, as a share of the face's half width; 1 and more covers nothing.
    pub hair_curtain: f32,
    /// Density of the beard.
    pub beard: f32,
    /// Reach of the beard: 0 a goatee, 1 a full beard.
    pub beard_reach: f32,
    /// Density of freckles.
    pub freckles: f32,
    /// Moles: `[u, v, radius]`, none with radius 0.
    pub moles: [[f32; 3]; 2],
    /// Depth of the folds of age.
    pub age: f32,
    /// Thickness of the glasses' rims; 0 for none.
    pub glasses: f32,
    /// Shape of the glasses: 0 round, 1 square.
    pub glasses_shape: f32,
    /// Colour of the rims.
    pub glasses_color: [f32; 3],
    /// Seed of strands and freckles.
    pub seed: u32,
}

/// How a picture of somebody was taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Nuisance {
    /// Shift of the face, as shares of the picture's side.
    pub shift: [f32; 2],
    /// Size of the face; 1 is the usual one.
    pub scale: f32,
    /// Rotation in the picture's plane in radians, clockwise.
    pub tilt: f32,
    /// Turn to the image's right, as the tangent of the angle.
    pub yaw: f32,
    /// Nod downwards, as the tangent of the angle.
    pub pitch: f32,
    /// Direction to the light: right, down, towards the viewer; of any length.
    pub light: [f32; 3],
    /// Strength of the directed light against the diffuse one, 0 to 1.
    pub light_strength: f32,
    /// Colour of the light.
    pub light_color: [f32; 3],
    /// Brightness of the whole picture; 1 is the usual one.
    pub exposure: f32,
    /// Where the eyes look: right and down, 1 is the corner.
    pub gaze: [f32; 2],
    /// How far the eyes are open; 1 is the usual.
    pub eye_open: f32,
    /// How far the brows are raised, in face units.
    pub brow_raise: f32,
    /// Smile; negative is a frown.
    pub smile: f32,
    /// How far the mouth is open, in face units.
    pub mouth_open: f32,
    /// The two ends of the background's gradient, display colours.
    pub background: [[f32; 3]; 2],
    /// Direction of the gradient.
    pub background_direction: [f32; 2],
    /// Strength of the background's texture.
    pub texture: f32,
    /// Colour of the clothes.
    pub clothes: [f32; 3],
    /// Radius of the blur as a share of the picture's side.
    pub blur: f32,
    /// Standard deviation of the sensor's noise, of a range of 1.
    pub noise: f32,
    /// Seed of texture and noise.
    pub seed: u32,
}

/// A bell-shaped number with mean 0 and deviation 1, never beyond ±3.5: the sum of four uniform ones.
fn normal(rng: &mut impl Rng) -> f32 {
    (unit(rng) + unit(rng) + unit(rng) + unit(rng) - 2.0) * 1.732
}

fn around(rng: &mut impl Rng, mean: f32, deviation: f32) -> f32 {
    mean + deviation * normal(rng)
}

fn within(rng: &mut impl Rng, low: f32, high: f32) -> f32 {
    low + (high - low) * unit(rng)
}

fn chance(rng: &mut impl Rng, probability: f32) -> bool {
    unit(rng) < probability
}

fn mix(a: Color, b: Color, t: f32) -> Color {
    [
        a[0] + (b[0] - a[0]) * t,
        a[1] + (b[1] - a[1]) * t,
        a[2] + (b[2] - a[2]) * t,
    ]
}

/// A point of a palette: `t` from 0 (first colour) to 1 (last).
fn palette(colors: &[Color], t: f32) -> Color {
    let at = t.clamp(0.0, 1.0) * (colors.len() - 1) as f32;
    let first = (at as usize).min(colors.len() - 2);
    mix(colors[first], colors[first + 1], at - first as f32)
}

fn jittered(rng: &mut impl Rng, color: Color, deviation: f32) -> Color {
    color.map(|channel| (channel * around(rng, 1.0, deviation)).clamp(0.0, 1.0))
}

const SKIN: [Color; 6] = [
    [0.96, 0.82, 0.76],
    [0.92, 0.73, 0.64],
    [0.83, 0.62, 0.50],
    [0.69, 0.48, 0.34],
    [0.50, 0.33, 0.23],
    [0.33, 0.21, 0.15],
];
const DARK_HAIR: [Color; 3] = [[0.06, 0.05, 0.05], [0.13, 0.09, 0.07], [0.24, 0.15, 0.10]];
const FAIR_HAIR: [Color; 6] = [
    [0.12, 0.08, 0.06],
    [0.32, 0.20, 0.12],
    [0.52, 0.35, 0.20],
    [0.62, 0.28, 0.13],
    [0.82, 0.66, 0.40],
    [0.93, 0.82, 0.60],
];
const IRIS: [Color; 5] = [
    [0.22, 0.12, 0.06],
    [0.40, 0.25, 0.11],
    [0.42, 0.44, 0.22],
    [0.38, 0.52, 0.48],
    [0.30, 0.48, 0.70],
];

impl Identity {
    /// Somebody.
    pub fn sample(rng: &mut impl Rng) -> Identity {
        let melanin = unit(rng);
        // Robust faces have heavier jaws and brows, thinner lips, shorter hair and sometimes beards; it is a
        // direction among others, not two kinds.
        let robust = (0.5 + 0.32 * normal(rng)).clamp(0.0, 1.0);
        let age = unit(rng);
        let base_skin = palette(&SKIN, melanin);
        let skin = jittered(rng, base_skin, 0.025);
        let lips = mix(skin, [0.66, 0.24, 0.26], within(rng, 0.35, 0.75));
        let fair = chance(rng, 0.95 - 1.4 * melanin);
        let tone = unit(rng);
        let mut hair = if fair {
            palette(&FAIR_HAIR, tone)
        } else {
            palette(&DARK_HAIR, tone)
        };
        let grey = ((age - 0.62) * 2.6).clamp(0.0, 1.0) * unit(rng);
        hair = mix(jittered(rng, hair, 0.08), [0.72, 0.71, 0.70], grey);
        let iris_tone = if fair { unit(rng) } else { 0.35 * unit(rng) };
        let base_iris = palette(&IRIS, iris_tone);
        let face_width = around(rng, 0.84, 0.055);
        let bald = chance(rng, 0.11 * robust);
        let long = chance(rng, 0.92 - 0.9 * robust);
        let bearded = chance(rng, 0.75 * robust - 0.15);
        let spectacled = chance(rng, 0.14);
        let mut mole = || {
            let radius = if chance(rng, 0.22) {
                within(rng, 0.018, 0.034)
            } else {
                0.0
            };
            [within(rng, -0.6, 0.6), within(rng, 0.12, 1.05), radius]
        };
        let moles = [mole(), mole()];
        Identity {
            skin,
            face_width,
            skull_height: around(rng, 1.06, 0.045),
            chin_length: around(rng, 0.45 + 0.06 * robust, 0.045),
            jaw_angle: (0.12 + 0.40 * robust + 0.10 * normal(rng)).clamp(0.0, 0.7),
            jaw_taper: (0.22 - 0.10 * robust + 0.05 * normal(rng)).clamp(0.02, 0.34),
            eye_spacing: around(rng, 0.44, 0.026),
            eye_width: around(rng, 0.20, 0.016),
            eye_height: around(rng, 0.098, 0.015).max(0.055),
            eye_tilt: around(rng, 0.06, 0.09),
            iris_radius: around(rng, 0.093, 0.006),
            iris: jittered(rng, base_iris, 0.08),
            lid_fold: within(rng, 0.015, 0.075),
            brow_height: around(rng, 0.275, 0.032),
            brow_thickness: (0.030 + 0.026 * robust + 0.010 * normal(rng)).clamp(0.014, 0.075),
            brow_length: around(rng, 0.245, 0.024),
            brow_arch: around(rng, 0.055, 0.028),
            brow_slope: around(rng, 0.03, 0.07),
            nose_length: around(rng, 0.46, 0.042),
            nose_width: around(rng, 0.172, 0.028),
            nose_height: around(rng, 0.085, 0.022).max(0.03),
            mouth_level: around(rng, 0.92, 0.034),
            mouth_width: around(rng, 0.345, 0.036),
            upper_lip: around(rng, 0.066 - 0.012 * robust, 0.015).max(0.022),
            lower_lip: around(rng, 0.092 - 0.012 * robust, 0.018).max(0.035),
            lip_bow: within(rng, 0.0, 0.035),
            lips,
            ear_size: around(rng, 1.0, 0.12),
            hair,
            hair_cover: if bald { 0.0 } else { 1.0 },
            hair_length: if long {
                within(rng, 0.75, 1.9)
            } else {
                within(rng, -0.05, 0.42)
            },
            hair_volume: within(rng, 0.04, 0.26) + if long { 0.06 } else { 0.0 },
            hairline: around(rng, -0.70 - 0.06 * age * robust, 0.085),
            hair_part: around(rng, 0.0, 0.26),
            hair_curl: unit(rng) * unit(rng),
            hair_curtain: if long { within(rng, 0.74, 1.06) } else { 1.2 },
            beard: if bearded { within(rng, 0.25, 0.95) } else { 0.0 },
            beard_reach: unit(rng),
            freckles: if fair && chance(rng, 0.22) {
                within(rng, 0.2, 0.8)
            } else {
                0.0
            },
            moles,
            age,
            glasses: if spectacled {
                within(rng, 0.016, 0.036)
            } else {
                0.0
            },
            glasses_shape: unit(rng),
            glasses_color: if chance(rng, 0.6) {
                [0.08, 0.07, 0.07]
            } else {
                let tone = unit(rng);
                palette(
                    &[
                        [0.45, 0.28, 0.12],
                        [0.55, 0.50, 0.42],
                        [0.42, 0.10, 0.12],
                        [0.12, 0.2, 0.4],
                    ],
                    tone,
                )
            },
            seed: rng.next_u32(),
        }
    }

    /// Somebody between two people: 0 is `self`, 1 is `other`. What is not a quantity comes from the nearer one.
    pub fn blend(&self, other: &Identity, t: f32) -> Identity {
        let near = if t < 0.5 { self } else { other };
        let number = |a: f32, b: f32| a + (b - a) * t;
        Identity {
            skin: mix(self.skin, other.skin, t),
            face_width: number(self.face_width, other.face_width),
            skull_height: number(self.skull_height, other.skull_height),
            chin_length: number(self.chin_length, other.chin_length),
            jaw_angle: number(self.jaw_angle, other.jaw_angle),
            jaw_taper: number(self.jaw_taper, other.jaw_taper),
            eye_spacing: number(self.eye_spacing, other.eye_spacing),
            eye_width: number(self.eye_width, other.eye_width),
            eye_height: number(self.eye_height, other.eye_height),
            eye_tilt: number(self.eye_tilt, other.eye_tilt),
            iris_radius: number(self.iris_radius, other.iris_radius),
            iris: mix(self.iris, other.iris, t),
            lid_fold: number(self.lid_fold, other.lid_fold),
            brow_height: number(self.brow_height, other.brow_height),
            brow_thickness: number(self.brow_thickness, other.brow_thickness),
            brow_length: number(self.brow_length, other.brow_length),
            brow_arch: number(self.brow_arch, other.brow_arch),
            brow_slope: number(self.brow_slope, other.brow_slope),
            nose_length: number(self.nose_length, other.nose_length),
            nose_width: number(self.nose_width, other.nose_width),
            nose_height: number(self.nose_height, other.nose_height),
            mouth_level: number(self.mouth_level, other.mouth_level),
            mouth_width: number(self.mouth_width, other.mouth_width),
            upper_lip: number(self.upper_lip, other.upper_lip),
            lower_lip: number(self.lower_lip, other.lower_lip),
            lip_bow: number(self.lip_bow, other.lip_bow),
            lips: mix(self.lips, other.lips, t),
            ear_size: number(self.ear_size, other.ear_size),
            hair: mix(self.hair, other.hair, t),
            hair_length: number(self.hair_length, other.hair_length),
            hair_volume: number(self.hair_volume, other.hair_volume),
            hairline: number(self.hairline, other.hairline),
            hair_part: number(self.hair_part, other.hair_part),
            hair_curl: number(self.hair_curl, other.hair_curl),
            hair_curtain: number(self.hair_curtain, other.hair_curtain),
            beard: number(self.beard, other.beard),
            beard_reach: number(self.beard_reach, other.beard_reach),
            freckles: number(self.freckles, other.freckles),
            age: number(self.age, other.age),
            ..near.clone()
        }
    }
}

impl Nuisance {
    /// A studio portrait: frontal, even light, plain background, no noise.
    pub fn neutral() -> Nuisance {
        Nuisance {
            shift: [0.0; 2],
            scale: 1.0,
            tilt: 0.0,
            yaw: 0.0,
            pitch: 0.0,
            light: [-0.35, -0.5, 1.0],
            light_strength: 0.5,
            light_color: [1.0; 3],
            exposure: 1.0,
            gaze: [0.0; 2],
            eye_open: 1.0,
            brow_raise: 0.0,
            smile: 0.35,
            mouth_open: 0.0,
            background: [[0.62, 0.67, 0.72], [0.45, 0.50, 0.56]],
            background_direction: [0.0, 1.0],
            texture: 0.0,
            clothes: [0.25, 0.30, 0.40],
            blur: 0.0,
            noise: 0.0,
            seed: 0,
        }
    }

    /// A picture as they come: everything varies.
    pub fn sample(rng: &mut impl Rng) -> Nuisance {
        let direction = std::f32::consts::TAU * unit(rng);
        let warm = normal(rng) * 0.055;
        let green = normal(rng) * 0.018;
        let color = |rng: &mut _| {
            let (grey, saturation) = (within(rng, 0.12, 0.88), 0.65 * unit(rng));
            mix([grey; 3], [unit(rng), unit(rng), unit(rng)], saturation)
        };
        let near_color = color(rng);
        let far_color = mix(near_color, color(rng), 0.7 * unit(rng));
        let speaks = chance(rng, 0.35);
        Nuisance {
            shift: [around(rng, 0.0, 0.022), around(rng, 0.0, 0.022)],
            scale: around(rng, 1.0, 0.055),
            tilt: around(rng, 0.0, 0.085),
            yaw: around(rng, 0.0, 0.20).clamp(-0.5, 0.5),
            pitch: around(rng, 0.0, 0.09),
            light: [
                around(rng, 0.0, 0.75),
                around(rng, -0.35, 0.45),
                within(rng, 0.35, 1.1),
            ],
            light_strength: within(rng, 0.25, 0.95),
            light_color: [1.0 + warm, 1.0 + green, 1.0 - warm],
            exposure: around(rng, 0.98, 0.17).max(0.5),
            gaze: [around(rng, 0.0, 0.28), around(rng, 0.0, 0.14)],
            eye_open: if chance(rng, 0.04) {
                0.06
            } else {
                around(rng, 0.95, 0.16).clamp(0.25, 1.3)
            },
            brow_raise: around(rng, 0.0, 0.022),
            smile: around(rng, 0.45, 0.42).clamp(-0.5, 1.3),
            mouth_open: if speaks { 0.17 * unit(rng) } else { 0.0 },
            background: [near_color, far_color],
            background_direction: [direction.cos(), direction.sin()],
            texture: 0.5 * unit(rng),
            clothes: color(rng),
            blur: 0.012 * unit(rng) * unit(rng),
            noise: 0.026 * unit(rng),
            seed: rng.next_u32(),
        }
    }
}

/// A face as a picture of `size` x `size` pixels, with its landmarks (also where hair or the border covers them).
///
/// # Panics
/// If `size` is 0.
pub fn render(identity: &Identity, nuisance: &Nuisance, size: usize) -> (Image, Landmarks) {
    assert!(size > 0, "a face has at least one pixel");
    let scene = Scene::new(identity, nuisance, size);
    let mut linear = vec![[0f32; 3]; size * size];
    for (y, row) in linear.chunks_exact_mut(size).enumerate() {
        for (x, pixel) in row.iter_mut().enumerate() {
            *pixel = scene.shade(x as f32 + 0.5, y as f32 + 0.5);
        }
    }
    blur(&mut linear, size, nuisance.blur * size as f32);
    let mut pixels = Vec::with_capacity(size * size * 3);
    for (i, color) in linear.iter().enumerate() {
        let grain = nuisance.noise * grain(nuisance.seed, i as u32);
        for channel in color {
            let display = (channel * nuisance.exposure).max(0.0).sqrt();
            // A soft shoulder instead of clipped highlights.
            let display = if display > 0.8 {
                0.8 + (display - 0.8) / (1.0 + 2.0 * (display - 0.8))
            } else {
                display
            };
            pixels.push(((display + grain) * 255.0 + 0.5).clamp(0.0, 255.0) as u8);
        }
    }
    (Image::new(size, size, pixels), scene.landmarks())
}

/// Share of a pixel of width `px` that a shape covers whose edge lies at signed distance `d` (negative: inside).
fn cover(d: f32, px: f32) -> f32 {
    (0.5 - d / px).clamp(0.0, 1.0)
}

/// 1 at the centre, 0 from squared radius 1 on, smooth at both.
fn bump(r2: f32) -> f32 {
    let inside = (1.0 - r2).max(0.0);
    inside * inside
}

fn smooth(from: f32, to: f32, x: f32) -> f32 {
    let t = ((x - from) / (to - from)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

fn square(x: f32) -> f32 {
    x * x
}

fn scaled(color: Color, by: f32) -> Color {
    color.map(|channel| channel * by)
}

fn times(a: Color, b: Color) -> Color {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

/// Display colour to linear light.
fn linear(color: Color) -> Color {
    times(color, color)
}

fn hash(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    x ^ (x >> 16)
}

/// A number in `[0, 1)` of a lattice point.
fn lattice(seed: u32, x: i32, y: i32) -> f32 {
    let h = hash(seed ^ (x as u32).wrapping_mul(0x9E37_79B1) ^ (y as u32).wrapping_mul(0x85EB_CA77));
    (h >> 8) as f32 / (1 << 24) as f32
}

/// Whole and fractional part, also below 0. (`floor` is a call where the processor's baseline has no such instruction.)
fn split(x: f32) -> (i32, f32) {
    let toward_zero = x as i32;
    let whole = toward_zero - i32::from(toward_zero as f32 > x);
    (whole, x - whole as f32)
}

/// Smooth noise in `[-1, 1]` with features of size 1.
fn noise(seed: u32, x: f32, y: f32) -> f32 {
    let ((ix, fx), (iy, fy)) = (split(x), split(y));
    let (fx, fy) = (fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy));
    let top = lattice(seed, ix, iy) * (1.0 - fx) + lattice(seed, ix + 1, iy) * fx;
    let bottom = lattice(seed, ix, iy + 1) * (1.0 - fx) + lattice(seed, ix + 1, iy + 1) * fx;
    (top * (1.0 - fy) + bottom * fy) * 2.0 - 1.0
}

/// Sensor noise of a pixel, deviation 1: the sum of the four bytes of a hash.
fn grain(seed: u32, i: u32) -> f32 {
    let bytes = hash(seed ^ i.wrapping_mul(0x9E37_79B1)).to_le_bytes();
    let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
    (sum as f32 - 510.0) / 147.8
}

/// Blurs by a triangle of about `radius` pixels along both axes.
fn blur(pixels: &mut [Color], size: usize, radius: f32) {
    if radius < 0.15 {
        return;
    }
    // Three taps are enough below a radius of one; larger ones repeat.
    let repeats = (radius * radius * 1.5).ceil().clamp(1.0, 12.0);
    let side = (0.5 * radius * radius / repeats).min(0.3);
    let mut line = vec![[0f32; 3]; size];
    for _ in 0..repeats as usize {
        for (start, stride) in (0..size)
            .map(|y| (y * size, 1))
            .chain((0..size).map(|x| (x, size)))
        {
            for (i, value) in line.iter_mut().enumerate() {
                *value = pixels[start + i * stride];
            }
            for i in 0..size {
                let (before, after) = (line[i.saturating_sub(1)], line[(i + 1).min(size - 1)]);
                let pixel = &mut pixels[start + i * stride];
                for c in 0..3 {
                    pixel[c] = line[i][c] * (1.0 - 2.0 * side) + (before[c] + after[c]) * side;
                }
            }
        }
    }
}

/// A point of the head: what outline, depth and normal say there.
struct Surface {
    /// Signed distance to the face's outline.
    outline: f32,
    /// Position on the unturned face.
    u: f32,
    v: f32,
    /// Towards the viewer.
    normal: [f32; 3],
}

/// An identity and a nuisance, with everything computed that all pixels share.
struct Scene<'a> {
    who: &'a Identity,
    how: &'a Nuisance,
    size: f32,
    /// Width of a pixel in face units.
    px: f32,
    cos: f32,
    sin: f32,
    /// The point between the eyes in pixels.
    origin: [f32; 2],
    chin: f32,
    light: [f32; 3],
    half_vector: [f32; 3],
    ambient: Color,
    key: Color,
    skin: Color,
    hair: Color,
    lips: Color,
    iris: Color,
    background: [Color; 2],
    clothes: Color,
    nose_shift: f32,
    mouth_width: f32,
    corner_level: f32,
}

impl<'a> Scene<'a> {
    fn new(who: &'a Identity, how: &'a Nuisance, size: usize) -> Scene<'a> {
        let size = size as f32;
        let length = how.light.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
        let light = how.light.map(|x| x / length);
        let half = [light[0], light[1], light[2] + 1.0];
        let half_length = half.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
        let color = linear(how.light_color);
        // The colour tints what the light adds; both shares together keep a frontal face equally bright.
        let (key, ambient) = (1.25 * how.light_strength, 1.0 - 0.62 * how.light_strength);
        let smile = how.smile;
        Scene {
            who,
            how,
            size,
            px: 1.0 / (size * UNIT * how.scale),
            cos: how.tilt.cos(),
            sin: how.tilt.sin(),
            origin: [
                (ORIGIN[0] + how.shift[0]) * size,
                (ORIGIN[1] + how.shift[1]) * size,
            ],
            chin: who.mouth_level + who.chin_length + 0.55 * how.mouth_open,
            light,
            half_vector: half.map(|x| x / half_length),
            ambient: scaled(color, ambient),
            key: scaled(color, key),
            skin: linear(who.skin),
            hair: linear(who.hair),
            lips: linear(who.lips),
            iris: linear(who.iris),
            background: how.background.map(linear),
            clothes: linear(how.clothes),
            nose_shift: 0.26 * how.yaw,
            mouth_width: who.mouth_width * (1.0 + 0.16 * smile - 0.8 * how.mouth_open),
            corner_level: who.mouth_level - 0.095 * smile + 0.3 * how.mouth_open,
        }
    }

    /// Pixels to face units on the picture's plane.
    fn to_face(&self, x: f32, y: f32) -> (f32, f32) {
        let (dx, dy) = ((x - self.origin[0]) * self.px, (y - self.origin[1]) * self.px);
        (dx * self.cos + dy * self.sin, dy * self.cos - dx * self.sin)
    }

    fn to_pixels(&self, u: f32, v: f32) -> [f32; 2] {
        let (x, y) = (u * self.cos - v * self.sin, u * self.sin + v * self.cos);
        [self.origin[0] + x / self.px, self.origin[1] + y / self.px]
    }

    /// Position relative to the outline: 1 on it, along both axes, and the axes' lengths.
    fn relative(&self, u: f32, v: f32) -> (f32, f32, f32, f32) {
        if v < CHEEK {
            let height = CHEEK + self.who.skull_height;
            (
                u / self.who.face_width,
                (v - CHEEK) / height,
                self.who.face_width,
                height,
            )
        } else {
            let height = self.chin - CHEEK;
            let y = (v - CHEEK) / height;
            let width = self.who.face_width * (1.0 - self.who.jaw_taper * (y * y).min(1.4));
            (u / width, y, width, height)
        }
    }

    /// How far the face stands out towards the viewer.
    fn depth(&self, u: f32, v: f32) -> f32 {
        let (x, y, _, _) = self.relative(u, v);
        let q = (1.0 - 0.8 * (x * x + y * y)).max(0.0);
        0.75 * q * (2.0 - q)
    }

    fn surface(&self, u: f32, v: f32) -> Surface {
        let (x, y, width, height) = self.relative(u, v);
        let k = if v < CHEEK { 0.26 } else { self.who.jaw_angle };
        let (x2, y2) = (x * x, y * y);
        let value = (1.0 - k) * (x2 + y2) + k * (x2 * x2 + y2 * y2);
        let gradient_x = (2.0 * (1.0 - k) + 4.0 * k * x2) * x / width;
        let gradient_y = (2.0 * (1.0 - k) + 4.0 * k * y2) * y / height;
        let gradient = (gradient_x * gradient_x + gradient_y * gradient_y)
            .sqrt()
            .max(0.4);
        let depth = self.depth(u, v);
        let (nx, ny) = (0.92 * x, 0.62 * y);
        let flat = (nx * nx + ny * ny).min(0.96);
        Surface {
            outline: (value - 1.0) / gradient,
            u: u - self.how.yaw * depth,
            v: v - self.how.pitch * depth,
            normal: [nx, ny, (1.0 - flat).sqrt()],
        }
    }

    /// Where a point of the unturned face stands on the picture's plane: the inverse of [`Scene::surface`], a fixed
    /// point, since turning is slight.
    fn turned(&self, u: f32, v: f32) -> (f32, f32) {
        let (mut pu, mut pv) = (u, v);
        for _ in 0..60 {
            let depth = self.depth(pu, pv);
            (pu, pv) = (u + self.how.yaw * depth, v + self.how.pitch * depth);
        }
        (pu, pv)
    }

    fn landmarks(&self) -> Landmarks {
        let eye = self.who.eye_spacing;
        [
            (-eye, 0.0),
            (eye, 0.0),
            (self.nose_shift, self.who.nose_length),
            (-self.mouth_width, self.corner_level),
            (self.mouth_width, self.corner_level),
        ]
        .map(|(u, v)| {
            let (u, v) = self.turned(u, v);
            self.to_pixels(u, v)
        })
    }

    /// Light on a matt surface.
    fn lit(&self, color: Color, normal: [f32; 3]) -> Color {
        let [nx, ny, nz] = normal;
        let length = (nx * nx + ny * ny + nz * nz).sqrt().max(1e-6);
        let facing = (nx * self.light[0] + ny * self.light[1] + nz * self.light[2]) / length;
        // Wrapped: skin scatters light beyond the terminator.
        let key = ((facing + 0.25) / 1.25).max(0.0);
        let received = [0, 1, 2].map(|c| self.ambient[c] + self.key[c] * key);
        times(color, received)
    }

    /// The colour of a pixel in linear light.
    fn shade(&self, x: f32, y: f32) -> Color {
        let (u, v) = self.to_face(x, y);
        let surface = self.surface(u, v);
        let hair_outline = self.hair_outline(u, v);
        let (fringe, fringe_distance) = self.fringe(&surface, hair_outline);
        let face = cover(surface.outline, self.px);
        // Only what is seen is computed: most pixels belong to one layer.
        let mut color = [0.0; 3];
        if fringe < 1.0 {
            if face < 1.0 {
                color = self.background(x / self.size, y / self.size);
                self.hair_behind(&mut color, u, v, hair_outline);
                self.body(&mut color, u, v);
                self.ears(&mut color, u, v);
            }
            if face > 0.0 {
                // The fringe shades the forehead.
                let shade = 1.0 - 0.22 * bump(square(fringe_distance.max(0.0) / 0.10));
                color = mix(color, scaled(self.face(&surface), shade), face);
            }
        }
        if fringe > 0.0 {
            color = mix(color, self.hair_color(u, v), fringe);
        }
        self.glasses(&mut color, &surface);
        color
    }

    fn background(&self, x: f32, y: f32) -> Color {
        let how = self.how;
        let along = 0.5 + (x - 0.5) * how.background_direction[0] + (y - 0.5) * how.background_direction[1];
        let mut color = mix(self.background[0], self.background[1], along.clamp(0.0, 1.0));
        if how.texture > 0.0 {
            let large = noise(how.seed, 3.1 * x, 3.1 * y);
            let small = noise(how.seed ^ 0x5EED, 11.0 * x, 11.0 * y);
            let edge = (large * 4.0).clamp(-1.0, 1.0);
            color = scaled(color, 1.0 + how.texture * (0.7 * edge + 0.5 * small));
        }
        color
    }

    /// Signed distance to the outline of the hair (or, for the bald, of nothing).
    fn hair_outline(&self, u: f32, v: f32) -> f32 {
        let who = self.who;
        if who.hair_cover <= 0.0 {
            return 9.0;
        }
        let volume = who.hair_volume;
        let width = who.face_width + 0.06 + 0.55 * volume;
        let center = -0.12;
        let d = if v < center {
            let height = who.skull_height + 0.05 + volume + center;
            let r = (square(u / width) + square((v - center) / height)).sqrt();
            (r - 1.0) * width.min(height)
        } else {
            // Long hair falls, short hair follows the skull behind the ears.
            let below = v - center;
            let short = smooth(0.7, 0.4, who.hair_length);
            let falling = width * (1.0 + 0.10 * below - 0.10 * below * below);
            let side = u.abs() - (falling + (width - 1.1 * below - falling) * short);
            let end = (v - who.hair_length) * 0.8;
            // The larger of both, with the corner rounded.
            const ROUND: f32 = 0.2;
            let (a, b) = ((side + ROUND).max(0.0), (end + ROUND).max(0.0));
            (a * a + b * b).sqrt() + (side.max(end) + ROUND).min(0.0) - ROUND
        };
        // Waves reach this far; elsewhere they change nothing.
        if d.abs() > 0.15 {
            d
        } else {
            d + 0.13 * who.hair_curl * noise(who.seed, 5.0 * u + 20.0, 5.0 * v)
        }
    }

    fn hair_color(&self, u: f32, v: f32) -> Color {
        let who = self.who;
        let width = who.face_width + 0.06 + 0.55 * who.hair_volume;
        // Strands run down and spread with the head.
        let strand = u / (1.0 + 0.25 * v.clamp(-1.2, 2.0));
        let wiggle = 0.6 * who.hair_curl * noise(who.seed ^ 7, 4.0 * u, 4.0 * v);
        let texture = noise(who.seed ^ 1, 13.0 * strand + 2.0 * wiggle, 1.6 * v);
        let sheen = bump(square((v + 0.78 + 0.15 * texture - 0.35 * u * u) / 0.3));
        let dark = scaled(self.hair, 1.0 + 0.42 * texture);
        let (nx, ny) = (
            0.85 * u / width,
            if v < 0.0 {
                0.7 * v / (who.skull_height + 0.1)
            } else {
                0.0
            },
        );
        let normal = [nx, ny, (1.0 - (nx * nx + ny * ny).min(0.95)).sqrt()];
        let glossy = mix(dark, [0.30, 0.28, 0.26], 0.16 * sheen * self.how.light_strength);
        self.lit(glossy, normal)
    }

    fn hair_behind(&self, color: &mut Color, u: f32, v: f32, outline: f32) {
        let share = cover(outline, self.px);
        if share > 0.0 {
            *color = mix(*color, scaled(self.hair_color(u, v), 0.72), share);
        }
    }

    fn body(&self, color: &mut Color, u: f32, v: f32) {
        let top = self.chin - 0.45;
        if v < top {
            return;
        }
        let neck = 0.47 * self.who.face_width + 0.10 + 0.06 * square((v - self.chin).max(0.0));
        let share = cover(u.abs() - neck, self.px);
        if share > 0.0 {
            let nx = 0.8 * u / neck;
            let skin = self.lit(self.skin, [nx, 0.1, (1.0 - nx * nx).max(0.05).sqrt()]);
            // The chin's shadow.
            let shadow = 1.0 - 0.5 * (1.0 - smooth(0.0, 0.4, v - self.chin + 0.12 * u * u));
            *color = mix(*color, scaled(skin, shadow), share);
        }
        let shoulder = self.chin + 0.14 + 0.10 * u.abs() + 0.24 * square((u.abs() - 0.5).max(0.0));
        let collar = (1.0 - (u / 0.62) * (u / 0.62)).max(0.0) * 0.22;
        let cloth = cover(shoulder + collar - v, self.px);
        if cloth > 0.0 {
            let nx = (0.45 * u).clamp(-0.9, 0.9);
            *color = mix(*color, self.lit(self.clothes, [nx, -0.2, 1.0]), cloth);
        }
    }

    fn ears(&self, color: &mut Color, u: f32, v: f32) {
        let who = self.who;
        if who.hair_cover > 0.0 && who.hair_length > 0.6 {
            return;
        }
        for side in [-1.0, 1.0] {
            // The ear on the side that turns away hides behind the head.
            let center = side * (who.face_width * 0.985 + 0.02 - 0.22 * (side * self.how.yaw).max(0.0))
                - 0.06 * self.how.yaw;
            let (du, dv) = (
                (u - center) / (0.125 * who.ear_size),
                (v - 0.15) / (0.235 * who.ear_size),
            );
            let r2 = du * du + dv * dv;
            if r2 < 1.6 {
                let share = cover((r2.sqrt() - 1.0) * 0.14 * who.ear_size, self.px);
                let hollow = 1.0 - 0.38 * bump(square((du - 0.1 * side) / 0.7) + square(dv / 0.75));
                let skin = mix(self.skin, [0.55, 0.16, 0.12], 0.08);
                let ear = scaled(self.lit(skin, [0.75 * side, 0.0, 0.66]), 0.95 * hollow);
                *color = mix(*color, ear, share);
            }
        }
    }

    /// Skin and features, on the unturned face.
    fn face(&self, surface: &Surface) -> Color {
        let (who, how) = (self.who, self.how);
        let (u, v) = (surface.u, surface.v);
        let mut normal = surface.normal;

        // The nose as a ridge: its slope turns the normal, so that the light models it.
        let du = u - self.nose_shift * smooth(-0.1, who.nose_length, v);
        let along =
            smooth(-0.10, 0.25, v) * (1.0 - smooth(who.nose_length - 0.02, who.nose_length + 0.13, v));
        let ridge_width = 0.115 + (0.95 * who.nose_width - 0.05) * smooth(0.0, who.nose_length, v).powi(2);
        let t = du / ridge_width;
        if along > 0.0 && t.abs() < 1.0 {
            let rise = who.nose_height * (0.45 + 0.55 * smooth(0.0, who.nose_length, v));
            normal[0] += 4.0 * rise * t * (1.0 - t * t) / ridge_width * along * 1.25;
        }
        // Its tip as a ball, the lower side in shadow.
        let (tu, tv) = (du / (0.75 * who.nose_width), (v - who.nose_length + 0.02) / 0.15);
        normal[1] += 0.9 * tv * bump(tu * tu + tv * tv) * (who.nose_height / 0.085);
        // Cheekbones and chin.
        for side in [-1.0, 1.0] {
            let (cu, cv) = ((u - side * 0.50) / 0.30, (v - 0.44) / 0.30);
            let cheek = bump(cu * cu + cv * cv) * (0.28 + 0.25 * how.smile.max(0.0));
            normal[0] += cheek * cu;
            normal[1] += cheek * cv;
        }
        let (cu, cv) = (u / 0.24, (v - self.chin + 0.20) / 0.17);
        let chin = 0.45 * bump(cu * cu + cv * cv);
        normal[0] += chin * cu;
        normal[1] += chin * cv;

        // Skin: redder at cheeks, nose and ears, with the eye sockets in shade.
        let mut skin = self.skin;
        let blush = bump(square((u.abs() - 0.48) / 0.34) + square((v - 0.46) / 0.30))
            + 0.8 * bump(square(du / 0.2) + square((v - who.nose_length) / 0.2));
        skin = mix(skin, times(skin, [1.02, 0.72, 0.68]), 0.42 * blush.min(1.0));
        if who.freckles > 0.0 {
            skin = scaled(skin, 1.0 - self.freckle(u, v));
        }
        for [mu, mv, radius] in who.moles {
            if radius > 0.0 {
                let d = (square(u - mu) + square(v - mv)).sqrt() - radius;
                skin = mix(skin, scaled(self.skin, 0.22), 0.85 * cover(d, self.px.max(0.02)));
            }
        }
        if who.hair_cover > 0.0 || who.beard > 0.0 {
            skin = self.beard(skin, u, v);
        }
        let mut color = self.lit(skin, normal);

        let length = (normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]).sqrt();
        let h = self.half_vector;
        let gloss = ((normal[0] * h[0] + normal[1] * h[1] + normal[2] * h[2]) / length).max(0.0);
        let gloss = gloss * gloss;
        let gloss = gloss * gloss;
        let gloss = gloss * gloss;
        let shine = 0.10 * gloss * gloss * how.light_strength * (1.0 - who.beard * smooth(0.5, 0.8, v));
        color = [0, 1, 2].map(|c| color[c] + shine * self.key[c]);

        let socket = bump(square((u.abs() - who.eye_spacing + 0.04) / 0.36) + square((v + 0.05) / 0.25));
        color = scaled(color, 1.0 - 0.26 * socket);
        let forehead_edge = smooth(-0.06, 0.02, surface.outline);
        color = scaled(color, 1.0 - 0.18 * forehead_edge);

        self.folds(&mut color, u, v);
        self.nose(&mut color, du, v);
        self.mouth(&mut color, u, v);
        self.eyes(&mut color, u, v);
        self.brows(&mut color, u, v);
        color
    }

    fn freckle(&self, u: f32, v: f32) -> f32 {
        let region = bump(square(u / 0.8) + square((v - 0.36) / 0.45));
        if region <= 0.0 {
            return 0.0;
        }
        const CELL: f32 = 0.072;
        let seed = self.who.seed ^ 0xF7EC;
        let ((ix, _), (iy, _)) = (split(u / CELL), split(v / CELL));
        if lattice(seed, ix, iy) > 0.75 * self.who.freckles {
            return 0.0;
        }
        let center_u = (ix as f32 + 0.25 + 0.5 * lattice(seed ^ 1, ix, iy)) * CELL;
        let center_v = (iy as f32 + 0.25 + 0.5 * lattice(seed ^ 2, ix, iy)) * CELL;
        let d = (square(u - center_u) + square(v - center_v)).sqrt() - 0.014;
        0.32 * region.sqrt() * cover(d, self.px.max(0.018))
    }

    fn beard(&self, skin: Color, u: f32, v: f32) -> Color {
        let who = self.who;
        if who.beard <= 0.0 || v < who.nose_length {
            return skin;
        }
        let side = (u / who.face_width).abs();
        let sides = 0.98 - 0.62 * smooth(0.35, 0.95, side);
        let jaw = smooth(0.0, 0.12, v - (who.mouth_level * sides + 0.16 * (1.0 - side)));
        let reach = 1.0 - smooth(0.30 + 0.75 * who.beard_reach, 0.42 + 0.75 * who.beard_reach, side);
        let moustache = bump(square(u / (who.mouth_width + 0.10)) * 0.8)
            * smooth(who.nose_length + 0.10, who.nose_length + 0.18, v)
            * (1.0 - smooth(who.mouth_level, who.mouth_level + 0.06, v));
        let around_mouth =
            bump(square(u / (who.mouth_width + 0.16)) * 0.55 + square((v - who.mouth_level - 0.16) / 0.46));
        let density = (jaw * reach)
            .max(1.4 * moustache)
            .max(1.3 * jaw * around_mouth)
            .min(1.0);
        if density <= 0.0 {
            return skin;
        }
        let texture = 1.0 + 0.22 * noise(who.seed ^ 3, 42.0 * u, 26.0 * v);
        mix(
            skin,
            scaled(self.hair, 1.15),
            (who.beard * density * texture).clamp(0.0, 0.95),
        )
    }

    /// The folds from nose to mouth and under the eyes.
    fn folds(&self, color: &mut Color, u: f32, v: f32) {
        let (who, how) = (self.who, self.how);
        let strength = 0.05 + 0.30 * who.age * who.age + 0.16 * how.smile.max(0.0);
        let (u0, v0) = (who.nose_width + 0.045, who.nose_length + 0.01);
        let (u1, v1) = (self.mouth_width + 0.075, self.corner_level - 0.02);
        let t = (v - v0) / (v1 - v0);
        if (-0.1..1.15).contains(&t) {
            let bow = u0 + (u1 - u0) * t + 0.05 * (1.0 - square(2.0 * t - 1.0)).max(0.0);
            let near =
                bump(square((u.abs() - bow) / 0.055)) * (1.0 - square(2.0 * t - 1.0)).clamp(0.0, 1.0).sqrt();
            *color = scaled(*color, 1.0 - strength * near);
        }
        let (eu, ev) = (
            (u.abs() - who.eye_spacing + 0.02) / 0.23,
            (v - 0.155 - 0.1 * square(u.abs() - who.eye_spacing)) / 0.05,
        );
        *color = scaled(*color, 1.0 - (0.06 + 0.22 * who.age) * bump(eu * eu + ev * ev));
    }

    fn nose(&self, color: &mut Color, du: f32, v: f32) {
        let who = self.who;
        let dv = v - who.nose_length;
        if dv.abs() > 0.26 || du.abs() > 0.4 {
            return;
        }
        let width = who.nose_width;
        let under = bump(square(du / (1.15 * width)) + square((dv - 0.11) / 0.085));
        *color = scaled(*color, 1.0 - 0.30 * under);
        let (au, av) = ((du.abs() - 0.72 * width) / (0.34 * width), (dv - 0.015) / 0.085);
        let wing = (au * au + av * av).sqrt();
        // Only the outer and lower rim of the wing is a crease.
        let crease = bump(square((wing - 1.0) / 0.42)) * smooth(-0.2, 0.5, au + 0.5 * av);
        *color = scaled(*color, 1.0 - 0.34 * crease);
        let nostril = square((du.abs() - 0.46 * width) / (0.30 * width)) + square((dv - 0.058) / 0.030);
        let d = (nostril.sqrt() - 1.0) * 0.03;
        *color = mix(
            *color,
            scaled(times(self.skin, self.ambient), 0.10),
            0.75 * cover(d, self.px.max(0.025)),
        );
    }

    fn mouth(&self, color: &mut Color, u: f32, v: f32) {
        let (who, how) = (self.who, self.how);
        let x = u / self.mouth_width;
        let dv = v - who.mouth_level;
        if x.abs() > 1.25 || !(-0.25..0.42).contains(&dv) {
            return;
        }
        let bend = 1.0 - x * x;
        // The line between the lips runs through both corners; the middle stays, the corners rise with the smile.
        let line = (self.corner_level - who.mouth_level) * (x * x).min(1.3);
        let gap = how.mouth_open * bend.max(0.0).sqrt();
        let upper_edge = line - 0.28 * gap;
        let lower_edge = line + 0.72 * gap;
        let bow = who.lip_bow * (1.0 - bump(square(x / 0.32)) * 0.9);
        let upper = who.upper_lip * bend * (1.0 + 0.25 * bend) + bow * bend - 0.008;
        let lower = who.lower_lip * bend * (1.2 - 0.2 * bend);
        let soft = self.px.max(0.012);

        // Shadow under the lower lip and a light edge above the upper one.
        let under = bump(
            square(u / (0.75 * self.mouth_width))
                + square((v - who.mouth_level - lower_edge - lower - 0.045) / 0.055),
        );
        *color = scaled(*color, 1.0 - 0.24 * under);

        let in_upper = cover((upper_edge - upper) - dv, soft) * cover(dv - upper_edge, soft);
        let in_lower = cover(lower_edge - dv, soft) * cover(dv - (lower_edge + lower), soft);
        let upper_lip = self.lit(scaled(self.lips, 0.82), [0.3 * x, 0.75, 0.75]);
        let height = ((dv - lower_edge) / lower.max(0.01)).clamp(0.0, 1.0);
        let mut lower_lip = self.lit(self.lips, [0.3 * x, 1.1 * (height - 0.42), 0.9]);
        let gloss = 0.10 * how.light_strength * bump(square(x / 0.45) + square((height - 0.42) / 0.3));
        lower_lip = [0, 1, 2].map(|c| lower_lip[c] + gloss * self.key[c]);

        if gap > 0.004 {
            let inside = cover(upper_edge - dv, soft) * cover(dv - lower_edge, soft);
            let depth = (dv - upper_edge) / gap.max(0.01);
            let teeth = cover(depth - 0.42, (soft / gap).max(0.1)) * smooth(1.0, 0.75, x.abs());
            let dark = [0.055, 0.012, 0.014];
            let ivory = self.lit([0.78, 0.74, 0.66], [0.4 * x, 0.2, 0.9]);
            *color = mix(
                *color,
                mix(dark, scaled(ivory, 0.85), teeth * smooth(0.02, 0.06, gap)),
                inside,
            );
        }
        *color = mix(*color, upper_lip, 0.92 * in_upper);
        *color = mix(*color, lower_lip, 0.92 * in_lower);
        if x.abs() < 1.12 {
            // Where the lips meet it is dark, most so in the corners.
            let d = if gap > 0.004 {
                (dv - upper_edge).abs().min((dv - lower_edge).abs())
            } else {
                (dv - line).abs()
            };
            let ends = cover((x.abs() - 1.0) * self.mouth_width - 0.015, soft);
            let stroke = cover(d - 0.010, self.px.max(0.014)) * ends;
            *color = scaled(*color, 1.0 - (0.55 + 0.2 * x * x).min(0.8) * stroke);
        }
    }

    fn eyes(&self, color: &mut Color, u: f32, v: f32) {
        let (who, how) = (self.who, self.how);
        if v.abs() > 0.34 {
            return;
        }
        let side = if u < 0.0 { -1.0 } else { 1.0 };
        let du = u - side * who.eye_spacing;
        if du.abs() > 1.4 * who.eye_width {
            return;
        }
        // Positive x points outwards on both sides.
        let x = side * du / who.eye_width;
        let dv = v + who.eye_tilt * x * who.eye_width;
        let arc = 1.0 - x * x;
        let open = how.eye_open;
        let top = -who.eye_height * open * arc * (1.0 - 0.16 * x);
        let bottom = who.eye_height * (0.22 + 0.38 * open.min(1.1)) * arc * (1.0 + 0.12 * x);
        let slope = 2.0 * x * who.eye_height * open / who.eye_width;
        let steep = 1.0 / (1.0 + slope * slope).sqrt();
        let edge = (top - dv).max(dv - bottom) * steep;
        let soft = self.px.max(0.010);

        // Lid fold and the lid itself.
        let fold = top - who.lid_fold * (0.4 + 0.6 * arc.max(0.0)) - 0.012;
        if x.abs() < 1.25 {
            let lid = cover(fold - dv, soft) * cover(dv - top, soft);
            *color = scaled(*color, 1.0 - 0.10 * lid);
            let ends = 1.0 - smooth(0.8, 1.25, x.abs());
            let crease = cover((dv - fold).abs() * steep - 0.008, self.px.max(0.016));
            *color = scaled(*color, 1.0 - 0.42 * crease * ends);
            let lower = cover((dv - bottom - 0.006).abs() * steep - 0.006, self.px.max(0.014));
            *color = scaled(*color, 1.0 - 0.34 * lower * (1.0 - smooth(0.85, 1.1, x.abs())));
        }

        let inside = cover(edge, soft);
        if inside > 0.0 {
            let round = 0.9 * du / (1.2 * who.eye_width);
            let mut eye = self.lit([0.80, 0.77, 0.74], [round, 0.3 * dv / who.eye_height, 0.9]);
            let corner = bump(square((x + 1.0) / 0.28));
            eye = mix(eye, self.lit([0.62, 0.28, 0.24], [0.0, 0.0, 1.0]), 0.5 * corner);
            let (gu, gv) = (
                how.gaze[0] * 0.35 * who.eye_width,
                how.gaze[1] * 0.5 * who.eye_height - 0.012,
            );
            let r = (square(du - gu) + square(dv - gv)).sqrt() / who.iris_radius;
            if r < 1.3 {
                let ring = 1.0 - 0.55 * smooth(0.72, 1.0, r);
                let streaks = 1.0 + 0.5 * smooth(0.9, 0.45, r);
                let tint = scaled(self.lit(self.iris, [0.0, 0.0, 1.0]), ring * streaks);
                eye = mix(eye, tint, cover((r - 1.0) * who.iris_radius, soft));
                eye = mix(
                    eye,
                    [0.004, 0.004, 0.005],
                    cover((r - 0.42) * who.iris_radius, soft),
                );
            }
            // The upper lid's shadow.
            eye = scaled(eye, 0.52 + 0.48 * smooth(0.0, 0.07, dv - top));
            let (hu, hv) = (
                gu + 0.38 * who.iris_radius * self.light[0].clamp(-0.8, 0.8),
                gv - 0.36 * who.iris_radius,
            );
            let spark = (square(du - hu) + square(dv - hv)).sqrt() - 0.21 * who.iris_radius;
            eye = mix(
                eye,
                scaled([0.95; 3], 0.55 + 0.45 * how.light_strength),
                0.9 * cover(spark, soft),
            );
            *color = mix(*color, eye, inside);
        }
        if x.abs() < 1.15 {
            let lash = cover(
                (dv - top).abs() * steep - 0.016 * (1.25 - 0.5 * x.abs()) - 0.006 * x,
                self.px.max(0.012),
            );
            let ends = 1.0 - smooth(0.98, 1.12, x.abs());
            *color = mix(*color, scaled(self.hair, 0.12), 0.88 * lash * ends);
        }
    }

    fn brows(&self, color: &mut Color, u: f32, v: f32) {
        let (who, how) = (self.who, self.how);
        let dv = v + who.brow_height + how.brow_raise;
        if dv.abs() > 0.26 {
            return;
        }
        let side = if u < 0.0 { -1.0 } else { 1.0 };
        let x = (side * u - who.eye_spacing - 0.015) / who.brow_length;
        if x.abs() > 1.2 {
            return;
        }
        let middle = -who.brow_arch * (1.0 - square(x - 0.25)) - who.brow_slope * x * who.brow_length * 2.0;
        let thickness =
            who.brow_thickness * (1.0 - 0.5 * smooth(-0.2, 1.0, x)) * (1.15 - x.powi(6)).max(0.0).sqrt();
        let hairs = noise(who.seed ^ 5, 26.0 * u - 14.0 * side * v, 9.0 * v);
        let d = (dv - middle).abs() - thickness - 0.008 * hairs;
        let share = cover(d, self.px.max(0.026)) * (0.72 + 0.2 * hairs) * (1.0 - smooth(0.85, 1.1, x.abs()));
        if share > 0.0 {
            let tint = self.lit(mix(self.hair, scaled(self.skin, 0.2), 0.3), [0.0, 0.0, 1.0]);
            *color = mix(*color, scaled(tint, 0.75), share.clamp(0.0, 0.95));
        }
    }

    /// The share of hair in front of the face, and the distance to its lower edge.
    fn fringe(&self, surface: &Surface, outline: f32) -> (f32, f32) {
        const NONE: (f32, f32) = (0.0, 1.0);
        let who = self.who;
        let (tu, tv) = (surface.u, surface.v);
        let sideburn = 0.16 + 0.1 * who.beard;
        let curtained = who.hair_curtain < 1.15;
        if who.hair_cover <= 0.0 || outline > self.px || (tv > sideburn + 0.2 && !curtained) {
            return NONE;
        }
        let side = (tu / who.face_width).abs().min(1.3);
        let ragged = noise(who.seed ^ 11, 9.0 * tu, 0.5) * (0.035 + 0.07 * who.hair_curl);
        let temples = side * side * side * side;
        let part = who.hair_part * tu * (1.0 - 0.5 * temples);
        let line = who.hairline + part + 0.10 * side * side + 0.52 * temples + ragged;
        let mut d = (tv - line.min(sideburn)) * 0.85;
        if curtained {
            let curtain = (who.hair_curtain + 0.05 * noise(who.seed ^ 13, 2.0, 4.0 * tv)) * who.face_width;
            d = d.min(curtain - tu.abs());
        }
        (cover(d.max(outline), self.px.max(0.014)), d)
    }

    fn glasses(&self, color: &mut Color, surface: &Surface) {
        let who = self.who;
        if who.glasses <= 0.0 || surface.outline > self.px || !(-0.42..0.42).contains(&surface.v) {
            return;
        }
        // They stand in front of the face, so they turn a little further.
        let (u, v) = (surface.u - 0.10 * self.how.yaw, surface.v - 0.03);
        let (x, y) = ((u.abs() - who.eye_spacing) / 0.315, v / 0.245);
        let k = who.glasses_shape;
        let (x2, y2) = (x * x, y * y);
        let value = (1.0 - k) * (x2 + y2) + k * (x2 * x2 + y2 * y2);
        let d = (value.max(1e-6).sqrt() - 1.0) * 0.25 / (1.0 + 0.6 * k);
        let lens = cover(d, self.px);
        let glare = bump(square((x + 0.45 + 0.5 * y) / 0.35)) * lens;
        *color = mix(*color, self.key, 0.10 * glare * self.how.light_strength);
        let rim = d.abs() - who.glasses;
        let bridge = ((v + 0.05 + 0.04 * bump(square(u / 0.14))).abs() - 0.8 * who.glasses)
            .max(u.abs() - who.eye_spacing + 0.30);
        let temple = ((v + 0.06).abs() - 0.8 * who.glasses).max(who.eye_spacing + 0.29 - u.abs());
        let share = cover(rim.min(bridge).min(temple), self.px.max(0.012));
        if share > 0.0 {
            *color = mix(
                *color,
                self.lit(linear(who.glasses_color), [0.0, -0.3, 1.0]),
                share,
            );
        }
    }
}

/// A data set of rendered faces: nothing is stored, picture `i` is always the same.
///
/// Identities are numbered globally: sets with the same seed and different ranges of identities show different people,
/// so that training and held-out sets are disjoint by construction.
#[derive(Clone, Debug)]
pub struct SyntheticFaces {
    /// Seed of the world that the people live in.
    pub seed: u64,
    /// The number of the first identity.
    pub first_identity: usize,
    /// How many identities there are.
    pub num_identities: usize,
    /// Pictures of each identity.
    pub images_per_identity: usize,
    /// Side of the pictures in pixels.
    pub size: usize,
    /// Whether the identities are given away.
    pub labelled: bool,
}

impl SyntheticFaces {
    /// The identities and pictures of a labelled set, from identity 0 on.
    pub fn new(seed: u64, num_identities: usize, images_per_identity: usize, size: usize) -> SyntheticFaces {
        SyntheticFaces {
            seed,
            first_identity: 0,
            num_identities,
            images_per_identity,
            size,
            labelled: true,
        }
    }

    /// The same with other people: identities from `first` on.
    pub fn starting_at(self, first: usize) -> SyntheticFaces {
        SyntheticFaces {
            first_identity: first,
            ..self
        }
    }

    /// The same without labels.
    pub fn unlabelled(self) -> SyntheticFaces {
        SyntheticFaces {
            labelled: false,
            ..self
        }
    }

    /// The person of picture `index`.
    pub fn identity(&self, index: usize) -> Identity {
        let person = (self.first_identity + index / self.images_per_identity) as u64;
        Identity::sample(&mut stream(self.seed, b"identity", [person, 0]))
    }

    /// The circumstances of picture `index`.
    pub fn nuisance(&self, index: usize) -> Nuisance {
        let (person, picture) = (index / self.images_per_identity, index % self.images_per_identity);
        let clock = [(self.first_identity + person) as u64, picture as u64];
        Nuisance::sample(&mut stream(self.seed, b"nuisance", clock))
    }

    /// Picture `index` with its landmarks.
    pub fn render(&self, index: usize) -> (Image, Landmarks) {
        render(&self.identity(index), &self.nuisance(index), self.size)
    }

    /// The number of the picture with this name (see [`Dataset::name`]), if it is one of this set.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        let stem = name.split_once('/')?.1.strip_suffix(".png")?;
        let (person, picture) = stem.strip_prefix("face_")?.split_once('_')?;
        let person = person.parse::<usize>().ok()?.checked_sub(self.first_identity)?;
        let picture = picture.parse::<usize>().ok()?.checked_sub(1)?;
        let inside = person < self.num_identities && picture < self.images_per_identity;
        let index = inside.then(|| person * self.images_per_identity + picture)?;
        (self.name(index) == name).then_some(index)
    }

    /// Verification pairs in `folds` folds of `per_fold` same and `per_fold` different pairs, none twice, names as
    /// [`Dataset::name`] gives them. Folds share no identity.
    ///
    /// # Errors
    /// [`DataError::Setting`] if a fold's share of identities has too few pairs to choose from.
    pub fn pairs(&self, folds: usize, per_fold: usize, seed: u64) -> Result<Vec<Pair>, DataError> {
        let people = self.num_identities / folds.max(1);
        let pictures = self.images_per_identity;
        let same_pairs = people * (pictures * pictures.saturating_sub(1) / 2);
        let different_pairs = people * people.saturating_sub(1) / 2 * pictures * pictures;
        // Drawing without repeats stays quick as long as there is twice the choice.
        if folds == 0 || per_fold == 0 || same_pairs < per_fold || different_pairs < 2 * per_fold {
            return Err(DataError::Setting {
                setting: "pairs",
                got: format!("{folds} folds of 2 x {per_fold}"),
                expected: format!(
                    "at least one, at most {} of a kind in a fold of {people} identities with {pictures} pictures\n\
                     hint: more identities, or more pictures of each, give more pairs",
                    same_pairs.min(different_pairs / 2)
                ),
            });
        }
        let mut pairs = Vec::with_capacity(2 * folds * per_fold);
        for fold in 0..folds {
            let mut rng = stream(seed, b"pairs   ", [fold as u64, 0]);
            let picture =
                |person: usize, picture: usize| self.name((fold * people + person) * pictures + picture);
            let of_one = pictures * (pictures - 1) / 2;
            for &chosen in permutation(&mut rng, same_pairs).iter().take(per_fold) {
                let (person, mut rest) = (chosen as usize / of_one, chosen as usize % of_one);
                // The rest-th of (0,1), (0,2), … (1,2), …
                let mut first = 0;
                while rest >= pictures - 1 - first {
                    rest -= pictures - 1 - first;
                    first += 1;
                }
                let (left, right) = (picture(person, first), picture(person, first + 1 + rest));
                pairs.push(Pair {
                    left,
                    right,
                    same: true,
                    fold,
                });
            }
            let mut used = HashSet::new();
            while used.len() < per_fold {
                let (a, b) = (below(&mut rng, people), below(&mut rng, people));
                let pair = (
                    a.min(b),
                    a.max(b),
                    below(&mut rng, pictures),
                    below(&mut rng, pictures),
                );
                if a != b && used.insert(pair) {
                    let (left, right) = (picture(pair.0, pair.2), picture(pair.1, pair.3));
                    pairs.push(Pair {
                        left,
                        right,
                        same: false,
                        fold,
                    });
                }
            }
        }
        Ok(pairs)
    }
}

impl Dataset for SyntheticFaces {
    fn len(&self) -> usize {
        self.num_identities * self.images_per_identity
    }

    fn read(&self, index: usize) -> Result<Image, DataError> {
        Ok(self.render(index).0)
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labelled.then(|| (index / self.images_per_identity) as u32)
    }

    fn num_classes(&self) -> usize {
        if self.labelled { self.num_identities } else { 0 }
    }

    fn name(&self, index: usize) -> String {
        let person = self.first_identity + index / self.images_per_identity;
        let picture = index % self.images_per_identity + 1;
        format!("face_{person:06}/face_{person:06}_{picture:04}.png")
    }
}

#[cfg(test)]
mod tests;
