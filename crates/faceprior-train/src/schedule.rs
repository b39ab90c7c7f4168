//! The clock of a run, and everything that is a function of it: learning rates, margins, random draws.
//!
//! A stage keeps no random state. Every draw comes from (seed, stream, step), so a resumed run draws what the
//! uninterrupted one would have drawn.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::recipe::Schedule;

/// Where a run stands, as seen by the step that is about to be taken (or, in an evaluation, after the last one).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clock {
    /// Seed of the run.
    pub seed: u64,
    /// Optimiser steps already taken.
    pub step: u64,
    /// Images already seen.
    pub images: u64,
    /// Images that the whole run will see.
    pub total_images: u64,
    /// Passes over the data set already completed, counted from 0.
    pub epoch: u64,
}

impl Clock {
    /// The random numbers of this step for one purpose; two streams of a step are independent.
    pub fn rng(&self, stream: &str) -> ChaCha8Rng {
        rng(self.seed, stream, self.step)
    }

    /// Random numbers for one purpose that are the same at every step: the latents of a sample grid, for instance.
    pub fn fixed_rng(&self, stream: &str) -> ChaCha8Rng {
        rng(self.seed, stream, u64::MAX)
    }

    /// Share of the budget already used, in [0, 1].
    pub fn progress(&self) -> f64 {
        (self.images as f64 / self.total_images.max(1) as f64).min(1.0)
    }
}

/// The random numbers that (seed, stream, step) stand for.
pub fn rng(seed: u64, stream: &str, step: u64) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&step.to_le_bytes());
    hasher.update(stream.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// A seed for a component that takes one: the first 64 bits of what (seed, stream) stand for.
pub fn seed(seed: u64, stream: &str) -> u64 {
    use rand::Rng;
    rng(seed, stream, 0).next_u64()
}

/// Rises linearly from 0 to 1 over `over_images` and stays there; 1 throughout if `over_images` is 0.
///
/// Before batch b of a warm-up over B batches this is b/B: 0 at the first, as the reference warms up.
pub fn ramp(clock: &Clock, over_images: u64) -> f64 {
    if clock.images >= over_images {
        1.0
    } else {
        clock.images as f64 / over_images as f64
    }
}

impl Schedule {
    /// What the base learning rate is multiplied with at `clock`, before any warm-up.
    ///
    /// - `constant`: 1.
    /// - `step`: 1 before `first_epoch`, then divided by `divide_by` there and every `every_epochs` after it
    ///   (÷ 1.5 at 15, 20, 25, … in the published runs).
    /// - `cosine`: ½·(1 + cos(π·progress)), scaled to end at `floor`.
    pub fn factor(&self, clock: &Clock) -> f64 {
        match *self {
            Schedule::Constant {} => 1.0,
            Schedule::Step {
                first_epoch,
                every_epochs,
                divide_by,
            } => {
                let drops = match clock.epoch.checked_sub(first_epoch) {
                    None => 0,
                    Some(past) => 1 + past.checked_div(every_epochs).unwrap_or(0),
                };
                divide_by.powf(-(drops as f64))
            }
            Schedule::Cosine { floor } => {
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * clock.progress()).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    fn at(epoch: u64, images: u64) -> Clock {
        Clock {
            seed: 5,
            step: images / 10,
            images,
            total_images: 1000,
            epoch,
        }
    }

    #[test]
    fn steps_fall_at_15_20_25() {
        let schedule = Schedule::Step {
            first_epoch: 15,
            every_epochs: 5,
            divide_by: 1.5,
        };
        let drops = |epoch| -(schedule.factor(&at(epoch, 0)).ln() / 1.5f64.ln()).round() as i64;
        let seen: Vec<i64> = [0, 14, 15, 19, 20, 24, 25, 99].map(drops).to_vec();
        assert_eq!(seen, [0, 0, 1, 1, 2, 2, 3, 17]);
        assert!((schedule.factor(&at(20, 0)) - 1.0 / 2.25).abs() < 1e-12);
    }

    #[test]
    fn a_single_step_needs_no_interval() {
        let schedule = Schedule::Step {
            first_epoch: 2,
            every_epochs: 0,
            divide_by: 10.0,
        };
        assert_eq!(schedule.factor(&at(1, 0)), 1.0);
        assert!((schedule.factor(&at(50, 0)) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn cosine_starts_at_one_and_ends_at_its_floor() {
        let schedule = Schedule::Cosine { floor: 0.1 };
        assert_eq!(schedule.factor(&at(0, 0)), 1.0);
        assert!((schedule.factor(&at(0, 500)) - 0.55).abs() < 1e-12);
        assert!((schedule.factor(&at(0, 1000)) - 0.1).abs() < 1e-12);
        assert!(
            (schedule.factor(&at(0, 1010)) - 0.1).abs() < 1e-12,
            "a last batch may pass the budget"
        );
    }

    #[test]
    fn a_warm_up_of_ten_batches_starts_at_zero() {
        let rates: Vec<f64> = (0..12).map(|b| ramp(&at(0, b * 10), 100)).collect();
        assert_eq!(
            rates,
            [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0]
        );
        assert_eq!(ramp(&at(0, 0), 0), 1.0);
    }

    #[test]
    fn draws_depend_on_seed_stream_and_step_alone() {
        let draw = |clock: Clock, stream: &str| clock.rng(stream).next_u64();
        let here = at(0, 100);
        assert_eq!(
            draw(here, "z"),
            draw(
                Clock {
                    images: 7,
                    epoch: 3,
                    ..here
                },
                "z"
            )
        );
        assert_ne!(draw(here, "z"), draw(here, "noise"));
        assert_ne!(draw(here, "z"), draw(Clock { step: 11, ..here }, "z"));
        assert_ne!(draw(here, "z"), draw(Clock { seed: 6, ..here }, "z"));
        assert_eq!(
            here.fixed_rng("z").next_u64(),
            Clock { step: 9, ..here }.fixed_rng("z").next_u64()
        );
    }
}
