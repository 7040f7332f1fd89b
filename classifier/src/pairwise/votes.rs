//! Votes of pairs of classes, some of which nobody has counted yet.

/// The place of the pair `first < second` of `classes` among all pairs: (0, 1), (0, 2), … (1, 2), …
pub(super) fn pair(classes: usize, first: usize, second: usize) -> usize {
    first * (2 * classes - first - 1) / 2 + second - first - 1
}

/// The number of pairs.
pub(super) fn pairs(classes: usize) -> usize {
    classes * (classes - 1) / 2
}

/// Who wins: the class with most votes, of equals the first, as in LIBSVM.
#[derive(Debug, Default)]
pub(super) struct Votes {
    votes: Vec<u32>,
    /// Pairs whose vote is not known, and how many of them each class is in.
    open: Vec<(u32, u32)>,
    open_of: Vec<u32>,
}

impl Votes {
    pub(super) fn clear(&mut self, classes: usize) {
        self.open.clear();
        for counts in [&mut self.votes, &mut self.open_of] {
            counts.clear();
            counts.resize(classes, 0);
        }
    }

    pub(super) fn vote(&mut self, class: usize) {
        self.votes[class] += 1;
    }

    pub(super) fn leave_open(&mut self, first: usize, second: usize) {
        // Classes are at most 65,535.
        self.open.push((first as u32, second as u32));
        self.open_of[first] += 1;
        self.open_of[second] += 1;
    }

    /// The winner. `decide` says which of a pair gets its vote (true: the first); it is asked about those open pairs
    /// alone that the winner may hang on.
    pub(super) fn winner(&mut self, mut decide: impl FnMut(usize, usize) -> bool) -> usize {
        while let Some(at) = self.decisive() {
            let (first, second) = self.open.swap_remove(at);
            let (first, second) = (first as usize, second as usize);
            self.open_of[first] -= 1;
            self.open_of[second] -= 1;
            self.vote(if decide(first, second) { first } else { second });
        }
        self.leader()
    }

    /// Decides all open pairs and returns the votes.
    pub(super) fn count(&mut self, mut decide: impl FnMut(usize, usize) -> bool) -> &[u32] {
        while let Some((first, second)) = self.open.pop() {
            let (first, second) = (first as usize, second as usize);
            self.vote(if decide(first, second) { first } else { second });
        }
        &self.votes
    }

    /// The place of an open pair on which the winner hangs.
    fn decisive(&self) -> Option<usize> {
        if self.open.is_empty() {
            return None;
        }
        let leader = self.leader();
        let lead = (self.votes[leader], std::cmp::Reverse(leader));
        let can_win = |class: usize| {
            (self.votes[class] + self.open_of[class], std::cmp::Reverse(class)) > lead
        };
        // An open pair of the leader can only gain it a vote; it matters where the other could get past it.
        let rival = (0..self.votes.len()).find(|&class| class != leader && can_win(class))?;
        self.open
            .iter()
            .position(|&(first, second)| [first as usize, second as usize].contains(&rival))
    }

    fn leader(&self) -> usize {
        let mut leader = 0;
        for (class, votes) in self.votes.iter().enumerate() {
            if *votes > self.votes[leader] {
                leader = class;
            }
        }
        leader
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// Whatever is left open, the winner is the one that full knowledge has.
    #[test]
    fn the_winner_is_that_of_all_votes_and_only_decisive_pairs_are_asked_about() {
        let mut state = 1_u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let mut asked = 0;
        for _ in 0..3000 {
            let classes = 2 + next() as usize % 6;
            let openness = next() % 8;
            let truth: Vec<bool> = (0..pairs(classes)).map(|_| next() % 2 == 0).collect();
            let (mut known, mut partly) = (Votes::default(), Votes::default());
            known.clear(classes);
            partly.clear(classes);
            for i in 0..classes {
                for j in i + 1..classes {
                    let winner = if truth[pair(classes, i, j)] { i } else { j };
                    known.vote(winner);
                    if next() % 8 < openness {
                        partly.leave_open(i, j);
                    } else {
                        partly.vote(winner);
                    }
                }
            }
            let expected = known.winner(|_, _| unreachable!("nothing is open"));
            let decide = |i: usize, j: usize| {
                asked += 1;
                truth[pair(classes, i, j)]
            };
            assert_eq!(partly.winner(decide), expected);
            assert_eq!(partly.count(|i, j| truth[pair(classes, i, j)]), known.votes);
        }
        assert!(asked > 1000);
    }

    #[test]
    fn an_open_pair_that_cannot_change_the_winner_is_not_asked_about() {
        let mut votes = Votes::default();
        votes.clear(4);
        // Class 2 beats all; who is next does not matter.
        for _ in 0..3 {
            votes.vote(2);
        }
        votes.leave_open(0, 1);
        votes.leave_open(0, 3);
        votes.leave_open(1, 3);
        assert_eq!(votes.winner(|_, _| panic!("asked")), 2);
    }
}
