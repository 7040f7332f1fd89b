//! Votes of pairs of classes, where some votes are not counted yet.

use std::cmp::Reverse;

use super::Pairwise;
use crate::kernels::{Kernel, Simd};

/// Bits of a word.
const BITS: usize = u64::BITS as usize;

/// The index of the pair `first < second` of `classes` among all pairs: (0, 1), (0, 2), … (1, 2), …
pub(super) fn pair(classes: usize, first: usize, second: usize) -> usize {
    first * (2 * classes - first - 1) / 2 + second - first - 1
}

/// The number of pairs.
pub(super) fn pairs(classes: usize) -> usize {
    classes * (classes - 1) / 2
}

/// The votes so far. The class with most votes wins, the first one of equals, as in LIBSVM.
#[derive(Debug, Default)]
pub(super) struct Votes {
    votes: Vec<u32>,
    /// `[classes, words]`: a bit for each class whose vote against this one is not known.
    open: Vec<u64>,
    /// Words of a row of `open`.
    words: usize,
    /// Bits of each row of `open`.
    open_of: Vec<u32>,
    /// The classes that can still win, the leader among them.
    able: Vec<u32>,
    /// The first word of each row of `open` that may have a bit.
    first_word: Vec<u32>,
}

impl Votes {
    pub(super) fn clear(&mut self, classes: usize) {
        self.words = classes.div_ceil(BITS);
        self.open.clear();
        self.open.resize(classes * self.words, 0);
        for counts in [&mut self.votes, &mut self.open_of, &mut self.first_word] {
            counts.clear();
            counts.resize(classes, 0);
        }
    }

    pub(super) fn vote(&mut self, class: usize) {
        self.votes[class] += 1;
    }

    pub(super) fn leave_open(&mut self, first: usize, second: usize) {
        self.flip(first, second);
        self.open_of[first] += 1;
        self.open_of[second] += 1;
    }

    /// The winner. `decide` returns the vote of a pair (true: the first class). It is called only
    /// for open pairs that can change the winner.
    ///
    /// The votes that a class can still reach never grow, and the leader's votes never shrink. So a
    /// class that cannot win any more is not examined again. Every step removes such a class,
    /// decides a pair or skips the leader, so all steps together take no longer than one count of
    /// all pairs.
    pub(super) fn winner(&mut self, mut decide: impl FnMut(usize, usize) -> bool) -> usize {
        let mut leader = self.leader();
        self.able.clear();
        // Classes are at most 65,535.
        self.able.extend(0..self.votes.len() as u32);
        let mut at = 0;
        while self.able.len() > 1 {
            at %= self.able.len();
            let class = self.able[at] as usize;
            if class == leader {
                at += 1;
                continue;
            }
            let open = if self.can_win(class, leader) { self.take_open_of(class) } else { None };
            let Some(other) = open else {
                self.able.swap_remove(at);
                continue;
            };
            let winner = ask(&mut decide, class, other);
            self.vote(winner);
            if self.rank(winner) > self.rank(leader) {
                leader = winner;
            }
        }
        leader
    }

    /// Decides all open pairs and returns the votes.
    pub(super) fn count(&mut self, mut decide: impl FnMut(usize, usize) -> bool) -> &[u32] {
        for class in 0..self.votes.len() {
            while let Some(other) = self.take_open_of(class) {
                let winner = ask(&mut decide, class, other);
                self.vote(winner);
            }
        }
        &self.votes
    }

    /// More is better: votes, and of equals the first class.
    fn rank(&self, class: usize) -> (u32, Reverse<usize>) {
        (self.votes[class], Reverse(class))
    }

    /// Whether a class passes the leader if all its open pairs vote for it.
    fn can_win(&self, class: usize, leader: usize) -> bool {
        (self.votes[class] + self.open_of[class], Reverse(class)) > self.rank(leader)
    }

    /// Removes and returns another class with an open pair with this one.
    fn take_open_of(&mut self, class: usize) -> Option<usize> {
        let row = &self.open[class * self.words..(class + 1) * self.words];
        let from = self.first_word[class] as usize;
        let word = from + row[from..].iter().position(|&word| word != 0)?;
        let other = word * BITS + row[word].trailing_zeros() as usize;
        self.first_word[class] = word as u32;
        self.flip(class, other);
        self.open_of[class] -= 1;
        self.open_of[other] -= 1;
        Some(other)
    }

    fn flip(&mut self, first: usize, second: usize) {
        for (class, other) in [(first, second), (second, first)] {
            self.open[class * self.words + other / BITS] ^= 1 << (other % BITS);
        }
    }

    fn leader(&self) -> usize {
        (0..self.votes.len()).max_by_key(|&class| self.rank(class)).unwrap_or_default()
    }
}

/// Decides the vote of the pair of two classes.
fn ask(decide: &mut impl FnMut(usize, usize) -> bool, class: usize, other: usize) -> usize {
    let (first, second) = (class.min(other), class.max(other));
    if decide(first, second) { first } else { second }
}

/// Lanes of the sums over vectors.
const LANES: usize = 8;

/// Adds a tile's products of coefficients and values to the sums of all images.
pub(super) struct WeighedSums<'a> {
    pub(super) model: &'a Pairwise,
    /// The first vector of the tile.
    pub(super) first: usize,
    /// Vectors of the tile.
    pub(super) count: usize,
    /// `[images, count]`.
    pub(super) values: &'a [f64],
    /// `[images, classes, classes − 1]`.
    pub(super) sums: &'a mut [f64],
}

impl Kernel for WeighedSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { model, first, count, values, sums } = self;
        let classes = model.classes();
        let all = model.vectors();
        let row = classes * (classes - 1);
        // The class of the tile's first vector: the last that does not begin behind it.
        let from = model.starts.partition_point(|&start| start <= first) - 1;
        for class in from..classes {
            let start = model.starts[class].max(first);
            let end = model.starts[class + 1].min(first + count);
            if start >= first + count {
                break;
            }
            if start == end {
                continue;
            }
            for (values, sums) in values.chunks_exact(count).zip(sums.chunks_exact_mut(row)) {
                let values = &values[start - first..end - first];
                let sums = &mut sums[class * (classes - 1)..(class + 1) * (classes - 1)];
                for (sum, coefficients) in sums.iter_mut().zip(model.coefficients.chunks_exact(all))
                {
                    *sum += dot(values, &coefficients[start..end]);
                }
            }
        }
    }
}

/// A dot product in [`LANES`] sums, always added up in the same order.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// Buffers for LIBSVM's operations.
#[derive(Debug, Default)]
pub(super) struct Exact {
    /// Features; empty until the first use.
    image: Vec<f64>,
    vector: Vec<f64>,
    /// The kernel's values of the vectors of each class, computed on first use.
    of_class: Vec<Vec<f64>>,
}

impl Exact {
    /// Begins with another image.
    pub(super) fn clear(&mut self) {
        self.image.clear();
    }
}

impl Pairwise {
    /// The decision value of a pair, by the operations of LIBSVM in their order.
    pub(super) fn exact(
        &self,
        exact: &mut Exact,
        image: &[u8],
        first: usize,
        second: usize,
    ) -> f64 {
        if exact.image.is_empty() {
            self.pixels.features(image, &mut exact.image);
            exact.of_class.resize(self.classes(), Vec::new());
            exact.of_class.iter_mut().for_each(Vec::clear);
        }
        let mut sum = 0.0;
        for (class, other) in [(first, second), (second, first)] {
            if exact.of_class[class].is_empty() {
                let vectors = self.starts[class]..self.starts[class + 1];
                let Exact { image, vector, of_class } = exact;
                of_class[class].extend(vectors.map(|at| {
                    self.vectors.features(at, &self.pixels, vector);
                    self.function.exact(product(self.function.is_of_distance(), image, vector))
                }));
            }
            for (coefficient, value) in self.of(class, other).iter().zip(&exact.of_class[class]) {
                sum += coefficient * value;
            }
        }
        sum - self.rho[pair(self.classes(), first, second)]
    }
}

/// The dot product or the squared distance, feature by feature, as LIBSVM computes it. A
/// feature that is zero in both adds zero here; LIBSVM skips it.
fn product(distance: bool, x: &[f64], s: &[f64]) -> f64 {
    let mut sum = 0.0;
    for (x, s) in x.iter().zip(s) {
        sum += if distance { (x - s) * (x - s) } else { x * s };
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Noise(u32);

    impl Noise {
        fn below(&mut self, bound: u32) -> u32 {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.0 >> 16) % bound
        }
    }

    /// A plain model of an election: the winner of each pair, where it is known.
    #[derive(Clone)]
    struct Plain {
        classes: usize,
        known: Vec<Option<usize>>,
    }

    impl Plain {
        fn pairs(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
            let classes = self.classes;
            (0..classes).flat_map(move |i| (i + 1..classes).map(move |j| (i, j)))
        }

        /// Votes of each class, and its open pairs.
        fn count(&self) -> (Vec<u32>, Vec<u32>) {
            let mut counts = (vec![0; self.classes], vec![0; self.classes]);
            for ((i, j), known) in self.pairs().zip(&self.known) {
                match known {
                    Some(class) => counts.0[*class] += 1,
                    None => [i, j].into_iter().for_each(|class| counts.1[class] += 1),
                }
            }
            counts
        }

        /// The first class with the most votes, as LIBSVM looks for it.
        fn winner(&self) -> usize {
            let (votes, _) = self.count();
            let most = votes.iter().max().copied();
            votes.iter().position(|&votes| Some(votes) == most).unwrap()
        }

        /// Whether a pair can change the winner: one of the two does not lead, and would lead with
        /// all its open pairs.
        fn may_hang_on(&self, pair: [usize; 2]) -> bool {
            let (votes, open) = self.count();
            let leader = self.winner();
            pair.into_iter().any(|class| {
                let most = votes[class] + open[class];
                class != leader
                    && (most > votes[leader] || (most == votes[leader] && class < leader))
            })
        }

        fn votes(&self) -> Votes {
            let mut votes = Votes::default();
            // Values of an earlier image.
            votes.clear(self.classes + 1);
            votes.leave_open(0, self.classes);
            votes.clear(self.classes);
            for ((i, j), known) in self.pairs().zip(&self.known) {
                match known {
                    Some(class) => votes.vote(*class),
                    None => votes.leave_open(i, j),
                }
            }
            votes
        }
    }

    #[test]
    fn pairs_are_numbered_row_by_row() {
        for classes in [2, 3, 7] {
            let all = (0..classes).flat_map(|i| (i + 1..classes).map(move |j| (i, j)));
            for (place, (i, j)) in all.clone().enumerate() {
                assert_eq!(pair(classes, i, j), place);
            }
            assert_eq!(pairs(classes), all.count());
        }
    }

    /// With any votes open, the winner is the same as with all votes counted, and only decisive
    /// pairs are computed.
    #[test]
    fn finds_the_winner_and_computes_only_decisive_pairs() {
        let mut noise = Noise(1);
        let mut asked = 0;
        for round in 0..3000 {
            let classes = if round % 1000 == 0 { 70 } else { 2 + noise.below(6) as usize };
            let openness = noise.below(9);
            // In some elections the first classes win more often, in others all are close.
            let bias = noise.below(5);
            let truth: Vec<usize> = (0..classes)
                .flat_map(|i| (i + 1..classes).map(move |j| (i, j)))
                .map(|(i, j)| if noise.below(8) < 4 + bias { i } else { j })
                .collect();
            let known: Vec<_> =
                truth.iter().map(|&class| (noise.below(8) >= openness).then_some(class)).collect();
            let whole = Plain { classes, known: truth.iter().copied().map(Some).collect() };
            let mut partly = Plain { classes, known };
            let mut votes = partly.votes();
            let all = partly.votes().count(|i, j| truth[pair(classes, i, j)] == i).to_vec();
            assert_eq!(all, whole.count().0);
            let winner = votes.winner(|i, j| {
                asked += 1;
                assert!(
                    i < j && partly.may_hang_on([i, j]),
                    "{i} and {j} were asked about in vain"
                );
                let place = pair(classes, i, j);
                assert_eq!(partly.known[place].replace(truth[place]), None);
                truth[place] == i
            });
            assert_eq!(winner, whole.winner());
            assert_eq!(votes.count(|i, j| truth[pair(classes, i, j)] == i), whole.count().0);
        }
        assert!(asked > 1000, "only {asked} pairs were in doubt");
    }

    #[test]
    fn skips_a_pair_that_cannot_change_the_winner() {
        let mut votes = Votes::default();
        votes.clear(4);
        // Class 2 beats all; the order of the others does not matter.
        for _ in 0..3 {
            votes.vote(2);
        }
        votes.leave_open(0, 1);
        votes.leave_open(0, 3);
        votes.leave_open(1, 3);
        assert_eq!(votes.winner(|_, _| panic!("asked")), 2);
    }

    /// Half a million open pairs: a search through all of them for each pair would not end.
    #[test]
    fn many_open_pairs_take_no_longer_than_counting_them() {
        let classes = 1000;
        for turn in 0..3 {
            let mut votes = Votes::default();
            votes.clear(classes);
            for i in 0..classes {
                for j in i + 1..classes {
                    votes.leave_open(i, j);
                }
            }
            let mut asked = 0;
            // Always the first wins, always the second, or the second half beats the first by one
            // vote each.
            let winner = votes.winner(|i, j| {
                asked += 1;
                turn == 0 || (turn == 2 && (j - i) * 2 < classes)
            });
            assert_eq!(winner, [0, classes - 1, classes / 2][turn]);
            assert!(asked <= pairs(classes));
        }
    }
}
