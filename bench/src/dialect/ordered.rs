//! The open requests of a server that answers in order.

use std::collections::VecDeque;

use afterimage_wire::Status;

use super::replies::{Reply, status};
use super::{Dialect, key_text};
use crate::outcome::Outcome;

/// The receiver of decoded replies.
pub(crate) trait Judge {
    /// The request with this id was answered.
    fn answer(&mut self, id: u64, answer: i64, outcome: Outcome);

    /// The server has carried out all commands before the fence with this id.
    fn fence(&mut self, id: u64);

    /// An error reply, to the request with this id or, without one, to a write.
    fn failed(&mut self, id: Option<u64>, status: Status);

    /// A reply to no request.
    fn stray(&mut self);
}

/// A reply that is to come.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// To a request of the in-flight table, about this key.
    Read { id: u64, key: u64 },
    /// To a command with this number of reads, which follow in the queue.
    Batch(u64),
    /// To a write.
    Write,
    /// To a fence of the in-flight table.
    Fence(u64),
}

/// The queue of one connection.
#[derive(Debug)]
pub(crate) struct Ordered {
    dialect: Dialect,
    /// Keys in one command at most.
    batch: usize,
    /// Reads that go into the next command: id and key.
    staged: Vec<(u64, u64)>,
    expected: VecDeque<Expected>,
    /// Open reads of the batch in progress; `None` between batches.
    left: Option<u64>,
}

impl Ordered {
    /// A queue with nothing in it, for commands of at most `batch` keys.
    pub(crate) fn new(dialect: Dialect, batch: usize) -> Self {
        Ordered {
            dialect,
            batch,
            staged: Vec::with_capacity(batch),
            expected: VecDeque::new(),
            left: None,
        }
    }

    /// The dialect that is spoken.
    pub(crate) fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Reads the value of `key`: at once, or in one command with others.
    #[inline]
    pub(crate) fn read(&mut self, output: &mut Vec<u8>, id: u64, key: u64) {
        match self.dialect {
            Dialect::Redis if self.batch == 1 => {
                let mut command = *b"*2\r\n$3\r\nGET\r\n$8\r\n........\r\n";
                command[17..25].copy_from_slice(&key.to_le_bytes());
                output.extend_from_slice(&command);
            }
            Dialect::MemcachedMeta => {
                let mut command = *b"mg ........... v\r\n";
                command[3..14].copy_from_slice(&key_text(key));
                output.extend_from_slice(&command);
            }
            _ => {
                self.staged.push((id, key));
                if self.staged.len() >= self.batch {
                    self.release(output);
                }
                return;
            }
        }
        self.expected.push_back(Expected::Read { id, key });
    }

    /// Sends the staged reads as one command.
    #[inline]
    pub(crate) fn release(&mut self, output: &mut Vec<u8>) {
        if self.staged.is_empty() {
            return;
        }
        self.expected.push_back(Expected::Batch(self.staged.len() as u64));
        if self.dialect == Dialect::Redis {
            let parts = self.staged.len() + 1;
            output.extend_from_slice(format!("*{parts}\r\n$4\r\nMGET\r\n").as_bytes());
        } else {
            output.extend_from_slice(b"get");
        }
        for (id, key) in self.staged.drain(..) {
            if self.dialect == Dialect::Redis {
                let mut part = *b"$8\r\n........\r\n";
                part[4..12].copy_from_slice(&key.to_le_bytes());
                output.extend_from_slice(&part);
            } else {
                let mut part = *b" ...........";
                part[1..].copy_from_slice(&key_text(key));
                output.extend_from_slice(&part);
            }
            self.expected.push_back(Expected::Read { id, key });
        }
        if self.dialect != Dialect::Redis {
            output.extend_from_slice(b"\r\n");
        }
    }

    /// Stores `value` under `key`.
    #[inline]
    pub(crate) fn write(&mut self, output: &mut Vec<u8>, key: u64, value: i64) {
        self.release(output);
        let value = value.to_le_bytes();
        match self.dialect {
            Dialect::Redis => {
                let mut command = *b"*3\r\n$3\r\nSET\r\n$8\r\n........\r\n$8\r\n........\r\n";
                command[17..25].copy_from_slice(&key.to_le_bytes());
                command[31..39].copy_from_slice(&value);
                output.extend_from_slice(&command);
            }
            Dialect::MemcachedMeta => {
                let mut command = *b"ms ........... 8\r\n........\r\n";
                command[3..14].copy_from_slice(&key_text(key));
                command[18..26].copy_from_slice(&value);
                output.extend_from_slice(&command);
            }
            _ => {
                let mut command = *b"set ........... 0 0 8\r\n........\r\n";
                command[4..15].copy_from_slice(&key_text(key));
                command[23..31].copy_from_slice(&value);
                output.extend_from_slice(&command);
            }
        }
        self.expected.push_back(Expected::Write);
    }

    /// Sends a command. Its reply shows that all commands before it are done.
    pub(crate) fn fence(&mut self, output: &mut Vec<u8>, id: u64) {
        self.release(output);
        let command: &[u8] = match self.dialect {
            Dialect::Redis => b"*1\r\n$4\r\nPING\r\n",
            _ => b"mn\r\n",
        };
        output.extend_from_slice(command);
        self.expected.push_back(Expected::Fence(id));
    }

    /// Compares a reply with the open requests.
    #[inline]
    pub(crate) fn reply(&mut self, reply: Reply<'_>, judge: &mut impl Judge) {
        match reply {
            Reply::Value(value) => match self.expected.pop_front() {
                Some(Expected::Read { id, .. }) => judge.answer(id, value, Outcome::Hit),
                _ => judge.stray(),
            },
            Reply::ValueOf(text, value) => {
                self.open_batch(judge);
                // The keys before it in the command have no value.
                while let Some((id, key)) = self.next_of_batch() {
                    if key_text(key) == text {
                        return judge.answer(id, value, Outcome::Hit);
                    }
                    judge.answer(id, 0, Outcome::Miss);
                }
                judge.stray();
            }
            Reply::Miss => match self.expected.pop_front() {
                Some(Expected::Read { id, .. }) => judge.answer(id, 0, Outcome::Miss),
                _ => judge.stray(),
            },
            Reply::End => {
                self.open_batch(judge);
                while let Some((id, _)) = self.next_of_batch() {
                    judge.answer(id, 0, Outcome::Miss);
                }
                self.left = None;
            }
            Reply::Many(count) => match self.expected.pop_front() {
                Some(Expected::Batch(asked)) if asked == count => {}
                _ => judge.stray(),
            },
            Reply::Done => match self.expected.pop_front() {
                // The request behind it confirms it.
                Some(Expected::Write) => {}
                Some(Expected::Fence(id)) => judge.fence(id),
                _ => judge.stray(),
            },
            Reply::Failed(text) => self.failed(text, judge),
        }
    }

    /// Judges an error, which applies to the whole command.
    #[cold]
    fn failed(&mut self, text: &[u8], judge: &mut impl Judge) {
        let status = status(text);
        if self.left.is_some() {
            while let Some((id, _)) = self.next_of_batch() {
                judge.failed(Some(id), status);
            }
            self.left = None;
            return;
        }
        match self.expected.pop_front() {
            Some(Expected::Read { id, .. } | Expected::Fence(id)) => judge.failed(Some(id), status),
            Some(Expected::Write) => judge.failed(None, status),
            Some(Expected::Batch(count)) => {
                self.left = Some(count);
                self.failed(text, judge);
            }
            None => judge.stray(),
        }
    }

    /// Begins the next batch, unless one is in progress.
    #[inline]
    fn open_batch(&mut self, judge: &mut impl Judge) {
        if self.left.is_none() {
            self.left = Some(0);
            match self.expected.pop_front() {
                Some(Expected::Batch(count)) => self.left = Some(count),
                _ => judge.stray(),
            }
        }
    }

    /// The next read of the batch in progress.
    #[inline]
    fn next_of_batch(&mut self) -> Option<(u64, u64)> {
        let left = self.left.as_mut().filter(|left| **left > 0)?;
        *left -= 1;
        match self.expected.pop_front() {
            Some(Expected::Read { id, key }) => Some((id, key)),
            _ => unreachable!("as many reads stand behind a batch as it says"),
        }
    }
}
