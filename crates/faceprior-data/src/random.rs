//! Reproducible randomness: a stream is a function of a seed, a purpose and a clock.
//!
//! Nothing here depends on the version of a sampling library: the same seed gives the same order for ever.

use rand::{Rng, SeedableRng};
pub use rand_chacha::ChaCha8Rng;

/// The random stream of `purpose` (a short name, eight bytes) at the time `clock` (for example epoch and position).
///
/// Streams that differ in any argument are independent: the arguments *are* the key of the cipher.
pub fn stream(seed: u64, purpose: &[u8; 8], clock: [u64; 2]) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[0..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&clock[0].to_le_bytes());
    key[16..24].copy_from_slice(&clock[1].to_le_bytes());
    key[24..32].copy_from_slice(purpose);
    ChaCha8Rng::from_seed(key)
}

/// A uniform integer in `0..bound`; `bound` must not be 0.
///
/// The bias of the multiplication method is below `bound / 2^64`.
pub fn below(rng: &mut impl Rng, bound: usize) -> usize {
    ((u128::from(rng.next_u64()) * bound as u128) >> 64) as usize
}

/// A uniform number in `[0, 1)` with 24 bits.
pub fn unit(rng: &mut impl Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 24) as f32
}

/// The numbers `0..len` in random order (Fisher–Yates).
///
/// # Panics
/// If `len` does not fit in 32 bits.
pub fn permutation(rng: &mut impl Rng, len: usize) -> Vec<u32> {
    let len = u32::try_from(len).expect("a set has fewer than 2^32 pictures");
    let mut order: Vec<u32> = (0..len).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, below(rng, last + 1));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_every_argument_and_on_nothing_else() {
        let draw = |seed, purpose, clock| stream(seed, purpose, clock).next_u64();
        let first = draw(1, b"order   ", [2, 3]);
        assert_eq!(first, draw(1, b"order   ", [2, 3]));
        for other in [
            draw(0, b"order   ", [2, 3]),
            draw(1, b"augment ", [2, 3]),
            draw(1, b"order   ", [3, 3]),
            draw(1, b"order   ", [2, 2]),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn a_permutation_holds_every_number_once_and_favours_no_place() {
        let mut first_place = [0usize; 8];
        for seed in 0..4000 {
            let order = permutation(&mut stream(seed, b"test    ", [0, 0]), 8);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..8).collect::<Vec<u32>>());
            first_place[order[0] as usize] += 1;
        }
        // Binomial(4000, 1/8): mean 500, standard deviation 21.
        assert!(
            first_place.iter().all(|&count| (400..600).contains(&count)),
            "{first_place:?}"
        );
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        let order = permutation(&mut stream(7, b"order   ", [1, 0]), 10);
        assert_eq!(order, RECORDED);
    }

    /// Recorded from the first version: a change here would make old runs impossible to resume.
    const RECORDED: [u32; 10] = [1, 2, 3, 5, 9, 0, 6, 8, 4, 7];
}
