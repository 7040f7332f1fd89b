//! A connection with its requests in flight and its task.

mod judge;

use std::collections::VecDeque;

use afterimage_wire::proto::Message;
use afterimage_wire::proto::message::{put_cache_read, put_cache_write, put_classify_req};

use judge::Judge;

use crate::channel::{Lost, Wait};
use crate::connection::Connection;
use crate::dialect::Dialect;
use crate::dialect::ordered::Ordered;
use crate::flight::{Asked, InFlight, Request, WRITE_ID};
use crate::plan::{Plan, Target};
use crate::schedule::Schedule;
use crate::tally::Tally;
use crate::workload::{Draw, Fresh};

/// Bytes that are encoded before the hand-over to the kernel: the server can start while the rest
/// of a deep window is encoded, and the buffer stays in the L2 cache. CPU time per 800-byte request
/// at depth 1024: 272 ns with 32 KiB, 218 with 64, 211 with 128, 185
/// with 256.
const CHUNK: usize = 256 << 10;

/// The task of a lane in one phase of a run.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) draw: Draw,
    /// Of 2³² requests to a cache, this number reads.
    pub(crate) reads_in_2_32: u64,
    /// Of 2³² reads, this number is from the population; the others use new images or keys.
    pub(crate) known_in_2_32: u64,
    /// Requests that may still be sent.
    pub(crate) quota: u64,
    pub(crate) start_ns: u64,
    /// No request is due at or after this time.
    pub(crate) end_ns: u64,
    /// The arrivals of an open loop.
    pub(crate) schedule: Option<Schedule>,
    /// After this time nothing is sent any more, due or not.
    pub(crate) give_up_ns: u64,
}

/// A connection, its requests in flight, and its task.
#[derive(Debug)]
pub(crate) struct Lane {
    connection: Connection,
    flight: InFlight,
    /// The open requests of a server that answers in order.
    ordered: Option<Ordered>,
    /// The open calls of an HTTP server, in the order of their answers.
    calls: VecDeque<u64>,
    /// The server sends requests back.
    echo: bool,
    /// Classes of the server's model.
    classes: u32,
    fresh: Fresh,
    depth: usize,
    /// Requests that count against the depth: reads in flight, and writes not confirmed yet.
    open: usize,
    /// Writes after the last request with a reply.
    loose_writes: u32,
    pub(crate) task: Task,
    /// When the last replies came: a closed loop's next requests are due then.
    room_since_ns: u64,
    /// Until when the window or the kernel's buffer was full.
    full_until_ns: u64,
    /// The kernel's buffer was full after the last hand-over.
    is_blocked: bool,
    /// The task has no more requests.
    exhausted: bool,
    /// The server has sent a GoAway.
    goaway: bool,
    lost: bool,
}

impl Lane {
    pub(crate) fn new(
        connection: Connection,
        plan: &Plan,
        task: Task,
        classes: u32,
        fresh: Fresh,
    ) -> Self {
        let Plan { dialect, batch, depth, .. } = *plan;
        Lane {
            connection,
            flight: InFlight::new(depth),
            ordered: dialect.is_ordered().then(|| Ordered::new(dialect, batch)),
            calls: VecDeque::new(),
            echo: dialect == Dialect::Echo,
            classes,
            fresh,
            depth,
            open: 0,
            loose_writes: 0,
            room_since_ns: task.start_ns,
            full_until_ns: task.start_ns,
            is_blocked: false,
            task,
            exhausted: false,
            goaway: false,
            lost: false,
        }
    }

    /// Begins another task.
    pub(crate) fn begin(&mut self, task: Task) {
        self.room_since_ns = task.start_ns;
        self.task = task;
        self.exhausted = false;
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Whether the connection can still be used.
    pub(crate) fn is_alive(&self) -> bool {
        !self.lost
    }

    /// Whether there is nothing more to send and nothing to wait for.
    pub(crate) fn is_done(&self) -> bool {
        self.lost || (self.exhausted && self.flight.is_empty() && !self.connection.has_output())
    }

    /// Whether the task ran until its end time: it had requests left, and the server stayed.
    pub(crate) fn ran_its_time(&self) -> bool {
        !self.lost && !self.goaway && self.task.quota > 0
    }

    /// When the next request is due, if there is one and the window is not full.
    pub(crate) fn next_due(&self) -> Option<u64> {
        let schedule = self.task.schedule.as_ref()?;
        let room = self.open < self.depth && !self.exhausted && !self.connection.has_output();
        room.then(|| schedule.due())
    }

    /// Sends due requests while the window has space. `clock` is read before each hand-over.
    pub(crate) fn send(&mut self, target: &Target, tally: &mut Tally, clock: &impl Fn() -> u64) {
        if self.lost {
            return;
        }
        loop {
            if self.connection.has_output() {
                self.flush(tally);
                if self.lost || self.connection.has_output() {
                    self.is_blocked = true;
                    return;
                }
            }
            let now_ns = clock();
            self.fill(target, tally, now_ns);
            if self.connection.output.is_empty() {
                return;
            }
            self.flight.mark_sent(clock());
        }
    }

    /// Encodes due requests while the window has space, up to a chunk.
    fn fill(&mut self, target: &Target, tally: &mut Tally, now_ns: u64) {
        if now_ns >= self.task.give_up_ns || self.goaway {
            self.exhausted = true;
        }
        if std::mem::take(&mut self.is_blocked) {
            self.full_until_ns = now_ns;
        }
        let before = self.open;
        while !self.exhausted && self.open < self.depth && self.connection.output.len() < CHUNK {
            let due_ns = match &self.task.schedule {
                Some(schedule) => schedule.due(),
                None => self.room_since_ns,
            };
            let closed_and_over = self.task.schedule.is_none() && now_ns >= self.task.end_ns;
            if due_ns >= self.task.end_ns || closed_and_over || self.task.quota == 0 {
                self.exhausted = true;
                break;
            }
            if due_ns > now_ns {
                break;
            }
            let Some(about) = self.task.draw.next() else {
                self.exhausted = true;
                self.task.quota = 0;
                break;
            };
            self.encode(target, tally, about, due_ns);
            self.task.quota -= 1;
            self.open += 1;
            if let Some(schedule) = &mut self.task.schedule {
                // The server is not to blame for a delay while there was space.
                tally.send_delay(now_ns.saturating_sub(due_ns.max(self.full_until_ns)));
                schedule.advance();
            }
        }
        tally.counts.sent += (self.open - before) as u64;
        // Writes have no reply. A ping confirms them when no read will do so soon.
        let many = 2 * self.loose_writes as usize >= self.depth;
        if self.loose_writes > 0
            && (many || self.exhausted || self.flight.is_empty())
            && let Some(id) = self.flight.open(now_ns, Asked::Fence, self.loose_writes)
        {
            self.loose_writes = 0;
            tally.counts.fences += 1;
            match &mut self.ordered {
                Some(ordered) => ordered.fence(&mut self.connection.output, id),
                None => Message::Ping(&[]).encode(id, &mut self.connection.output),
            }
        }
        if let Some(ordered) = &mut self.ordered {
            ordered.release(&mut self.connection.output);
        }
    }

    #[inline]
    fn encode(&mut self, target: &Target, tally: &mut Tally, about: u32, due_ns: u64) {
        let output = &mut self.connection.output;
        let reads = match target {
            Target::Classify { .. } | Target::Call(_) => true,
            Target::Cache(_) => self.task.draw.chance(self.task.reads_in_2_32),
        };
        if !reads && let Target::Cache(keys) = target {
            let key = keys.key(about);
            match &mut self.ordered {
                Some(ordered) => ordered.write(output, key, keys.value(key)),
                None => put_cache_write(output, WRITE_ID, key, keys.value(key)),
            }
            self.loose_writes += 1;
            tally.counts.writes += 1;
            return;
        }
        let writes = std::mem::take(&mut self.loose_writes);
        let known = self.task.draw.chance(self.task.known_in_2_32);
        let asked = if known { Asked::About(about) } else { Asked::Fresh };
        let id = self
            .flight
            .open(due_ns, asked, writes)
            .expect("a request takes a slot and the depth counts it; there are as many slots");
        match target {
            Target::Call(calls) => {
                calls.put(about, output);
                self.calls.push_back(id);
            }
            Target::Classify { population, .. } => {
                put_classify_req(output, id, population.image(about as usize), 0);
                if !known {
                    self.fresh.stamp(output);
                }
            }
            Target::Cache(keys) => {
                let key = if known { keys.key(about) } else { self.fresh.key(keys) };
                match &mut self.ordered {
                    Some(ordered) => ordered.read(output, id, key),
                    None => put_cache_read(output, id, key, 0),
                }
            }
        }
    }

    fn flush(&mut self, tally: &mut Tally) {
        if let Err(lost) = self.connection.flush() {
            self.lose(&lost, tally);
        }
    }

    /// Reads once and judges the replies. Returns the number of bytes.
    pub(crate) fn receive(
        &mut self,
        wait: Wait,
        target: &Target,
        tally: &mut Tally,
        clock: &impl Fn() -> u64,
    ) -> usize {
        let received = match self.connection.receive(wait) {
            Ok(0) => return 0,
            Ok(received) => received,
            Err(lost) => {
                self.lose(&lost, tally);
                return 0;
            }
        };
        // One clock reading for all replies of a read: a reply that waited in the kernel for this
        // read has waited for its user, too.
        let now_ns = clock();
        tally.at(now_ns);
        let mut judge = Judge {
            flight: &mut self.flight,
            target,
            echo: self.echo,
            classes: self.classes,
            tally,
            now_ns,
            in_window: now_ns < self.task.end_ns,
            closed: 0,
            goaway: None,
            ended: None,
        };
        let framing = match &mut self.ordered {
            None if matches!(target, Target::Call(_)) => {
                let calls = &mut self.calls;
                self.connection.responses(|response| judge.response(calls.pop_front(), &response))
            }
            None => self.connection.frames(|header, body| judge.reply(header, body)),
            // A call for each dialect, so that each gets a loop of its own.
            Some(ordered) => match ordered.dialect() {
                Dialect::Redis => {
                    self.connection.replies(Dialect::Redis, |r| ordered.reply(r, &mut judge))
                }
                Dialect::MemcachedMeta => self
                    .connection
                    .replies(Dialect::MemcachedMeta, |r| ordered.reply(r, &mut judge)),
                _ => self.connection.replies(Dialect::Memcached, |r| ordered.reply(r, &mut judge)),
            },
        };
        let Judge { closed, goaway, ended, .. } = judge;
        tally.timeline.note_closed(closed as u64);
        if self.open >= self.depth {
            self.full_until_ns = now_ns;
        }
        self.open -= closed;
        self.room_since_ns = now_ns;
        if let Some(text) = goaway
            && !self.goaway
        {
            self.goaway = true;
            tally.disconnects.push(format!("the server is shutting down: {text}"));
        }
        if let Some(reason) = ended {
            self.abandon(reason, tally);
        } else if let Err(lost) = framing {
            self.lose(&lost, tally);
        }
        received
    }

    /// Ends the task early: no request is due at or after `now_ns`.
    pub(crate) fn cut(&mut self, now_ns: u64) {
        let task = &mut self.task;
        task.end_ns = task.end_ns.min(now_ns);
        task.give_up_ns = task.give_up_ns.min(now_ns);
        if task.schedule.is_none() {
            task.quota = 0;
        }
    }

    /// Gives up the requests that were sent before `before_ns`.
    pub(crate) fn give_up(&mut self, before_ns: u64, tally: &mut Tally) {
        let open = &mut self.open;
        self.flight.give_up(before_ns, |request| {
            let requests = weight(&request);
            *open -= requests;
            tally.counts.timed_out += requests as u64;
        });
    }

    /// Counts requests that were planned and never sent. Called once, at the end of a task.
    pub(crate) fn finish(&mut self, tally: &mut Tally) {
        let skipped = match self.task.schedule.take() {
            Some(schedule) if self.task.end_ns < u64::MAX => {
                schedule.count_before(self.task.end_ns).min(self.task.quota)
            }
            _ if self.task.quota < u64::MAX / 2 => self.task.quota,
            _ => 0,
        };
        tally.counts.skipped += skipped;
    }

    fn lose(&mut self, lost: &Lost, tally: &mut Tally) {
        // A server may close after its GoAway when all requests are answered.
        if !(self.goaway && self.flight.is_empty() && matches!(lost, Lost::Closed)) {
            self.abandon(lost.to_string(), tally);
        }
        self.lost = true;
    }

    fn abandon(&mut self, reason: String, tally: &mut Tally) {
        tally.counts.lost += self.open as u64;
        tally.disconnects.push(reason);
        self.open = 0;
        self.loose_writes = 0;
        self.flight = InFlight::new(self.depth);
        self.lost = true;
    }
}

/// The part of a connection's depth that this request occupies.
fn weight(request: &Request) -> usize {
    usize::from(request.asked() != Asked::Fence) + request.writes as usize
}
