use super::*;
use crate::pairs;

fn sheet(size: usize) -> Image {
    let faces = SyntheticFaces::new(1, 8, 6, size);
    let mut pictures = Vec::new();
    for person in 0..8 {
        pictures.push(render(&faces.identity(person * 6), &Nuisance::neutral(), size).0);
        pictures.extend((0..6).map(|i| faces.read(person * 6 + i).unwrap()));
    }
    Image::grid(&pictures, 7)
}

#[test]
fn a_sheet_of_faces_is_written() {
    // Kept where FACEPRIOR_SHEET says (in FACEPRIOR_SHEET_SIZE pixels a face), to be looked at.
    let folder = tempfile::tempdir().unwrap();
    let path = std::env::var_os("FACEPRIOR_SHEET").map_or(folder.path().join("sheet.png"), Into::into);
    let sheet = sheet(std::env::var("FACEPRIOR_SHEET_SIZE").map_or(64, |size| size.parse().unwrap()));
    sheet.write(&path).unwrap();
    assert_eq!(Image::read(&path).unwrap(), sheet);
}

#[test]
fn the_same_parameters_give_the_same_bytes_and_others_do_not() {
    let faces = SyntheticFaces::new(9, 3, 2, 48);
    for index in 0..6 {
        assert_eq!(faces.render(index), faces.clone().render(index));
    }
    for (a, b) in [(0, 1), (0, 2), (1, 3)] {
        assert_ne!(faces.read(a).unwrap(), faces.read(b).unwrap());
    }
    let (identity, nuisance) = (faces.identity(0), faces.nuisance(0));
    assert_eq!(identity, faces.identity(1));
    assert_ne!(nuisance, faces.nuisance(1));
    let noisy = Nuisance {
        noise: 0.03,
        ..nuisance.clone()
    };
    let seeded = Nuisance {
        seed: noisy.seed + 1,
        ..noisy.clone()
    };
    assert_ne!(render(&identity, &noisy, 32), render(&identity, &seeded, 32));
}

#[test]
fn sets_that_start_elsewhere_show_the_same_world() {
    let all = SyntheticFaces::new(4, 6, 2, 32);
    let last = SyntheticFaces::new(4, 2, 2, 32).starting_at(4);
    for index in 0..4 {
        assert_eq!(last.read(index).unwrap(), all.read(8 + index).unwrap());
        assert_eq!(last.name(index), all.name(8 + index));
        assert_eq!(last.index_of(&all.name(8 + index)), Some(index));
        assert_eq!(last.index_of(&all.name(index)), None);
    }
    assert_eq!((last.label(3), last.num_classes(), last.len()), (Some(1), 2, 4));
    assert_eq!(last.name(3), "face_000005/face_000005_0002.png");
    for odd in [
        "",
        "face_000005/face_000005_0003.png",
        "face_000005/face_000005_0000.png",
        "x/face_000005_0002.png",
    ] {
        assert_eq!(last.index_of(odd), None, "{odd}");
    }
    let unlabelled = last.unlabelled();
    assert_eq!((unlabelled.label(0), unlabelled.num_classes()), (None, 0));
}

#[test]
fn every_size_and_every_face_renders_with_landmarks_in_order() {
    let mut rng = stream(3, b"test    ", [0, 0]);
    for (i, size) in [1, 2, 7, 32, 33, 48, 64]
        .into_iter()
        .cycle()
        .take(140)
        .enumerate()
    {
        let identity = Identity::sample(&mut rng);
        let nuisance = Nuisance::sample(&mut rng);
        let (image, [left, right, nose, mouth_left, mouth_right]) = render(&identity, &nuisance, size);
        assert_eq!((image.width(), image.height()), (size, size));
        let side = size as f32;
        for point in [left, right, nose, mouth_left, mouth_right] {
            assert!(
                point.iter().all(|&x| x > 0.0 && x < side),
                "face {i}: {point:?} of {size}"
            );
        }
        let eyes = right[0] - left[0];
        assert!(
            eyes > 0.2 * side && eyes < 0.42 * side,
            "face {i}: the eyes are {} apart",
            eyes / side
        );
        assert!(mouth_right[0] > mouth_left[0]);
        assert!(nose[1] > left[1].min(right[1]) && mouth_left[1].max(mouth_right[1]) > nose[1]);
    }
}

#[test]
fn landmarks_lie_on_what_they_name() {
    // Dark pupils, coloured irises and lips: painted in a colour that occurs nowhere else.
    let mut rng = stream(5, b"test    ", [0, 0]);
    for _ in 0..40 {
        let marker = [0.0, 1.0, 0.0];
        let identity = Identity {
            lips: marker,
            iris: [0.1, 0.0, 0.1],
            hair_cover: 0.0,
            beard: 0.0,
            glasses: 0.0,
            freckles: 0.0,
            ..Identity::sample(&mut rng)
        };
        let nuisance = Nuisance {
            noise: 0.0,
            blur: 0.0,
            exposure: 1.0,
            eye_open: 1.0,
            gaze: [0.0; 2],
            mouth_open: 0.0,
            background: [[0.5, 0.0, 0.5]; 2],
            clothes: [0.5, 0.0, 0.5],
            light_color: [1.0; 3],
            ..Nuisance::sample(&mut rng)
        };
        let size = 256;
        let (image, [left, right, _, mouth_left, mouth_right]) = render(&identity, &nuisance, size);
        for eye in [left, right] {
            let [r, g, b] = image.pixel(eye[0] as usize, eye[1] as usize);
            assert!(
                u32::from(r) + u32::from(g) + u32::from(b) < 150,
                "a pupil at {eye:?} is {:?}",
                [r, g, b]
            );
        }
        let green: Vec<(f32, f32)> = (0..size * size)
            .filter(|i| {
                let [r, g, b] = image.pixel(i % size, i / size).map(i32::from);
                g > r + 30 && g > b + 30
            })
            .map(|i| ((i % size) as f32 + 0.5, (i / size) as f32 + 0.5))
            .collect();
        // Along the line through the corners, the lips end at the landmarks.
        let along = [mouth_right[0] - mouth_left[0], mouth_right[1] - mouth_left[1]];
        let length = (along[0] * along[0] + along[1] * along[1]).sqrt();
        let place =
            |(x, y): &(f32, f32)| ((x - mouth_left[0]) * along[0] + (y - mouth_left[1]) * along[1]) / length;
        let first = green.iter().map(place).fold(f32::MAX, f32::min);
        let last = green.iter().map(place).fold(f32::MIN, f32::max);
        // The lips taper to nothing, so they are visible from a little inside.
        assert!(
            (-2.0..9.0).contains(&first) && (-2.0..9.0).contains(&(length - last)),
            "{first} {last} of {length}"
        );
    }
}

#[test]
fn turning_moves_the_nose_more_than_the_eyes() {
    let identity = Identity::sample(&mut stream(6, b"test    ", [0, 0]));
    let at = |yaw| {
        render(
            &identity,
            &Nuisance {
                yaw,
                ..Nuisance::neutral()
            },
            100,
        )
        .1
    };
    let (frontal, turned) = (at(0.0), at(0.3));
    let moved: Vec<f32> = (0..5).map(|i| turned[i][0] - frontal[i][0]).collect();
    assert!(
        moved[2] > moved[0] + 1.0 && moved[2] > moved[1] + 1.0,
        "{moved:?}"
    );
    assert!(moved.iter().all(|&x| x > 2.0), "{moved:?}");
    // The far half of the face looks narrower.
    assert!(turned[1][0] - turned[2][0] < frontal[1][0] - frontal[2][0]);
    let shifted = Nuisance {
        shift: [0.1, -0.05],
        ..Nuisance::neutral()
    };
    let shifted = render(&identity, &shifted, 100).1;
    for (a, b) in frontal.iter().zip(&shifted) {
        assert!((b[0] - a[0] - 10.0).abs() < 1e-3 && (b[1] - a[1] + 5.0).abs() < 1e-3);
    }
}

#[test]
fn identities_differ_continuously() {
    let mut rng = stream(8, b"test    ", [0, 0]);
    let (a, b) = (Identity::sample(&mut rng), Identity::sample(&mut rng));
    assert_eq!(a.blend(&b, 0.0), a);
    let picture = |t| render(&a.blend(&b, t), &Nuisance::neutral(), 48).0;
    let distance = |x: &Image, y: &Image| -> f64 {
        x.pixels()
            .iter()
            .zip(y.pixels())
            .map(|(&p, &q)| f64::from(p.abs_diff(q)))
            .sum()
    };
    let near = distance(&picture(0.0), &picture(0.02));
    assert!(near > 0.0 && near < 0.2 * distance(&picture(0.0), &picture(1.0)));
}

/// The share of pairs told apart by the best threshold on the distance of normalised pixels: a stand-in for what a
/// pixel baseline can reach. A recogniser has something to learn as long as this stays far from 1.
#[test]
fn pixels_alone_do_not_tell_people_apart() {
    let faces = SyntheticFaces::new(2, 60, 6, 32);
    let pairs = faces.pairs(1, 300, 1).unwrap();
    let vector = |name: &str| -> Vec<f32> {
        let image = faces.read(faces.index_of(name).unwrap()).unwrap();
        let mut values = vec![0.0; 3 * 32 * 32];
        image.to_chw_f32(&mut values);
        for plane in values.chunks_exact_mut(32 * 32) {
            let mean = plane.iter().sum::<f32>() / 1024.0;
            plane.iter_mut().for_each(|x| *x -= mean);
        }
        let norm = values.iter().map(|x| x * x).sum::<f32>().sqrt();
        values.iter().map(|x| x / norm).collect()
    };
    let mut scores: Vec<(f32, bool)> = pairs
        .iter()
        .map(|pair| {
            let (left, right) = (vector(&pair.left), vector(&pair.right));
            (left.iter().zip(&right).map(|(a, b)| a * b).sum(), pair.same)
        })
        .collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut best, mut right) = (0i32, 300i32);
    for (_, same) in &scores {
        right += if *same { 1 } else { -1 };
        best = best.max(right);
    }
    let accuracy = f64::from(best) / 600.0;
    assert!(
        (0.52..0.75).contains(&accuracy),
        "normalised pixels reach {accuracy}"
    );
}

#[test]
fn pairs_are_balanced_distinct_and_apart_between_folds() {
    let faces = SyntheticFaces::new(1, 20, 4, 32).starting_at(100);
    let made = faces.pairs(4, 25, 7).unwrap();
    assert_eq!(made.len(), 200);
    assert_eq!(made, faces.pairs(4, 25, 7).unwrap());
    assert_ne!(made, faces.pairs(4, 25, 8).unwrap());
    let distinct: HashSet<(&str, &str)> = made.iter().map(|p| (p.left.as_str(), p.right.as_str())).collect();
    assert_eq!(distinct.len(), 200);
    let person = |name: &str| name.split_once('/').unwrap().0.to_owned();
    let mut of_fold = vec![HashSet::new(); 4];
    for pair in &made {
        assert_eq!(person(&pair.left) == person(&pair.right), pair.same);
        assert_ne!(pair.left, pair.right);
        assert!(faces.index_of(&pair.left).is_some() && faces.index_of(&pair.right).is_some());
        of_fold[pair.fold].insert(person(&pair.left));
        of_fold[pair.fold].insert(person(&pair.right));
    }
    for fold in 0..4 {
        assert_eq!(
            made.iter().filter(|pair| pair.fold == fold && pair.same).count(),
            25
        );
        assert!((0..fold).all(|other| of_fold[fold].is_disjoint(&of_fold[other])));
    }
    // All 30 same pairs of a fold can be asked for, and no more.
    assert_eq!(faces.pairs(4, 30, 7).unwrap().len(), 240);
    let error = faces.pairs(4, 31, 7).unwrap_err().to_string();
    assert!(error.contains("at most 30") && error.contains("hint:"), "{error}");
    assert!(faces.pairs(0, 1, 7).is_err() && faces.pairs(1, 0, 7).is_err() && faces.pairs(30, 1, 7).is_err());
    // They go through the format of LFW unchanged.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.txt");
    pairs::write(&path, &made).unwrap();
    assert_eq!(pairs::read(&path, &pairs::Pictures::of(&faces)).unwrap(), made);
}
