//! The numbers of SplitMix64.

use afterimage_wire::splitmix::SplitMix64;

#[test]
fn numbers_are_those_of_the_reference() {
    // The first of the authors' splitmix64.c from the state 1234567.
    let mut random = SplitMix64(1_234_567);
    let numbers = [(); 3].map(|()| random.number());
    assert_eq!(
        numbers,
        [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
    );
}

#[test]
fn bounds_and_shares_are_kept_to_and_used() {
    let mut random = SplitMix64(7);
    let mut seen = [0; 10];
    for _ in 0..10_000 {
        seen[random.index(10)] += 1;
        assert!((0.0..1.0).contains(&random.share()) && random.below(3) < 3);
    }
    assert!(seen.iter().all(|&count| count > 800), "{seen:?}");
}
