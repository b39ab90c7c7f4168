//! The pairs a model is most wrong about.

use serde::{Deserialize, Serialize};

/// A pair and how far apart the model puts it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mistake {
    /// Index in the list of pairs.
    pub pair: usize,
    /// Squared distance of its embeddings.
    pub distance: f64,
}

/// The most striking pairs of each kind, the worst first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mistakes {
    /// Pairs of two people that lie closest.
    pub impostor: Vec<Mistake>,
    /// Pairs of one person that lie farthest apart.
    pub genuine: Vec<Mistake>,
}

/// The up to `count` worst pairs of each kind; equal distances in the order of the list. Whether one counts as an
/// error depends on a threshold: these are the extremes, on whichever side of it they fall.
pub fn worst_pairs(distances: &[f64], same: &[bool], count: usize) -> Mistakes {
    let of_kind = |kind: bool| {
        let pairs = distances
            .iter()
            .zip(same)
            .enumerate()
            .filter(move |(_, (_, same))| **same == kind);
        pairs
            .map(|(pair, (&distance, _))| Mistake { pair, distance })
            .collect::<Vec<_>>()
    };
    let (mut impostor, mut genuine) = (of_kind(false), of_kind(true));
    impostor.sort_by(|a, b| a.distance.total_cmp(&b.distance));
    genuine.sort_by(|a, b| b.distance.total_cmp(&a.distance));
    impostor.truncate(count);
    genuine.truncate(count);
    Mistakes { impostor, genuine }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_impostors_and_the_farthest_genuine_pairs_come_first() {
        let distances = [0.4, 1.5, 0.2, 1.9, 0.1, 0.2];
        let same = [true, true, false, false, true, false];
        let worst = worst_pairs(&distances, &same, 2);
        let pairs = |mistakes: &[Mistake]| mistakes.iter().map(|m| m.pair).collect::<Vec<_>>();
        assert_eq!(
            (pairs(&worst.impostor), pairs(&worst.genuine)),
            (vec![2, 5], vec![1, 0])
        );
        assert_eq!(worst_pairs(&distances, &same, 9).genuine.len(), 3);
    }
}
