//! The load generator itself: connections spread over threads, and the phases they go through.
//!
//! A load thread goes round: send what is due and has room, wait for replies, judge them. A closed
//! loop on one connection waits inside the read; otherwise the thread waits in `poll`, and for the
//! last microseconds before a request is due it does not sleep at all, because sleeping is not
//! exact.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_wire::proto::{Service, Welcome};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::connection::{Connection, Introduction, Wait};
use crate::lane::{Lane, Task};
use crate::plan::{BenchError, Mode, Plan, Span, Target};
use crate::report::{Report, ThreadUse};
use crate::schedule::Schedule;
use crate::tally::Tally;
use crate::workload::{Draw, Pattern};

/// How long before a request is due a thread stops sleeping and looks at the clock instead. A wake-up
/// from sleep takes this long on a machine that is not busy.
const SPIN: Duration = Duration::from_micros(60);

/// How long a thread sleeps at most. Time limits are noticed this late.
const TICK: Duration = Duration::from_millis(50);

/// How often the caller hears of a run's progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// How a run is getting on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Since the run began, warm-up included.
    pub elapsed: Duration,
    /// Whether the measurement has begun.
    pub measuring: bool,
    /// Requests of this run that were answered, errors included; starts again at 0 when the
    /// measurement begins.
    pub answered: u64,
    /// Answers a second since the last progress report.
    pub rate: f64,
    /// Answers so far that were wrong or belonged to no request.
    pub wrong: u64,
}

/// What a load thread tells the others while it works. A cache line (or two) of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Live {
    answered: AtomicU64,
    wrong: AtomicU64,
    measuring: AtomicBool,
}

/// Does what `plan` says, and tells `progress` a few times a second how it is getting on.
///
/// Blocks until the run is over. A server that stops answering or goes away ends the run early, and the
/// report says so: see [`Report::problems`].
///
/// # Errors
/// [`BenchError::Plan`] when the plan contradicts itself; `Connect`, `Refused`, `Protocol`, `Service` and
/// `Shape` when the server is not the one it was made for; `Pin` when a CPU is not there;
/// [`BenchError::Wrong`], with the report inside, when an answer was wrong.
pub fn run(plan: &Plan, progress: &mut dyn FnMut(Progress)) -> Result<Report, BenchError> {
    plan.validate()?;
    let pattern = &Pattern::new(plan.access, plan.subjects())
        .ok_or_else(|| BenchError::Plan { what: format!("no order is {:?}", plan.access) })?;
    let epoch = Instant::now();
    let mut server = None;
    let mut shares: Vec<Vec<(u32, Connection)>> = (0..plan.threads).map(|_| Vec::new()).collect();
    for lane in 0..plan.connections {
        let (connection, introduction) =
            Connection::open(plan.addr, plan.dialect, &plan.token, plan.timeout)?;
        if let Introduction::Welcome(welcome) = &introduction {
            check_welcome(plan, welcome)?;
        }
        server.get_or_insert(introduction);
        let lane_number = u32::try_from(lane).expect("connections are far fewer than 2³²");
        shares[lane % plan.threads].push((lane_number, connection));
    }
    let live: Vec<Live> = (0..plan.threads).map(|_| Live::default()).collect();
    let barrier = Barrier::new(plan.threads);
    let (barrier, live) = (&barrier, &live[..]);
    let outcomes: Vec<Result<Share, BenchError>> = thread::scope(|scope| {
        let threads: Vec<_> = shares
            .into_iter()
            .enumerate()
            .map(|(number, share)| {
                scope.spawn(move || {
                    work(plan, pattern, number, share, epoch, &live[number], barrier)
                })
            })
            .collect();
        watch(epoch, live, progress, || threads.iter().all(|thread| thread.is_finished()));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut tally = Tally::default();
    let mut uses = Vec::new();
    for outcome in outcomes {
        let share = outcome?;
        tally.add(share.tally);
        uses.push(share.used);
    }
    let report = Report::new(plan, server, tally, uses);
    if report.wrong > 0 || report.unexpected > 0 {
        return Err(BenchError::Wrong(Box::new(report)));
    }
    Ok(report)
}

/// What a load thread hands back.
struct Share {
    tally: Tally,
    used: ThreadUse,
}

/// A load thread from its first to its last moment.
fn work(
    plan: &Plan,
    pattern: &Pattern,
    number: usize,
    share: Vec<(u32, Connection)>,
    epoch: Instant,
    live: &Live,
    barrier: &Barrier,
) -> Result<Share, BenchError> {
    // Every thread must come to the barrier, whatever happens to it.
    let pinned = pin(plan, number);
    let clock = move || epoch.elapsed().as_nanos() as u64;
    let idle = |lane| {
        let draw = pattern.draw(plan.seed, lane, lanes(plan));
        task(plan, draw)
    };
    let mut worker = Worker {
        numbers: share.iter().map(|(lane, _)| *lane).collect(),
        lanes: share
            .into_iter()
            .map(|(lane, connection)| Lane::new(connection, plan, idle(lane)))
            .collect(),
        plan,
        tally: Tally::default(),
        live,
        clock,
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
    let (cpu_before, before_ns) = (thread_cpu(), (worker.clock)());
    let measured = worker.phase(plan.stop);
    let used = ThreadUse {
        measured,
        wall: Duration::from_nanos((worker.clock)() - before_ns),
        cpu: thread_cpu().saturating_sub(cpu_before),
    };
    Ok(Share { tally: worker.tally, used })
}

fn lanes(plan: &Plan) -> u32 {
    u32::try_from(plan.connections).expect("connections are far fewer than 2³²")
}

/// A task that asks for nothing yet.
fn task(plan: &Plan, draw: Draw) -> Task {
    let reads_in_2_32 = match &plan.target {
        Target::Classify { .. } => 1 << 32,
        Target::Cache(keys) => (keys.read_share * (1u64 << 32) as f64) as u64,
    };
    Task {
        draw,
        reads_in_2_32,
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
            lane.begin(Task { reads_in_2_32, quota, start_ns, ..task(plan, each_once) });
        }
        self.go_round();
        for (lane, task) in self.lanes.iter_mut().zip(ordinary) {
            lane.task = task;
        }
    }

    /// Sends what `span` says, waits for the answers, and returns how long it took: not longer than a
    /// time span, even if the last answers come after it.
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
        let last_ns = self.go_round();
        for lane in &mut self.lanes {
            lane.finish(&mut self.tally);
        }
        self.tally.settle();
        let ended_ns = match span {
            // The clock goes on between the last arrival and the end.
            Span::Time(time) if self.lanes.iter().any(Lane::ran_its_time) => nanos(time),
            Span::Time(time) => nanos(time).min(last_ns.saturating_sub(start_ns)),
            Span::Requests(_) => last_ns.saturating_sub(start_ns),
        };
        Duration::from_nanos(ended_ns)
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

/// Passes on what the threads tell, until they are done.
fn watch(
    epoch: Instant,
    live: &[Live],
    progress: &mut dyn FnMut(Progress),
    done: impl Fn() -> bool,
) {
    let (mut last, mut last_answered) = (Instant::now(), 0);
    while !done() {
        thread::sleep(Duration::from_millis(5));
        let since = last.elapsed();
        if since < PROGRESS_EVERY {
            continue;
        }
        let answered = live.iter().map(|live| live.answered.load(Ordering::Relaxed)).sum();
        progress(Progress {
            elapsed: epoch.elapsed(),
            measuring: live.iter().all(|live| live.measuring.load(Ordering::Relaxed)),
            answered,
            rate: answered.saturating_sub(last_answered) as f64 / since.as_secs_f64(),
            wrong: live.iter().map(|live| live.wrong.load(Ordering::Relaxed)).sum(),
        });
        (last, last_answered) = (Instant::now(), answered);
    }
}

fn check_welcome(plan: &Plan, welcome: &Welcome) -> Result<(), BenchError> {
    let (addr, service) = (plan.addr, welcome.service);
    let fits = match &plan.target {
        Target::Classify { .. } => service.classifies(),
        Target::Cache(_) => service == Service::Cache,
    };
    if !fits {
        return Err(BenchError::Service { addr, service });
    }
    if let Target::Classify { population, .. } = &plan.target {
        let image_len = population.image_len();
        if welcome.shape.byte_len().is_some_and(|len| len != image_len) {
            let shape = welcome.shape.clone();
            return Err(BenchError::Shape { addr, shape, image_len });
        }
    }
    Ok(())
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
