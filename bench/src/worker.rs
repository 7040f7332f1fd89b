//! A load thread: its connections, and the phases of its run.
//!
//! The thread sends the requests that are due, waits for replies, and checks them, in a loop. A
//! closed loop on one connection waits inside the read. Otherwise the thread waits in `poll`. It
//! does not sleep in the last microseconds before a request is due, because sleeping is not exact.

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

/// The time before a due request in which a thread reads the clock instead of sleeping. A wake-up
/// takes about this long on an idle machine.
const SPIN: Duration = Duration::from_micros(60);

/// The longest sleep of a thread. Time limits are noticed at most this late.
const TICK: Duration = Duration::from_millis(50);

/// The first length of a timeline's intervals. Shorter intervals have too few answers for
/// percentiles.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// The number of intervals for a measurement of known length.
const INTERVALS: u32 = 100;

/// The progress of a load thread, for the other threads. It has a cache line (or two) of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Live {
    pub(crate) answered: AtomicU64,
    pub(crate) wrong: AtomicU64,
    pub(crate) measuring: AtomicBool,
}

/// The shared state of all load threads of a run.
pub(crate) struct Crew<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) pattern: &'a Pattern,
    /// The zero of all times.
    pub(crate) epoch: Instant,
    /// The barrier before the measurement.
    pub(crate) barrier: Barrier,
    /// The number of classes of the server's model; 0 for none.
    pub(crate) classes: u32,
    /// A number that makes the fresh images of this run differ from those of other runs.
    pub(crate) nonce: u64,
}

/// Runs a load thread from start to end.
pub(crate) fn work(
    crew: &Crew<'_>,
    number: usize,
    share: Vec<(u32, Connection)>,
    live: &Live,
) -> Result<(Tally, ThreadUse), BenchError> {
    let Crew { plan, pattern, epoch, barrier, .. } = crew;
    // Every thread must reach the barrier, also after an error.
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

/// The first length of the intervals of a measurement's timeline.
fn interval(stop: Span) -> Duration {
    match stop {
        Span::Time(time) => (time / INTERVALS).max(MIN_INTERVAL),
        Span::Requests(_) => MIN_INTERVAL,
    }
}

fn lanes(plan: &Plan) -> u32 {
    u32::try_from(plan.connections).expect("connections are far fewer than 2³²")
}

/// A share from 0 to 1, in units of 2⁻³².
fn in_2_32(share: f64) -> u64 {
    (share * (1u64 << 32) as f64) as u64
}

/// A task that does not send anything yet.
fn task(plan: &Plan, draw: Draw) -> Task {
    let reads_in_2_32 = match &plan.target {
        Target::Classify { .. } | Target::Call(_) => 1 << 32,
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
    /// The time at which the run was cancelled.
    cut_ns: Option<u64>,
}

impl<C: Fn() -> u64> Worker<'_, C> {
    /// Sends every image once, or writes every key once, as fast as possible.
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
                Target::Classify { .. } | Target::Call(_) => 1 << 32,
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

    /// Sends the requests of `span`, waits for the answers, and returns the elapsed time. That is
    /// at most the length of a time span, even if the last answers arrive later.
    fn phase(&mut self, span: Span) -> Duration {
        let plan = self.plan;
        let start_ns = (self.clock)();
        let timeout_ns = nanos(plan.timeout);
        for (lane, &number) in self.lanes.iter_mut().zip(&self.numbers) {
            let (quota, end_ns) = match span {
                Span::Time(time) => (u64::MAX, start_ns.saturating_add(nanos(time))),
                // If the lanes do not divide the requests evenly, the first lanes take one more.
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
            // The clock runs on between the last arrival and the end.
            Span::Time(time) if self.lanes.iter().any(Lane::ran_its_time) => nanos(time),
            Span::Time(time) => nanos(time).min(last_ns.saturating_sub(start_ns)),
            Span::Requests(_) => last_ns.saturating_sub(start_ns),
        };
        Duration::from_nanos(ended_ns.min(until_cut_ns))
    }

    /// Repeats the loop until every lane is done. Returns the time of the last received bytes.
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

    /// Waits for an event and reads the received bytes. Returns whether there were any.
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
            // An error here is a signal that interrupted the call: the next iteration polls again.
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

    /// Publishes the progress of this thread for the watching thread.
    fn tell(&mut self) {
        self.tally.settle();
        let answers: u64 = self.tally.latencies.iter().map(|l| l.from_due.len()).sum();
        let answered = answers + self.tally.counts.writes_confirmed;
        self.live.answered.store(answered, Ordering::Relaxed);
        self.live.wrong.store(self.tally.wrong + self.tally.unexpected, Ordering::Relaxed);
    }
}

/// Pins this thread to its CPU in the plan.
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

/// The CPU time of this thread.
fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
