//! A network in memory on virtual time: delays, segments, resets, partitions and slow links between
//! hosts that crash, hang and restart.
//!
//! A connection consists of two pipes of segments. Each segment has an arrival time, never before
//! that of the segment sent before it. Connections are independent, so bytes on two connections
//! arrive in any order. A cut link holds its bytes, as TCP's retransmission does, and delivers them
//! when it is restored.

mod endpoint;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::MEMO;
use super::auditor::Auditor;
use super::determinism::Dice;
use super::determinism::Trace;

pub(super) use endpoint::Endpoint;

/// A machine with one process.
pub(super) type Host = usize;

/// Connections that a host's kernel holds until the server accepts them.
const BACKLOG: usize = 64;

/// Bytes that a pipe holds, like a kernel's buffers. A writer ahead of its reader waits.
const PIPE: usize = 16 << 10;

/// The pause between attempts to connect to a host that is down.
const KNOCK_EVERY: Duration = Duration::from_millis(10);

/// Bytes that have arrived are read within this time by an idle reader. It is longer than a timer's
/// granularity.
const READ_WITHIN: Duration = Duration::from_millis(5);

/// The latency of a healthy link from end to end, in milliseconds.
const QUICK: RangeInclusive<u64> = 0..=2;

/// The longest trip over a healthy link, with the timer's granularity.
const TRIP: Duration = Duration::from_millis(3);

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Network(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    dice: Dice,
    trace: Trace,
    links: BTreeMap<[Host; 2], Link>,
    hosts: Vec<Machine>,
    connections: Vec<Connection>,
    /// The request limit of every server.
    window: usize,
    complaints: Vec<String>,
}

#[derive(Debug)]
struct Link {
    delay_ms: RangeInclusive<u64>,
    cut: bool,
}

#[derive(Debug, Default)]
struct Machine {
    listener: Option<mpsc::Sender<(Endpoint, String)>>,
    /// The machine disappeared without a reset. It does not even refuse connections.
    gone: bool,
    /// The process is stopped: the kernel accepts connections, but no process reads them.
    stopped: bool,
}

#[derive(Debug)]
struct Connection {
    hosts: [Host; 2],
    /// Indexed by the side that writes.
    pipes: [Pipe; 2],
    /// Both ends know that the connection is closed.
    reset: bool,
    /// Whether this side's machine has disappeared, unknown to the other side.
    gone: [bool; 2],
    /// The machine is back and does not know the connection. It resets it at the next segment.
    forgotten: bool,
    /// Each segment: when it was sent, and its bytes.
    sent: Vec<(Instant, usize)>,
    auditor: Auditor,
}

#[derive(Debug, Default)]
struct Pipe {
    segments: VecDeque<(Instant, Vec<u8>)>,
    held: usize,
    last: Option<Instant>,
    /// The writer has closed its half.
    finished: bool,
    /// The reader has closed its half.
    unread: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Connection {
    fn wake(&mut self) {
        for pipe in &mut self.pipes {
            pipe.reader.take().into_iter().chain(pipe.writer.take()).for_each(Waker::wake);
        }
    }

    fn break_off(&mut self) {
        self.reset = true;
        self.wake();
    }

    /// Whether arrived bytes are unread.
    fn is_overdue(&self) -> bool {
        let arrived = |pipe: &Pipe| pipe.segments.front().map(|(at, _)| *at + READ_WITHIN);
        self.pipes.iter().filter_map(arrived).any(|limit| limit < Instant::now())
    }

    fn joins(&self, a: Host, b: Host) -> bool {
        self.hosts == [a, b] || self.hosts == [b, a]
    }

    fn is_over(&self) -> bool {
        self.reset
            || self.forgotten
            || self.gone != [false; 2]
            || self.pipes.iter().any(|p| p.unread)
    }
}

impl State {
    fn link(&mut self, a: Host, b: Host) -> &mut Link {
        let fresh = || Link { delay_ms: QUICK, cut: false };
        self.links.entry([a.min(b), a.max(b)]).or_insert_with(fresh)
    }

    fn delay(&mut self, a: Host, b: Host) -> Duration {
        let range = self.link(a, b).delay_ms.clone();
        Duration::from_millis(self.dice.of(range))
    }

    fn between(&mut self, a: Host, b: Host) -> impl Iterator<Item = &mut Connection> {
        self.connections.iter_mut().filter(move |connection| connection.joins(a, b))
    }

    fn of(&mut self, host: Host) -> impl Iterator<Item = &mut Connection> {
        self.connections.iter_mut().filter(move |connection| connection.hosts.contains(&host))
    }
}

impl Network {
    /// A network of this many hosts that do not listen yet. Their servers accept `window` requests
    /// at once on a connection.
    pub(super) fn new(seed: u64, hosts: usize, window: usize, prints: bool) -> Self {
        Network(Arc::new(Mutex::new(State {
            dice: Dice::new(seed, 1),
            trace: Trace::new(prints),
            links: BTreeMap::new(),
            hosts: (0..hosts).map(|_| Machine::default()).collect(),
            connections: Vec::new(),
            window,
            complaints: Vec::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The events of the whole simulation.
    pub(super) fn trace<R>(&self, act: impl FnOnce(&mut Trace) -> R) -> R {
        act(&mut self.lock().trace)
    }

    /// Records a complaint.
    pub(super) fn complain(&self, complaint: String) {
        let mut state = self.lock();
        state.trace.event("complaint", || format!("WRONG: {complaint}"));
        state.complaints.push(complaint);
    }

    /// All complaints.
    pub(super) fn complaints(&self) -> Vec<String> {
        self.lock().complaints.clone()
    }

    /// The time that the bytes on the way between two hosts take, from `from` to `to`. A pipe that
    /// is full of them waits for a trip, and everything on the connection waits with it.
    pub(super) fn crowding(&self, a: Host, b: Host, from: Instant, to: Instant) -> Duration {
        let state = self.lock();
        let of_both = state.connections.iter().filter(|connection| connection.joins(a, b));
        let sent = of_both.flat_map(|connection| &connection.sent);
        let in_time = sent.filter(|(at, _)| (from..=to).contains(at)).map(|&(_, len)| len);
        TRIP * (in_time.sum::<usize>() / PIPE) as u32
    }

    /// The healthy connections that have requests without a reply.
    pub(super) fn unanswered(&self) -> Vec<String> {
        let state = self.lock();
        let open = state.connections.iter().enumerate().filter(|(_, c)| !c.is_over());
        let forgotten = open.filter(|(_, connection)| connection.auditor.unanswered() > 0);
        forgotten
            .map(|(number, c)| {
                format!("{} requests on connection {number} have no reply", c.auditor.unanswered())
            })
            .collect()
    }

    /// The healthy connections that hold unread bytes or half a frame.
    pub(super) fn unread(&self) -> Vec<String> {
        let state = self.lock();
        let open = state.connections.iter().enumerate().filter(|(_, c)| !c.is_over());
        let holding = open.filter(|(_, c)| c.auditor.is_within_a_frame() || c.is_overdue());
        holding.map(|(number, _)| format!("connection {number} holds bytes in the end")).collect()
    }

    // Actions of hosts.

    /// Opens a host's port. The receiver gets its connections.
    pub(super) fn listen(&self, host: Host) -> mpsc::Receiver<(Endpoint, String)> {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let mut state = self.lock();
        state.hosts[host].listener = Some(sender);
        state.hosts[host].gone = false;
        // A peer that still writes to the previous process is notified now.
        for connection in state.of(host).filter(|connection| connection.gone != [false; 2]) {
            connection.forgotten = true;
            if connection.pipes.iter().any(|pipe| pipe.held > 0) {
                connection.break_off();
            }
        }
        receiver
    }

    /// A connector for one host's connections to another.
    pub(super) fn connector(
        &self,
        from: Host,
        to: Host,
    ) -> impl Fn(u64) -> Pin<Box<dyn Future<Output = io::Result<Endpoint>> + Send>> + Send + Sync + 'static
    {
        let network = self.clone();
        move |_| Box::pin(network.clone().connect(from, to))
    }

    async fn connect(self, from: Host, to: Host) -> io::Result<Endpoint> {
        loop {
            let there = {
                let mut state = self.lock();
                !state.hosts[to].gone && !state.link(from, to).cut
            };
            if there {
                break;
            }
            sleep(KNOCK_EVERY).await;
        }
        let delay = {
            let mut state = self.lock();
            state.delay(from, to) + state.delay(from, to)
        };
        sleep(delay).await;
        let mut state = self.lock();
        let listener = state.hosts[to].listener.clone();
        let Some(listener) = listener.filter(|listener| !listener.is_closed()) else {
            state.trace.event((from, to), || format!("{from} → {to}: refused"));
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let number = state.connections.len();
        let window = (to == MEMO).then_some(state.window);
        let disturbed = state.hosts[from].stopped || state.hosts[to].stopped;
        state.trace.event((from, to, number), || format!("{from} → {to}: connection {number}"));
        state.connections.push(Connection {
            hosts: [from, to],
            pipes: Default::default(),
            reset: false,
            gone: [false; 2],
            forgotten: false,
            sent: Vec::new(),
            auditor: Auditor::new(window, disturbed),
        });
        drop(state);
        let end = |side| Endpoint { network: self.clone(), number, side, timer: None };
        let (ours, theirs) = (end(0), end(1));
        // A full backlog drops the connection, and with it both its ends.
        listener
            .try_send((theirs, format!("host {from}")))
            .map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(ours)
    }

    // Faults.

    /// Ends a host's process; with `silent`, its machine disappears, too.
    pub(super) fn crash(&self, host: Host, silent: bool) {
        let mut state = self.lock();
        state.hosts[host] = Machine { gone: silent, ..Machine::default() };
        for connection in state.of(host) {
            if silent {
                let side = usize::from(connection.hosts[1] == host);
                connection.gone[side] = true;
                connection.wake();
            } else {
                connection.break_off();
            }
        }
    }

    /// Stops a host's process or lets it continue.
    pub(super) fn stop(&self, host: Host, stopped: bool) {
        let mut state = self.lock();
        state.hosts[host].stopped = stopped;
        for connection in state.of(host) {
            connection.auditor.disturbed = true;
            connection.wake();
        }
    }

    /// Cuts or restores a link.
    pub(super) fn cut(&self, a: Host, b: Host, cut: bool) {
        let mut state = self.lock();
        state.link(a, b).cut = cut;
        for connection in state.between(a, b) {
            connection.auditor.disturbed = true;
            connection.wake();
        }
    }

    /// Makes a link slow, or fast again (`None`).
    pub(super) fn slow(&self, a: Host, b: Host, delay_ms: Option<RangeInclusive<u64>>) {
        self.lock().link(a, b).delay_ms = delay_ms.unwrap_or(QUICK);
    }

    /// Resets all connections of a link.
    pub(super) fn reset(&self, a: Host, b: Host) {
        self.lock().between(a, b).for_each(Connection::break_off);
    }
}

#[tokio::test(start_paused = true)]
async fn notices_unread_bytes_and_half_frames() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let network = Network::new(0, 2, 1, false);
    let mut listener = network.listen(MEMO);
    let mut ours = network.connector(1, MEMO)(0).await.unwrap();
    let (mut theirs, _) = listener.recv().await.unwrap();
    // The halves of a frame that is a header of zeros.
    for (half, complaints) in [([0; 8], 1), ([0; 8], 0)] {
        ours.write_all(&half).await.unwrap();
        sleep(Duration::from_secs(1)).await;
        assert_eq!(network.unread().len(), 1, "nobody has read it");
        theirs.read_exact(&mut [0; 8]).await.unwrap();
        assert_eq!(network.unread().len(), complaints);
    }
}
