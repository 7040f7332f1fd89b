//! A load thread: the connections that are its own, and the phases they go through.
//!
//! It goes round: send what is due and has room, wait for replies, judge them. A closed loop on one
//! connection waits inside the read; otherwise the thread waits in `poll`, and for the last
//! microseconds before a request is due it does not sleep at all, because sleeping is not exact.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::channel::Wait;
use crate::connection::Connection;
use crate::error::BenchError;
use crate::lane::{Lane, Task};
use crate::plan::{Mode, Plan, Span, Target};
use crate::report::ThreadUse;
use crate::schedule::Schedule;
use crate::tally::Tally;
use crate::timeline::Timeline;
use crate::workload::{Draw, Fresh, Pattern};

/// How long before a request is due a thread stops sleeping and looks at the clock instead. A
/// wake-up from sleep takes this long on a machine that is not busy.
const SPIN: Duration = Duration::from_micros(60);

/// How long a thread sleeps at most. Time limits are noticed this late.
const TICK: Duration = Duration::from_millis(50);

/// The first length of a timeline's intervals: shorter ones hold too few answers for percentiles.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// As many intervals are aimed at when it is known how long a measurement goes on.
const INTERVALS: u32 = 100;

/// What a load thread tells the others while it works. A cache line (or two) of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Live {
    pub(crate) answered: AtomicU64,
    pub(crate) wrong: AtomicU64,
    pub(crate) measuring: AtomicBool,
}

/// What all load threads of a run have in common.
pub(crate) struct Crew<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) pattern: &'a Pattern,
    /// What all times are counted from.
    pub(crate) epoch: Instant,
    /// Where they meet before the measurement.
    pub(crate) barrier: Barrier,
    /// Classes of the server's model; 0 for none.
    pub(crate) classes: u32,
    /// Makes this run's fresh images others than the last run's.
    pub(crate) nonce: u64,
}

/// A load thread from its first to its last moment.
pub(crate) fn work(
    crew: &Crew<'_>,
    number: usize,
    share: Vec<(u32, Connection)>,
    live: &Live,
) -> Result<(Tally, ThreadUse), BenchError> {
    let Crew { plan, pattern, epoch, barrier, .. } = crew;
    // Every thread must come to the barrier, whatever happens to it.
    let pinned = pin(plan, number);
    let clock = move || epoch.elapsed().as_nanos() as u64;
    let lane = |(number, connection)| {
        let idle = task(plan, pattern.draw(plan.seed, number, lanes(plan)));
        Lane::new(connection, plan, idle, crew.classes, Fresh::new(number, crew.nonce))
    };
    let mut worker = Worker {
        numbers: share.iter().map(|(lane, _)| *lane).collect(),
        lanes: share.into_iter().map(lane).collect(),
        plan,
        tally: Tally::default(),
        live,
        clock,
        cut_ns: None,
    };
    if pinned.is_ok() {
        worker.prefill();
        worker.phase(plan.warmup);
        worker.tally.forget_measurements();
    }
    barrier.wait();
    pinned?;
    live.answered.store(0, Ordering::Relaxed);
    live.measuring.store(true, Ordering::Relaxed);
    let (started, cpu_before, before_ns) = (SystemTime::now(), thread_cpu(), (worker.clock)());
    worker.tally.timeline = Timeline::new(before_ns, nanos(interval(plan.stop)));
    let measured = worker.phase(plan.stop);
    let used = ThreadUse {
        started,
        measured,
        interrupted: worker.cut_ns.is_some(),
        wall: Duration::from_nanos((worker.clock)() - before_ns),
        cpu: thread_cpu().saturating_sub(cpu_before),
    };
    Ok((worker.tally, used))
}

/// How long the intervals of a measurement's timeline are at first.
fn interval(stop: Span) -> Duration {
    match stop {
        Span::Time(time) => (time / INTERVALS).max(MIN_INTERVAL),
        Span::Requests(_) => MIN_INTERVAL,
    }
}

fn lanes(plan: &Plan) -> u32 {
    u32::try_from(plan.connections).expect("connections are far fewer than 2³²")
}

/// So many of 2³², for a share from 0 to 1.
fn in_2_32(share: f64) -> u64 {
    (share * (1u64 << 32) as f64) as u64
}

/// A task that asks for nothing yet.
fn task(plan: &Plan, draw: Draw) -> Task {
    let reads_in_2_32 = match &plan.target {
        Target::Classify { .. } => 1 << 32,
        Target::Cache(keys) => in_2_32(keys.read_share),
    };
    Task {
        draw,
        reads_in_2_32,
        known_in_2_32: plan.hit_ratio.map_or(1 << 32, in_2_32),
        quota: 0,
        start_ns: 0,
        end_ns: u64::MAX,
        schedule: None,
        give_up_ns: u64::MAX,
    }
}

struct Worker<'a, C> {
    plan: &'a Plan,
    lanes: Vec<Lane>,
    numbers: Vec<u32>,
    tally: Tally,
    live: &'a Live,
    clock: C,
    /// When the run was cancelled.
    cut_ns: Option<u64>,
}

impl<C: Fn() -> u64> Worker<'_, C> {
    /// Asks about every image once, or writes every key once, as fast as that goes.
    fn prefill(&mut self) {
        if !self.plan.prefill {
            return;
        }
        let once = Pattern::each_once(self.plan.subjects());
        let start_ns = (self.clock)();
        let mut ordinary = Vec::new();
        for (lane, &number) in self.lanes.iter_mut().zip(&self.numbers) {
            let plan = self.plan;
            let each_once = once.draw(plan.seed, number, lanes(plan));
            ordinary.push(lane.task.clone());
            let reads_in_2_32 = match plan.target {
                Target::Classify { .. } => 1 << 32,
                Target::Cache(_) => 0,
            };
            let quota = u64::MAX;
            let known_in_2_32 = 1 << 32;
            let task = task(plan, each_once);
            lane.begin(Task { reads_in_2_32, known_in_2_32, quota, start_ns, ..task });
        }
        self.go_round();
        for (lane, task) in self.lanes.iter_mut().zip(ordinary) {
            lane.task = task;
        }
    }

    /// Sends what `span` says, waits for the answers, and returns how long it took: not longer than
    /// a time span, even if the last answers come after it.
    fn phase(&mut self, span: Span) -> Duration {
        let plan = self.plan;
        let start_ns = (self.clock)();
        let timeout_ns = nanos(plan.timeout);
        for (lane, &number) in self.lanes.iter_mut().zip(&self.numbers) {
            let (quota, end_ns) = match span {
                Span::Time(time) => (u64::MAX, start_ns.saturating_add(nanos(time))),
                // The first lanes take one more each when the lanes do not divide the requests.
                Span::Requests(all) => {
                    let lanes = u64::from(lanes(plan));
                    (all / lanes + u64::from(u64::from(number) < all % lanes), u64::MAX)
                }
            };
            let schedule = match plan.mode {
                Mode::Closed => None,
                Mode::Open { rate, arrivals } => {
                    Some(Schedule::new(rate, arrivals, start_ns, plan.seed, number, lanes(plan)))
                }
            };
            lane.begin(Task {
                quota,
                start_ns,
                end_ns,
                schedule,
                give_up_ns: end_ns.saturating_add(timeout_ns),
                ..lane.task.clone()
            });
        }
        if let Some(cut_ns) = self.cut_ns {
            self.lanes.iter_mut().for_each(|lane| lane.cut(cut_ns));
        }
        let last_ns = self.go_round();
        for lane in &mut self.lanes {
            lane.finish(&mut self.tally);
        }
        self.tally.settle();
        let until_cut_ns = self.cut_ns.map_or(u64::MAX, |cut_ns| cut_ns.saturating_sub(start_ns));
        let ended_ns = match span {
            // The clock goes on between the last arrival and the end.
            Span::Time(time) if self.lanes.iter().any(Lane::ran_its_time) => nanos(time),
            Span::Time(time) => nanos(time).min(last_ns.saturating_sub(start_ns)),
            Span::Requests(_) => last_ns.saturating_sub(start_ns),
        };
        Duration::from_nanos(ended_ns.min(until_cut_ns))
    }

    /// Goes round until every lane is done. Returns when the last bytes came.
    fn go_round(&mut self) -> u64 {
        let timeout_ns = nanos(self.plan.timeout);
        let mut last_ns = (self.clock)();
        let mut look_after_ns = last_ns;
        loop {
            for lane in &mut self.lanes {
                lane.send(&self.plan.target, &mut self.tally, &self.clock);
            }
            if self.lanes.iter().all(Lane::is_done) {
                return last_ns;
            }
            if self.wait_and_receive() {
                last_ns = (self.clock)();
            }
            let now_ns = (self.clock)();
            if now_ns >= look_after_ns {
                if self.cut_ns.is_none() && self.plan.cancel.is_cancelled() {
                    self.cut_ns = Some(now_ns);
                    self.lanes.iter_mut().for_each(|lane| lane.cut(now_ns));
                }
                for lane in &mut self.lanes {
                    lane.give_up(now_ns.saturating_sub(timeout_ns), &mut self.tally);
                }
                self.tell();
                look_after_ns = now_ns + nanos(TICK);
            }
        }
    }

    /// Waits until there is something to do, and reads what has come. Returns whether anything has.
    fn wait_and_receive(&mut self) -> bool {
        let (target, tally, clock) = (&self.plan.target, &mut self.tally, &self.clock);
        let due_ns = self.lanes.iter().filter_map(Lane::next_due).min();
        let sleep = due_ns.map(|due_ns| Duration::from_nanos(due_ns.saturating_sub(clock())));
        if let [lane] = &mut self.lanes[..]
            && lane.is_alive()
            && !lane.connection().has_output()
        {
            match sleep {
                None => return lane.receive(Wait::Some, target, tally, clock) > 0,
                Some(sleep) if sleep < SPIN => {
                    return lane.receive(Wait::No, target, tally, clock) > 0;
                }
                Some(_) => {}
            }
        }
        let sleep = sleep.map_or(TICK, |sleep| sleep.saturating_sub(SPIN).min(TICK));
        let ready: Vec<bool> = {
            let mut fds: Vec<PollFd<'_>> = self
                .lanes
                .iter()
                .filter(|lane| lane.is_alive())
                .map(|lane| {
                    let output = lane.connection().has_output();
                    let out = if output { PollFlags::OUT } else { PollFlags::empty() };
                    PollFd::new(lane.connection(), PollFlags::IN | out)
                })
                .collect();
            let timeout =
                Timespec { tv_sec: sleep.as_secs() as i64, tv_nsec: sleep.subsec_nanos().into() };
            // An error here is an interrupting signal: the next round polls again.
            let _ = poll(&mut fds, Some(&timeout));
            fds.iter().map(|fd| fd.revents().intersects(!PollFlags::OUT)).collect()
        };
        let mut any = false;
        for (lane, ready) in self.lanes.iter_mut().filter(|lane| lane.is_alive()).zip(ready) {
            if ready {
                any |= lane.receive(Wait::No, target, tally, clock) > 0;
            }
        }
        any
    }

    /// Tells the watching thread how far this one is.
    fn tell(&mut self) {
        self.tally.settle();
        let answers: u64 = self.tally.latencies.iter().map(|l| l.from_due.len()).sum();
        let answered = answers + self.tally.counts.writes_confirmed;
        self.live.answered.store(answered, Ordering::Relaxed);
        self.live.wrong.store(self.tally.wrong + self.tally.unexpected, Ordering::Relaxed);
    }
}

/// Ties this thread to the CPU that the plan has for it.
fn pin(plan: &Plan, thread: usize) -> Result<(), BenchError> {
    let Some(&cpu) = plan.pin.get(thread % plan.pin.len().max(1)) else {
        return Ok(());
    };
    if cpu >= CpuSet::MAX_CPU {
        return Err(BenchError::Pin { cpu, source: std::io::ErrorKind::InvalidInput.into() });
    }
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).map_err(|errno| BenchError::Pin { cpu, source: errno.into() })
}

/// The CPU time that this thread has used.
fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
