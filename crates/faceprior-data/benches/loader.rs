//! Where the time of a batch goes: decoding, resizing, the way from a file to numbers, and the whole loader.

use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use faceprior_data::synthetic::{Identity, Nuisance, render};
use faceprior_data::{
    Encoding, Image, ImageFolder, Loader, LoaderConfig, Position, SyntheticFaces, Transform, export, random,
};

fn pictures(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("picture");
    group
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Elements(1));

    let face = SyntheticFaces::new(1, 2, 2, 250).render(0).0;
    let jpeg = face
        .encode(Encoding::Jpeg { quality: 95 })
        .expect("a picture of 250 pixels");
    let png = face.encode(Encoding::Png).expect("a picture of 250 pixels");
    group.bench_function("decode jpeg 250", |b| {
        b.iter(|| Image::decode(&jpeg, "face.jpg").unwrap())
    });
    group.bench_function("decode png 250", |b| {
        b.iter(|| Image::decode(&png, "face.png").unwrap())
    });
    group.bench_function("encode jpeg 250", |b| {
        b.iter(|| face.encode(Encoding::Jpeg { quality: 95 }).unwrap())
    });
    group.bench_function("resize 250 to 128", |b| b.iter(|| face.resize_bilinear(128, 128)));

    let small = face.resize_bilinear(112, 112);
    group.bench_function("resize 112 to 128", |b| {
        b.iter(|| small.resize_bilinear(128, 128))
    });
    let mut out = vec![0.0; 3 * 112 * 112];
    let mut rng = random::stream(0, b"bench   ", [0, 0]);
    group.bench_function("augment 112", |b| {
        b.iter(|| Transform::augment(112).apply(&small, &mut rng, &mut out));
    });
    let jpeg = small
        .encode(Encoding::Jpeg { quality: 95 })
        .expect("a picture of 112 pixels");
    group.bench_function("decode and augment jpeg 112", |b| {
        b.iter(|| {
            let image = Image::decode(&jpeg, "face.jpg").unwrap();
            Transform::augment(112).apply(&image, &mut rng, &mut out);
        });
    });
    group.bench_function("render 64", |b| {
        b.iter_batched(
            || (Identity::sample(&mut rng), Nuisance::sample(&mut rng)),
            |(identity, nuisance)| render(&identity, &nuisance, 64),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn loader(criterion: &mut Criterion) {
    const BATCH: usize = 32;
    let folder = std::env::temp_dir().join(format!("faceprior-bench-{}", std::process::id()));
    export(&SyntheticFaces::new(1, 16, 8, 112), &folder).expect("the temporary folder can be written");
    let set = Arc::new(ImageFolder::open(&folder).expect("the set was just written"));
    let mut group = criterion.benchmark_group("loader");
    group
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Elements(BATCH as u64));
    for workers in [1, 2] {
        let config = LoaderConfig {
            batch_size: BATCH,
            workers,
            ..LoaderConfig::default()
        };
        let mut loader = Loader::new(set.clone(), Transform::augment(112), config, Position::default())
            .expect("it can start");
        group.bench_function(format!("png 112, {workers} workers"), |b| {
            b.iter(|| loader.next().unwrap())
        });
    }
    group.finish();
    std::fs::remove_dir_all(&folder).expect("the temporary folder can be removed");
}

criterion_group!(benches, pictures, loader);
criterion_main!(benches);
