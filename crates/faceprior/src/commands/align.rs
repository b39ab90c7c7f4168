//! `faceprior align`: find faces, turn them upright, crop them.

use std::sync::OnceLock;

use anyhow::{Result, bail};
use faceprior::faces::{self, AlignOptions, AlignSettings, CropFormat, Crops, Shard, Summary, Which};
use faceprior::train::signals::Stop;

use super::Context;
use crate::args::{self, OneFace};
use crate::progress::{Progress, say};

pub fn run(context: &Context, arguments: args::Align) -> Result<()> {
    let base = if arguments.as_published {
        AlignSettings::seed()
    } else {
        AlignSettings::default()
    };
    let crops = match arguments.one {
        None => Crops::All,
        Some(which) => Crops::One {
            which: match which {
                OneFace::Center => Which::Center,
                OneFace::Largest => Which::Largest,
                OneFace::Best => Which::Best,
            },
            center_fallback: arguments.center_fallback,
        },
    };
    let format = match arguments.format {
        args::CropFormat::Jpg => CropFormat::Jpeg { quality: 95 },
        args::CropFormat::Png => CropFormat::Png,
    };
    let (width, height) = arguments.size;
    let mut settings = AlignSettings {
        crops,
        format,
        width,
        height,
        ..base
    };
    if !arguments.as_published {
        settings.detector.min_face = f64::from(arguments.min_face);
    }
    let options = AlignOptions {
        settings,
        threads: context.threads,
        max_unreadable: arguments.max_unreadable,
        shard: arguments.shard.map(|(part, parts)| Shard { part, parts }),
    };

    let stop = Stop::on_signals()?;
    let shown: OnceLock<Progress> = OnceLock::new();
    let report = |now: &faces::Progress| {
        let progress = shown.get_or_init(|| {
            Progress::new(
                "align",
                "pictures",
                now.total as u64,
                now.before as u64,
                context.quiet,
            )
        });
        progress.at((now.before + now.now) as u64, format_args!("{} faces", now.faces));
    };
    let summary = faces::align(&arguments.input, &arguments.out, &options, &report, stop.flag())?;
    drop(shown);
    if context.json {
        super::print_json(&summary)?;
    } else {
        show(&summary, &arguments);
    }
    if summary.stopped {
        bail!("stopped before the end\nhint: run the same command again to go on");
    }
    Ok(())
}

fn show(summary: &Summary, arguments: &args::Align) {
    let counts = &summary.counts;
    let done = summary.listed - summary.before;
    println!("pictures      {}", summary.listed);
    println!("faces         {}", counts.faces);
    println!("crops         {}", counts.crops);
    println!("without face  {}", counts.without_face);
    println!("unreadable    {}", counts.unreadable);
    println!("this run      {done} pictures in {:.1} s", summary.seconds);
    if counts.without_face > 0 {
        say(format_args!(
            "pictures without a face are listed in {}",
            arguments.out.join("no_face.txt").display()
        ));
    }
    if counts.unreadable > 0 {
        say(format_args!(
            "unreadable pictures are listed in {}",
            arguments.out.join("unreadable.txt").display()
        ));
    }
}
