//! The compute engine with doubles for the model and the caller. Every test counts the replies.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_classifier::{
    Engine, EngineError, EngineOptions, Job, Labelled, MAX_LINGER, Model, Scorer, Scratch, Shape,
};
use afterimage_core::{Reply, Sink, Wanted};

type Answers = Receiver<(u16, Result<u16, EngineError>)>;

/// A scorer of one-byte images: the label is the byte, and [`PANICS`] panics.
struct Echo {
    /// Holds a batch until the sender sends or is dropped.
    gate: Mutex<Option<Receiver<()>>>,
    batches: Mutex<Vec<usize>>,
}

const PANICS: u8 = 250;

impl Echo {
    fn free() -> Arc<Self> {
        Arc::new(Self { gate: Mutex::new(None), batches: Mutex::default() })
    }

    fn gated() -> (Arc<Self>, Sender<()>) {
        let (open, gate) = channel();
        (Arc::new(Self { gate: Mutex::new(Some(gate)), batches: Mutex::default() }), open)
    }
}

impl Scorer for Echo {
    fn shape(&self) -> Shape {
        Shape::new(&[1]).unwrap()
    }

    fn label(&self, images: &[&[u8]], _: &mut Scratch, labels: &mut [u16]) {
        self.batches.lock().unwrap().push(images.len());
        let gate = self.gate.lock().unwrap().take();
        if let Some(gate) = gate {
            let _ = gate.recv();
            *self.gate.lock().unwrap() = Some(gate);
        }
        assert!(images.iter().all(|image| image[0] != PANICS), "made to panic");
        for (label, image) in labels.iter_mut().zip(images) {
            *label = u16::from(image[0]);
        }
    }
}

fn options(threads: usize) -> EngineOptions {
    EngineOptions { threads, max_batch: 8, max_queued: 16, linger: Duration::ZERO }
}

/// A job whose reply sends its number and the result.
fn job(number: u16, byte: u8, to: &Sender<(u16, Result<u16, EngineError>)>) -> Job {
    let to = to.clone();
    Job::new(vec![byte], move |result| to.send((number, result)).unwrap())
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(20), "waited too long");
        std::thread::yield_now();
    }
}

/// An engine whose only thread is scoring job 0 until `open` is dropped.
struct Busy {
    scorer: Arc<Echo>,
    engine: Engine,
    open: Sender<()>,
    sender: Sender<(u16, Result<u16, EngineError>)>,
    answers: Answers,
}

impl Busy {
    fn new(options: EngineOptions) -> Self {
        let (scorer, open) = Echo::gated();
        let engine = Engine::start_with(scorer.clone(), options);
        let (sender, answers) = channel();
        engine.submit(job(0, 0, &sender)).unwrap();
        wait_until(|| !scorer.batches.lock().unwrap().is_empty());
        Busy { scorer, engine, open, sender, answers }
    }
}

/// All replies, by number. They are complete when the last job, with its sender, is dropped.
fn collect(
    sender: Sender<(u16, Result<u16, EngineError>)>,
    answers: Answers,
) -> Vec<(u16, Result<u16, EngineError>)> {
    drop(sender);
    let mut all: Vec<_> = answers.iter().collect();
    all.sort_by_key(|answer| answer.0);
    all
}

#[test]
fn each_job_gets_its_answer_once_on_any_number_of_threads() {
    for threads in [1, 2, 5] {
        let engine =
            Engine::start_with(Echo::free(), EngineOptions { max_queued: 500, ..options(threads) });
        let (sender, answers) = channel();
        for i in 0..200 {
            engine.submit(job(i, i as u8, &sender)).unwrap();
        }
        assert_eq!(engine.submit_many((200..240).map(|i| job(i, i as u8, &sender))), 0);
        engine.shutdown();
        let all = collect(sender, answers);
        assert_eq!(all, (0..240).map(|i| (i, Ok(i))).collect::<Vec<_>>());
        let counters = engine.counters();
        assert_eq!((counters.scored, counters.queued), (240, 0));
        assert!(counters.batches >= 30 && counters.batches <= 240, "{counters:?}");
        assert!(!counters.busy.is_zero());
    }
}

#[test]
fn a_full_queue_refuses_at_once_with_one_reply() {
    let Busy { engine, open, sender, answers, .. } = Busy::new(options(1));
    for i in 1..=16 {
        engine.submit(job(i, i as u8, &sender)).unwrap();
    }
    let overloaded = EngineError::Overloaded { queued: 16, limit: 16 };
    assert_eq!(engine.submit(job(17, 17, &sender)), Err(overloaded.clone()));
    assert_eq!(engine.submit_many([job(18, 18, &sender), job(19, 19, &sender)]), 2);
    // Refusals are answered before anything is scored.
    let first = answers.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(first, (17, Err(overloaded.clone())));
    assert_eq!(engine.counters().overloaded, 3);
    assert_eq!(engine.counters().queued, 16);
    drop(open);
    engine.shutdown();
    let all = collect(sender, answers);
    assert_eq!(all.len(), 19);
    assert!(all[..17].iter().all(|(i, result)| *result == Ok(*i)));
    assert_eq!(all[18], (19, Err(overloaded)));
}

#[test]
fn waiting_images_are_scored_in_one_batch() {
    let Busy { scorer, engine, open, sender, answers } = Busy::new(options(1));
    assert_eq!(engine.submit_many((1..=12).map(|i| job(i, i as u8, &sender))), 0);
    drop(open);
    engine.shutdown();
    assert_eq!(collect(sender, answers).len(), 13);
    assert_eq!(*scorer.batches.lock().unwrap(), [1, 8, 4]);
}

#[test]
fn a_lone_job_waits_for_the_linger_and_not_beyond_its_cap() {
    let linger = Duration::from_secs(1000);
    let engine = Engine::start_with(Echo::free(), EngineOptions { linger, ..options(1) });
    assert_eq!(engine.options().linger, MAX_LINGER);
    let (sender, answers) = channel();
    for i in 0..20 {
        let started = Instant::now();
        engine.submit(job(i, 7, &sender)).unwrap();
        assert_eq!(answers.recv().unwrap(), (i, Ok(7)));
        assert!(started.elapsed() >= MAX_LINGER);
    }
}

#[test]
fn idle_threads_share_a_large_submission() {
    let (scorer, open) = Echo::gated();
    let engine = Engine::start_with(scorer.clone(), options(2));
    wait_until(|| engine.idle_threads() == 2);
    let (sender, answers) = channel();
    assert_eq!(engine.submit_many((0..8).map(|i| job(i, i as u8, &sender))), 0);
    wait_until(|| scorer.batches.lock().unwrap().len() == 2);
    drop(open);
    engine.shutdown();
    assert_eq!(*scorer.batches.lock().unwrap(), [4, 4]);
    assert_eq!(collect(sender, answers).len(), 8);
}

#[test]
fn an_image_past_its_deadline_is_not_scored() {
    let Busy { scorer, engine, open, sender, answers } = Busy::new(options(1));
    let now = Instant::now();
    engine.submit(job(1, 1, &sender).with_deadline(Some(now))).unwrap();
    engine.submit(job(2, 2, &sender).with_deadline(Some(now + Duration::from_secs(60)))).unwrap();
    drop(open);
    engine.shutdown();
    let all = collect(sender, answers);
    assert_eq!(all, [(0, Ok(0)), (1, Err(EngineError::DeadlineExceeded)), (2, Ok(2))]);
    assert_eq!(engine.counters().expired, 1);
    assert_eq!(*scorer.batches.lock().unwrap(), [1, 1]);
}

#[test]
fn a_client_with_one_image_is_in_the_next_batch() {
    let options = EngineOptions { max_queued: 1000, ..options(1) };
    let Busy { engine, open, sender, answers, .. } = Busy::new(options);
    assert_eq!(engine.submit_many((1..=499).map(|i| job(i, i as u8 % 200, &sender))), 0);
    engine.submit(job(1000, 7, &sender).of_client(1.into())).unwrap();
    drop(open);
    engine.shutdown();
    drop(sender);
    let at = answers.iter().position(|(number, _)| number == 1000).unwrap();
    assert!(at <= 8, "{at} images of the busy client came first");
}

#[test]
fn one_client_cannot_fill_the_queue_for_another() {
    let options = EngineOptions { max_queued: 100, ..options(1) };
    let Busy { engine, open, sender, answers, .. } = Busy::new(options);
    assert_eq!(engine.submit_many((1..=120).map(|i| job(i, 1, &sender))), 70);
    let refused = engine.submit(job(121, 1, &sender)).unwrap_err().to_string();
    assert_eq!(refused, "50 images of this client wait to be scored; its limit is 50 now");
    let other = engine.submit_many((0..16).map(|i| job(i, 1, &sender).of_client(1.into())));
    drop(open);
    assert_eq!(other, 0);
    engine.shutdown();
    drop(sender);
    assert_eq!(answers.iter().filter(|(_, result)| result.is_ok()).count(), 67);
}

#[test]
fn one_client_gets_half_of_the_default_queue() {
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    assert_eq!(options.max_queued, 32_768);
    let Busy { engine, open, sender, .. } = Busy::new(options);
    let refused = engine.submit_many((0..40_000).map(|i| job(i, 1, &sender)));
    assert_eq!(40_000 - refused, 16_384);
    let other = engine.submit_many((0..1000).map(|i| job(i, 1, &sender).of_client(1.into())));
    drop(open);
    assert_eq!(other, 0, "the other half is free");
    engine.shutdown();
}

/// A caller that leaves when its flag is set.
struct Leaves {
    left: Arc<AtomicBool>,
    number: u16,
    to: Sender<(u16, Result<u16, EngineError>)>,
}

impl Sink<Labelled> for Leaves {
    fn wanted(&self, _: u64, _: Instant) -> Wanted {
        if self.left.load(Ordering::Relaxed) { Wanted::NoMore } else { Wanted::Always }
    }

    fn deliver(&self, _: u64, result: Labelled, _: Option<Instant>) {
        self.to.send((self.number, result)).unwrap();
    }
}

#[test]
fn images_of_a_caller_that_left_are_not_scored() {
    let options = EngineOptions { max_queued: 1000, ..options(1) };
    let Busy { scorer, engine, open, sender, answers } = Busy::new(options);
    let left = Arc::default();
    let leaves = |number| {
        let caller = Leaves { left: Arc::clone(&left), number, to: sender.clone() };
        Job::with_reply(vec![1], Reply::new(Arc::new(caller), 0))
    };
    assert_eq!(engine.submit_many((1..=100).map(leaves)), 0);
    engine.submit_many((101..=116).map(|i| job(i, 1, &sender).of_client(1.into())));
    left.store(true, Ordering::Relaxed);
    drop(open);
    engine.shutdown();
    let all = collect(sender, answers);
    assert!(all[1..=100].iter().all(|(_, result)| *result == Err(EngineError::Abandoned)));
    assert!(all[101..].iter().all(|(_, result)| *result == Ok(1)));
    let counters = engine.counters();
    assert_eq!((counters.scored, counters.abandoned, counters.expired), (17, 100, 0));
    assert_eq!(*scorer.batches.lock().unwrap(), [1, 8, 8], "the client that left takes no place");
}

#[test]
fn a_panic_while_scoring_fails_only_its_image() {
    let Busy { engine, open, sender, answers, .. } = Busy::new(options(1));
    engine.submit_many([job(1, 1, &sender), job(2, PANICS, &sender), job(3, 3, &sender)]);
    drop(open);
    wait_until(|| engine.counters().scored == 3);
    // The thread still works.
    engine.submit(job(4, 4, &sender)).unwrap();
    engine.shutdown();
    let all = collect(sender, answers);
    let panicked = (2, Err(EngineError::Panicked));
    assert_eq!(all, [(0, Ok(0)), (1, Ok(1)), panicked, (3, Ok(3)), (4, Ok(4))]);
    assert_eq!(engine.counters().panicked, 1);
}

#[test]
fn a_panicking_reply_leaves_other_answers_intact() {
    let engine = Engine::start_with(Echo::free(), options(1));
    let (sender, answers) = channel();
    engine.submit_many([
        Job::new(vec![1], |_| panic!("made to panic")),
        job(2, 2, &sender),
        Job::new(vec![], |_| panic!("made to panic while refused")),
        job(3, 3, &sender),
    ]);
    engine.shutdown();
    assert_eq!(collect(sender, answers), [(2, Ok(2)), (3, Ok(3))]);
    assert_eq!(engine.counters().reply_panics, 2);
}

#[test]
fn a_panicking_wanted_check_leaves_answers_intact() {
    struct Panics(Sender<(u16, Labelled)>);
    impl Sink<Labelled> for Panics {
        fn wanted(&self, _: u64, _: Instant) -> Wanted {
            panic!("made to panic")
        }
        fn prefetch(&self, _: u64) {
            panic!("made to panic")
        }
        fn deliver(&self, _: u64, result: Labelled, _: Option<Instant>) {
            self.0.send((1, result)).unwrap();
        }
    }
    let engine = Engine::start_with(Echo::free(), options(1));
    let (sender, answers) = channel();
    engine.submit_many([
        Job::with_reply(vec![1], Reply::new(Arc::new(Panics(sender.clone())), 0)),
        job(2, 2, &sender),
        job(3, 3, &sender),
    ]);
    engine.shutdown();
    assert_eq!(collect(sender, answers), [(1, Ok(1)), (2, Ok(2)), (3, Ok(3))]);
}

#[test]
fn a_wrong_size_is_refused_with_both_sizes() {
    let engine = Engine::start(Model::raw(), options(1));
    let (sender, answers) = channel();
    let error = engine.submit(job(5, 0, &sender)).unwrap_err();
    assert_eq!(error.to_string(), "image is 1 bytes; the model takes 784 (28x28)");
    assert_eq!(collect(sender, answers), [(5, Err(error))]);
}

#[test]
fn shutdown_finishes_waiting_jobs_and_refuses_new_ones() {
    let (scorer, open) = Echo::gated();
    let engine = Arc::new(Engine::start_with(scorer.clone(), options(1)));
    let (sender, answers) = channel();
    for i in 0..10 {
        engine.submit(job(i, i as u8, &sender)).unwrap();
    }
    let closing = std::thread::spawn({
        let engine = Arc::clone(&engine);
        move || engine.shutdown()
    });
    wait_until(|| engine.is_closed());
    assert_eq!(engine.submit(job(10, 10, &sender)), Err(EngineError::ShuttingDown));
    drop(open);
    closing.join().unwrap();
    engine.shutdown();
    let all = collect(sender, answers);
    assert!(all[..10].iter().all(|(i, result)| *result == Ok(*i)));
    assert_eq!(all[10..], [(10, Err(EngineError::ShuttingDown))]);
}

#[test]
fn a_reply_may_shut_the_engine_down() {
    let engine = Arc::new(Engine::start_with(Echo::free(), options(2)));
    let (sender, answers) = channel();
    let inside = Arc::clone(&engine);
    let job = Job::new(vec![1], move |result| {
        inside.shutdown();
        sender.send(result).unwrap();
    });
    engine.submit(job).unwrap();
    assert_eq!(answers.recv().unwrap(), Ok(1));
}

#[test]
fn a_dropped_job_replies_that_it_is_lost() {
    let (sender, answers) = channel();
    drop(job(1, 1, &sender));
    assert_eq!(collect(sender, answers), [(1, Err(EngineError::Lost))]);
}

#[test]
fn labels_equal_those_of_the_model_without_an_engine() {
    let model = Model::raw();
    let engine = Engine::start(Arc::clone(&model), options(2));
    let image = |i: usize| -> Vec<u8> { (0..784).map(|p| (p * (i + 3) % 251) as u8).collect() };
    let (sender, answers) = channel();
    for i in 0..16 {
        let sender = sender.clone();
        let reply = move |result| sender.send((i as u16, result)).unwrap();
        engine.submit(Job::new(image(i), reply)).unwrap();
    }
    engine.shutdown();
    for (i, label) in collect(sender, answers) {
        assert_eq!(label, Ok(model.classify(&image(usize::from(i))).unwrap()));
    }
}
