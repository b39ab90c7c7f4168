//! Ranges that the types of a recipe do not express.

use std::fmt;

use super::{LabelledData, Recipe, Schedule};

impl Recipe {
    /// Ranges that the types do not express; each message begins with the key.
    pub(super) fn check(&self) -> Result<(), String> {
        let depths = [18, 34, 50, 100, 152];
        require(
            depths.contains(&self.backbone.depth),
            "backbone.depth",
            self.backbone.depth,
            "18, 34, 50, 100 or 152",
        )?;
        positive("backbone.width", self.backbone.width)?;
        require(
            self.backbone.width.is_multiple_of(16),
            "backbone.width",
            self.backbone.width,
            "a multiple of 16 (squeeze-and-excitation divides by 16)",
        )?;
        let size = self.backbone.image_size;
        require(
            size >= 32 && size.is_multiple_of(16),
            "backbone.image_size",
            size,
            "a multiple of 16, at least 32",
        )?;
        let resolution = self.prior.resolution;
        require(
            resolution.is_power_of_two() && (32..=256).contains(&resolution),
            "prior.resolution",
            resolution,
            "32, 64, 128 or 256",
        )?;
        for (key, value) in [
            ("prior.latent_dim", self.prior.latent_dim),
            ("prior.mapping_layers", self.prior.mapping_layers),
            ("prior.channel_max", self.prior.channel_max),
            ("prior.latent_avg_samples", self.prior.latent_avg_samples),
            ("encoder.iterations_per_batch", self.encoder.iterations_per_batch),
            ("recognizer.embedding_dim", self.recognizer.embedding_dim),
            ("eval.batch_size", self.eval.batch_size),
            ("eval.bootstrap_draws", self.eval.bootstrap_draws),
            ("data.workers", self.data.workers),
            ("data.queue", self.data.queue),
        ] {
            positive(key, value)?;
        }
        let base = self.prior.channel_base;
        require(
            base >= resolution,
            "prior.channel_base",
            base,
            &format!("at least prior.resolution, {resolution}"),
        )?;
        for (key, value) in [
            ("prior.style_mixing", self.prior.style_mixing),
            ("prior.ema_decay", self.prior.ema_decay),
            ("prior.betas[0]", self.prior.betas[0]),
            ("prior.betas[1]", self.prior.betas[1]),
            ("recognizer.momentum", self.recognizer.momentum),
        ] {
            require((0.0..=1.0).contains(&value), key, value, "a number from 0 to 1")?;
        }
        for (key, value) in [
            ("recognizer.dropout", self.recognizer.dropout),
            ("recognizer.output_dropout", self.recognizer.output_dropout),
        ] {
            require(
                (0.0..1.0).contains(&value),
                key,
                value,
                "a number from 0 up to but not 1",
            )?;
        }
        for (key, value) in [
            ("prior.learning_rate_g", self.prior.learning_rate_g),
            ("prior.learning_rate_d", self.prior.learning_rate_d),
            ("prior.path_length.weight", self.prior.path_length.weight),
            ("prior.r1.weight", self.prior.r1.weight),
            ("encoder.learning_rate", self.encoder.learning_rate),
            ("encoder.mse_weight", self.encoder.mse_weight),
            ("encoder.perceptual_weight", self.encoder.perceptual_weight),
            ("encoder.w_norm_weight", self.encoder.w_norm_weight),
            ("recognizer.learning_rate", self.recognizer.learning_rate),
            ("recognizer.weight_decay", self.recognizer.weight_decay),
            ("scratch.learning_rate", self.scratch.learning_rate),
        ] {
            require(
                value.is_finite() && value >= 0.0,
                key,
                value,
                "a number of at least 0",
            )?;
        }
        if let LabelledData::Identities { fraction, .. } = self.data.labels {
            require(
                fraction > 0.0 && fraction <= 1.0,
                "data.labels.fraction",
                fraction,
                "a number in (0, 1]",
            )?;
        }
        if let Schedule::Step { divide_by, .. } = self.recognizer.schedule {
            require(
                divide_by > 0.0,
                "recognizer.schedule.divide_by",
                divide_by,
                "more than 0",
            )?;
        }
        let validation = self.data.validation_identities;
        require(
            validation != 1,
            "data.validation_identities",
            validation,
            "0, or at least 2 to make pairs of",
        )?;
        for (section, budget) in [
            ("prior", &self.prior.budget),
            ("encoder", &self.encoder.budget),
            ("recognizer", &self.recognizer.budget),
        ] {
            let key = |field: &str| format!("{section}.budget.{field}");
            positive(&key("batch_size"), budget.batch_size)?;
            for (field, value) in [
                ("images", budget.images),
                ("record_every", budget.record_every),
                ("evaluate_every", budget.evaluate_every),
                ("checkpoint_every", budget.checkpoint_every),
                ("keep", budget.keep as u64),
            ] {
                require(value > 0, &key(field), value, "at least 1")?;
            }
        }
        Ok(())
    }
}

fn require(holds: bool, key: &str, got: impl fmt::Display, expected: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("{key} is {got}, expected {expected}"))
    }
}

fn positive(key: &str, value: usize) -> Result<(), String> {
    require(value > 0, key, value, "at least 1")
}
