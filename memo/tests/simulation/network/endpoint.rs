//! One end of a connection, as the processes use it: a stream whose segments arrive at their times.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{Network, PIPE, State};
use crate::{CACHE, MEMO};

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(super) network: Network,
    pub(super) number: usize,
    /// 0 for the side that connected.
    pub(super) side: usize,
    pub(super) timer: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for Endpoint {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let due = {
            let mut state = this.network.lock();
            let hosts = state.connections[this.number].hosts;
            let held = state.link(hosts[0], hosts[1]).cut
                || state.hosts[hosts[this.side]].stopped
                || state.connections[this.number].gone != [false; 2];
            let connection = &mut state.connections[this.number];
            if connection.reset {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let pipe = &mut connection.pipes[1 - this.side];
            pipe.reader = Some(cx.waker().clone());
            match pipe.segments.front_mut() {
                _ if held => return Poll::Pending,
                Some((at, bytes)) if *at <= Instant::now() => {
                    let len = bytes.len().min(buf.remaining());
                    buf.put_slice(&bytes[..len]);
                    bytes.drain(..len);
                    if bytes.is_empty() {
                        pipe.segments.pop_front();
                    }
                    pipe.held -= len;
                    pipe.writer.take().into_iter().for_each(Waker::wake);
                    return Poll::Ready(Ok(()));
                }
                Some((at, _)) => *at,
                None if pipe.finished => return Poll::Ready(Ok(())),
                None => return Poll::Pending,
            }
        };
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        if timer.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl AsyncWrite for Endpoint {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (number, side) = (self.number, self.side);
        let mut guard = self.network.lock();
        let state = &mut *guard;
        let hosts = state.connections[number].hosts;
        let delay = state.delay(hosts[0], hosts[1]);
        let State { dice, trace, connections, complaints, hosts: machines, .. } = state;
        let connection = &mut connections[number];
        if connection.forgotten {
            connection.break_off();
        }
        if connection.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let pipe = &mut connection.pipes[side];
        if pipe.unread || pipe.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = PIPE.saturating_sub(pipe.held);
        if room == 0 || machines[hosts[side]].stopped {
            connection.auditor.disturbed = true;
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut len = bytes.len().min(room);
        // Sometimes a segment ends at an arbitrary byte.
        if len > 1 && dice.one_in(4) {
            len = 1 + dice.below(len - 1);
        }
        let bytes = &bytes[..len];
        let at = pipe.last.map_or(Instant::now() + delay, |last| last.max(Instant::now() + delay));
        pipe.last = Some(at);
        pipe.segments.push_back((at, bytes.to_vec()));
        pipe.held += len;
        pipe.reader.take().into_iter().for_each(Waker::wake);
        connection.sent.push((Instant::now(), len));
        // Stored answers of bytes, and their ages in replies, contain the system's time.
        let has_times = hosts[1] == CACHE || (hosts[1] == MEMO && side == 1);
        let seen: &[u8] = if has_times { &[] } else { bytes };
        trace.event((number, side, len, seen), || {
            format!("connection {number}: {len} bytes of {side}")
        });
        // Bytes of a dead process do not count.
        if connection.gone == [false; 2]
            && let Some(complaint) = connection.auditor.wrote(side, bytes, at)
        {
            let [client, server] = hosts;
            complaints.push(format!("{client} → {server}, connection {number}: {complaint}"));
        }
        Poll::Ready(Ok(len))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.network.lock();
        let pipe = &mut state.connections[self.number].pipes[self.side];
        pipe.finished = true;
        pipe.reader.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let mut state = self.network.lock();
        let connection = &mut state.connections[self.number];
        connection.pipes[self.side].finished = true;
        connection.pipes[1 - self.side].unread = true;
        connection.wake();
    }
}
