//! Weights in the form that kernels read, kept while the weights live.
//!
//! Transforming a weight costs as much as a small convolution with it. In training every weight is new at every step;
//! a network that only answers uses the same ones again and again. Nothing is kept for a gradient's sake or on first
//! sight, and a weight that is kept here counts as shared, so that no update changes it in place.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use burn_flex::FlexTensor;
use cubecl_environment::bytes::Bytes;

use crate::backend::values;
use crate::kernels::winograd::Tile;
use crate::pool::Buffer;

/// Which kernel a weight is prepared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    Winograd(Tile),
    Direct,
}

/// A view of memory: two weights with one key have one content.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    memory: usize,
    offset: usize,
    dims: Vec<usize>,
    form: Form,
}

enum Entry {
    /// Used once without a gradient.
    Seen(Weak<Bytes>),
    /// Used again.
    Kept(Arc<Bytes>, Arc<Buffer>),
}

impl Entry {
    /// Whether somebody else still holds the weight.
    fn is_alive(&self) -> bool {
        match self {
            Self::Seen(weight) => weight.strong_count() > 0,
            Self::Kept(weight, _) => Arc::strong_count(weight) > 1,
        }
    }
}

static PREPARED: Mutex<Option<HashMap<Key, Entry>>> = Mutex::new(None);

/// The weight as `prepare` makes it, from memory where it was wanted before.
pub(crate) fn prepared(
    weight: &FlexTensor,
    form: Form,
    prepare: impl FnOnce(&[f32]) -> Buffer,
) -> Arc<Buffer> {
    let memory = weight.data_arc();
    let key = Key {
        memory: Arc::as_ptr(&memory) as usize,
        offset: weight.layout().start_offset(),
        dims: weight.layout().shape().to_vec(),
        form,
    };
    let seen = {
        let mut entries = PREPARED.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = entries.get_or_insert_default();
        match entries.get(&key) {
            Some(Entry::Kept(_, prepared)) => return prepared.clone(),
            Some(Entry::Seen(weight)) => weight.upgrade().is_some_and(|seen| Arc::ptr_eq(&seen, &memory)),
            None => false,
        }
    };
    let prepared = Arc::new(prepare(values(weight)));
    let entry = if seen {
        Entry::Kept(memory, prepared.clone())
    } else {
        Entry::Seen(Arc::downgrade(&memory))
    };
    let mut entries = PREPARED.lock().unwrap_or_else(PoisonError::into_inner);
    let entries = entries.get_or_insert_default();
    entries.retain(|_, entry| entry.is_alive());
    entries.insert(key, entry);
    prepared
}

/// Forgets the weights that nobody else holds any more.
pub(crate) fn forget_dead() {
    let mut entries = PREPARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(entries) = entries.as_mut() {
        entries.retain(|_, entry| entry.is_alive());
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use crate::testing::{assert_close, random};
    use crate::{Conv2dOptions, FeatureMap, conv2d};

    #[test]
    fn a_weight_that_changes_after_use_is_prepared_again() {
        let device = Device::flex();
        let plain = |x: Tensor<4>| Tensor::<4>::from_data(x.into_data(), &device);
        let x = plain(random([1, 20, 24, 24], 1));
        let run = |weight: Tensor<4>| {
            conv2d(FeatureMap::from_nchw(x.clone()), weight, Conv2dOptions::same3x3()).into_nchw()
        };
        let mut weight = plain(random([18, 20, 3, 3], 2));
        for _ in 0..3 {
            let first = run(weight.clone());
            for _ in 0..3 {
                assert_close(run(weight.clone()), first.clone(), 0.0);
            }
            // The only owner but for what is kept here: an operation may do this in place.
            weight = weight.mul_scalar(2.0);
            assert_close(run(weight.clone()), first.mul_scalar(2.0), 1e-6);
        }
    }
}
