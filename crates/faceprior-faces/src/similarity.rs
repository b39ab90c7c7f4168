//! Where the five points of a face belong in a crop, and the similarity that brings them there.

use crate::FacesError;

/// Left eye, right eye, nose, left and right corner of the mouth (left and right in the image), each (x, y) in pixels.
pub type Landmarks = [[f32; 2]; 5];

/// The template of 96×112 crops (SphereFace, ArcFace and others after them). Squares centre it: 8 pixels more to the
/// right in 112×112.
const TEMPLATE: [[f64; 2]; 5] = [
    [30.2946, 51.6963],
    [65.5318, 51.5014],
    [48.0252, 71.7366],
    [33.5493, 92.3655],
    [62.7299, 92.2041],
];
const TEMPLATE_WIDTH: f64 = 96.0;
const TEMPLATE_HEIGHT: f64 = 112.0;

/// An affine map of the plane: (x, y) ↦ (m00·x + m01·y + m02, m10·x + m11·y + m12).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine(pub [[f64; 3]; 2]);

impl Affine {
    /// The image of a point.
    pub fn apply(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        self.0.map(|row| row[0] * x + row[1] * y + row[2])
    }

    /// The inverse map, as OpenCV computes it; the zero map if there is none.
    pub fn inverse(&self) -> Self {
        let [[a, b, c], [d, e, f]] = self.0;
        let determinant = a * e - b * d;
        let scale = if determinant != 0.0 {
            1.0 / determinant
        } else {
            0.0
        };
        let (m00, m01, m10, m11) = (e * scale, -b * scale, -d * scale, a * scale);
        Self([[m00, m01, -m00 * c - m01 * f], [m10, m11, -m10 * c - m11 * f]])
    }
}

/// Where the five points belong in a crop of `width`×`height` pixels: the largest 96×112 template that fits, centred.
///
/// That is the template itself for 96×112, and for squares the template scaled by size/112 and moved right by
/// 8·size/112.
pub fn template(width: usize, height: usize) -> [[f64; 2]; 5] {
    let (width, height) = (width as f64, height as f64);
    let scale = (width / TEMPLATE_WIDTH).min(height / TEMPLATE_HEIGHT);
    let left = (width / scale - TEMPLATE_WIDTH) / 2.0;
    let top = (height / scale - TEMPLATE_HEIGHT) / 2.0;
    TEMPLATE.map(|[x, y]| [(x + left) * scale, (y + top) * scale])
}

/// The similarity (rotation, uniform scale, translation; no reflection) that brings the points `from` nearest to `to`
/// in the sense of least squares (Umeyama 1991), or `None` if all of `from` are one point.
///
/// In the plane it has a closed form: the points as complex numbers z and w, it is the linear regression w = a·z + b.
pub fn similarity(from: &Landmarks, to: &[[f64; 2]; 5]) -> Option<Affine> {
    let from = from.map(|point| point.map(f64::from));
    let mean =
        |points: &[[f64; 2]; 5], axis: usize| points.iter().map(|point| point[axis]).sum::<f64>() / 5.0;
    let (from_x, from_y, to_x, to_y) = (mean(&from, 0), mean(&from, 1), mean(to, 0), mean(to, 1));
    let (mut along, mut across, mut spread) = (0.0, 0.0, 0.0);
    for (&[x, y], &[u, v]) in from.iter().zip(to) {
        let (x, y, u, v) = (x - from_x, y - from_y, u - to_x, v - to_y);
        along += x * u + y * v;
        across += x * v - y * u;
        spread += x * x + y * y;
    }
    let (a, b) = (along / spread, across / spread);
    let affine = Affine([
        [a, -b, to_x - (a * from_x - b * from_y)],
        [b, a, to_y - (b * from_x + a * from_y)],
    ]);
    // A spread of 0, or points that are not numbers, end here.
    (affine.0.iter().flatten().all(|m| m.is_finite()) && (a, b) != (0.0, 0.0)).then_some(affine)
}

/// The five points of the 68-point annotation of iBUG 300-W: eyes as the means of their corners (36 and 39, 42 and
/// 45), the tip of the nose (30), the corners of the mouth (48, 54).
///
/// # Errors
/// [`FacesError::Setting`] if there are not 68 points.
pub fn five_points(points: &[[f32; 2]]) -> Result<Landmarks, FacesError> {
    let points: &[[f32; 2]; 68] = points.try_into().map_err(|_| FacesError::Setting {
        name: "landmarks",
        got: format!("{} points", points.len()),
        expected: "68 points",
    })?;
    let mean = |a: usize, b: usize| [0, 1].map(|axis| (points[a][axis] + points[b][axis]) / 2.0);
    Ok([mean(36, 39), mean(42, 45), points[30], points[48], points[54]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: [f64; 2], b: [f64; 2], tolerance: f64) -> bool {
        (a[0] - b[0]).abs() < tolerance && (a[1] - b[1]).abs() < tolerance
    }

    #[test]
    fn templates_of_the_known_sizes() {
        assert_eq!(template(96, 112), TEMPLATE);
        for (size, scale) in [(112, 1.0), (256, 256.0 / 112.0)] {
            for (point, base) in template(size, size).into_iter().zip(TEMPLATE) {
                assert!(
                    close(point, [(base[0] + 8.0) * scale, base[1] * scale], 1e-9),
                    "{size}: {point:?}"
                );
            }
        }
    }

    #[test]
    fn recovers_a_similarity_and_inverts_it() {
        let affine = Affine([[1.5, -0.4, 12.0], [0.4, 1.5, -7.0]]);
        let from: Landmarks = TEMPLATE.map(|point| point.map(|x| x as f32));
        let to = from.map(|[x, y]| affine.apply([x.into(), y.into()]));
        let found = similarity(&from, &to).unwrap();
        for (m, expected) in found.0.iter().flatten().zip(affine.0.iter().flatten()) {
            assert!((m - expected).abs() < 1e-9, "{found:?}");
        }
        assert!(close(
            found.inverse().apply(found.apply([3.0, -5.0])),
            [3.0, -5.0],
            1e-9
        ));
    }

    #[test]
    fn is_least_squares_and_never_a_reflection() {
        let from: Landmarks = [
            [10.0, 12.0],
            [40.0, 9.0],
            [26.0, 30.0],
            [14.0, 44.0],
            [37.0, 47.0],
        ];
        // The mirror image cannot be met without a reflection: the best proper map is still the best nearby.
        let to = TEMPLATE.map(|[x, y]| [96.0 - x, y]);
        let best = similarity(&from, &to).unwrap();
        let [[a, minus_b, tx], [b, d, ty]] = best.0;
        assert!(a == d && minus_b == -b);
        let error = |m: Affine| {
            let points = from.iter().zip(&to);
            points
                .map(|(p, q)| {
                    let r = m.apply(p.map(f64::from));
                    (r[0] - q[0]).powi(2) + (r[1] - q[1]).powi(2)
                })
                .sum::<f64>()
        };
        for (da, db, dx, dy) in [
            (0.01, 0.0, 0.0, 0.0),
            (0.0, 0.01, 0.0, 0.0),
            (0.0, 0.0, 0.1, 0.0),
            (0.0, 0.0, 0.0, 0.1),
        ] {
            for sign in [-1.0, 1.0] {
                let (a, b) = (a + sign * da, b + sign * db);
                let near = Affine([[a, -b, tx + sign * dx], [b, a, ty + sign * dy]]);
                assert!(error(near) > error(best));
            }
        }
    }

    #[test]
    fn one_point_has_no_similarity() {
        assert_eq!(similarity(&[[5.0, 5.0]; 5], &TEMPLATE), None);
        assert_eq!(similarity(&[[f32::NAN, 5.0]; 5], &TEMPLATE), None);
    }

    #[test]
    fn sixty_eight_points_become_five() {
        let points: Vec<[f32; 2]> = (0..68).map(|i| [i as f32, 100.0 - i as f32]).collect();
        let five = five_points(&points).unwrap();
        assert_eq!(
            five,
            [
                [37.5, 62.5],
                [43.5, 56.5],
                [30.0, 70.0],
                [48.0, 52.0],
                [54.0, 46.0]
            ]
        );
        assert!(
            five_points(&points[1..])
                .unwrap_err()
                .to_string()
                .contains("67 points")
        );
    }
}
