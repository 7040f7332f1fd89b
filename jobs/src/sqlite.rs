//! A store in one SQLite file: write-ahead log, every commit synced.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row as SqlRow, params};

use crate::store::{Event, Filter, Kind, Record, Recovered, Row, Store, StoreError};
use crate::{Action, Code, Definition, JobId, ResultKey, State, Timestamp};

/// The version of the tables.
const FORMAT: i64 = 1;

/// Statements that are kept prepared.
const STATEMENTS: usize = 32;

/// A store in an SQLite file. One process uses it at a time.
#[derive(Debug)]
pub struct Sqlite {
    connection: Connection,
    file: String,
    floor: i64,
}

impl Sqlite {
    /// Opens or creates the file.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another process has it open, [`StoreError::Newer`] if a newer
    /// version wrote it, and the errors of the database.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let file = path.as_ref().display().to_string();
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)
            .map_err(|error| StoreError::Failed(format!("cannot open {file}: {error}")))?;
        let mut store = Sqlite { connection, file, floor: i64::MIN };
        store.prepare().map_err(|error| match error {
            Failed::Sql(error) if is_busy(&error) => StoreError::Locked(store.file.clone()),
            error => store.explained(error),
        })?;
        Ok(store)
    }

    fn prepare(&mut self) -> Result<(), Failed> {
        self.connection.busy_timeout(Duration::from_millis(100))?;
        self.connection.set_prepared_statement_cache_capacity(STATEMENTS);
        // The lock is taken by the first write and kept until the process ends.
        self.connection.execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE;
             PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             PRAGMA wal_autocheckpoint = 8000;
             PRAGMA cache_size = -65536;
             PRAGMA temp_store = MEMORY;",
        )?;
        let transaction = self.connection.transaction()?;
        let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if found > FORMAT {
            return Err(Failed::Newer(found));
        }
        if found == 0 {
            transaction.execute_batch(include_str!("schema.sql"))?;
            transaction.pragma_update(None, "user_version", FORMAT)?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn explained(&self, error: Failed) -> StoreError {
        let file = &self.file;
        match error {
            Failed::Newer(found) => StoreError::Newer { file: file.clone(), found, known: FORMAT },
            Failed::Corrupt(text) => StoreError::Corrupt(format!("{file}: {text}")),
            Failed::Sql(error) => StoreError::Failed(format!("{file}: {error}")),
        }
    }

    fn write(&mut self, rows: &[Row], floor: i64) -> Result<(), Failed> {
        let transaction = self.connection.transaction()?;
        for row in rows {
            match row {
                Row::Definition(kind) => put_kind(&transaction, kind)?,
                Row::Insert(record, action, input) => {
                    let mut insert = transaction.prepare_cached(
                        "INSERT INTO jobs (key, tail, definition, version, state, priority, attempts,
                         failures, due, expires, ended, event, detail, action, input)
                         VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15)",
                    )?;
                    insert.execute(params![
                        record.id.key(),
                        record.id.tail(),
                        &*record.definition,
                        record.version,
                        record.state.code(),
                        record.priority,
                        record.attempts,
                        record.failures,
                        record.due.0 as i64,
                        record.expires.map(|time| time.0 as i64),
                        record.ended.map(|time| time.0 as i64),
                        record.event as i64,
                        record.detail,
                        action.as_ref().map(|action| &action.0[..]),
                        &input[..],
                    ])?;
                }
                Row::Update(record) => {
                    let mut update = transaction.prepare_cached(
                        "UPDATE jobs SET state = ?2, attempts = ?3, failures = ?4, due = ?5,
                         expires = ?6, ended = ?7, event = ?8, detail = ?9 WHERE key = ?1",
                    )?;
                    update.execute(params![
                        record.id.key(),
                        record.state.code(),
                        record.attempts,
                        record.failures,
                        record.due.0 as i64,
                        record.expires.map(|time| time.0 as i64),
                        record.ended.map(|time| time.0 as i64),
                        record.event as i64,
                        record.detail,
                    ])?;
                }
                Row::Event(event) => {
                    let mut insert = transaction.prepare_cached(
                        "INSERT INTO events (position, previous, job, tail, definition, state,
                         attempt, at, detail) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9)",
                    )?;
                    insert.execute(params![
                        event.position as i64,
                        event.previous as i64,
                        event.job.key(),
                        event.job.tail(),
                        &*event.definition,
                        event.state.code(),
                        event.attempt,
                        event.at.0 as i64,
                        event.detail,
                    ])?;
                }
                Row::Result { id, key, digest, output } => {
                    let mut insert = transaction.prepare_cached(
                        "INSERT OR REPLACE INTO results (key, tail, digest, result, output)
                         VALUES (?1,?2,?3,?4,?5)",
                    )?;
                    insert.execute(params![
                        id.key(),
                        id.tail(),
                        *digest as i64,
                        key.as_ref().map(|key| &key.0[..]),
                        &output[..],
                    ])?;
                }
            }
        }
        if floor != self.floor {
            put_meta(&transaction, "floor", floor)?;
        }
        transaction.commit()?;
        self.floor = floor;
        Ok(())
    }

    fn read_all(&mut self) -> Result<Recovered, Failed> {
        let transaction = self.connection.transaction()?;
        let epoch = meta(&transaction, "epoch")?.unwrap_or(0) + 1;
        put_meta(&transaction, "epoch", epoch)?;
        transaction.commit()?;
        let floor = meta(&self.connection, "floor")?.unwrap_or(i64::MIN);
        let mut recovered = Recovered { epoch: epoch as u32, ..Recovered::default() };
        let max =
            |sql: &str| self.connection.query_row(sql, [], |row| row.get::<_, Option<i64>>(0));
        recovered.last_key = max("SELECT max(key) FROM jobs")?.unwrap_or(0);
        recovered.last_event = max("SELECT max(position) FROM events")?.unwrap_or(0) as u64;
        let mut kinds = self.connection.prepare(
            "SELECT name, version, memory, max_attempts, backoff, max_backoff, lease, deadline,
             concurrency, code, unstable FROM definitions",
        )?;
        let mut rows = kinds.query([])?;
        while let Some(row) = rows.next()? {
            recovered.kinds.push(kind(row)?);
        }
        let mut live = self.connection.prepare(&format!(
            "SELECT {RECORD}, action, input FROM jobs WHERE key >= ?1 AND state < ?2 ORDER BY key"
        ))?;
        let mut rows = live.query(params![floor, State::Succeeded.code()])?;
        while let Some(row) = rows.next()? {
            recovered.live.push((
                record(row)?,
                action(row, RECORD_COLUMNS)?,
                blob(row, RECORD_COLUMNS + 1)?,
            ));
        }
        let mut known = self.connection.prepare(
            "SELECT key, tail, digest, result FROM results WHERE result IS NOT NULL ORDER BY key",
        )?;
        let mut rows = known.query([])?;
        while let Some(row) = rows.next()? {
            let key = ResultKey(digest(row, 3)?);
            let digest: i64 = row.get(2)?;
            recovered.known.push((key.short(), id(row, 0)?, digest as u64));
        }
        Ok(recovered)
    }

    fn read_result(&self, wanted: JobId) -> Result<Option<(Option<ResultKey>, Bytes)>, Failed> {
        let mut select = self
            .connection
            .prepare_cached("SELECT key, tail, result, output FROM results WHERE key = ?1")?;
        let mut rows = select.query(params![wanted.key()])?;
        let Some(row) = rows.next()? else { return Ok(None) };
        if id(row, 0)? != wanted {
            return Ok(None);
        }
        let key = match row.get_ref(2)? {
            rusqlite::types::ValueRef::Null => None,
            _ => Some(ResultKey(digest(row, 2)?)),
        };
        Ok(Some((key, blob(row, 3)?)))
    }

    fn read_job(&self, wanted: JobId) -> Result<Option<Record>, Failed> {
        let sql = format!("SELECT {RECORD} FROM jobs WHERE key = ?1");
        let mut select = self.connection.prepare_cached(&sql)?;
        let mut rows = select.query(params![wanted.key()])?;
        let Some(row) = rows.next()? else { return Ok(None) };
        Ok(Some(record(row)?).filter(|record| record.id == wanted))
    }

    fn read_list(&self, filter: &Filter) -> Result<Vec<Record>, Failed> {
        let sql = format!(
            "SELECT {RECORD} FROM jobs WHERE key < ?1 AND (?2 IS NULL OR definition = ?2)
             AND (?3 IS NULL OR state = ?3) ORDER BY key DESC LIMIT ?4"
        );
        let mut select = self.connection.prepare_cached(&sql)?;
        let before = filter.before.map_or(i64::MAX, JobId::key);
        let state = filter.state.map(State::code);
        let mut rows = select.query(params![before, filter.definition, state, filter.limit])?;
        let mut list = Vec::new();
        while let Some(row) = rows.next()? {
            list.push(record(row)?);
        }
        Ok(list)
    }

    fn read_events(&self, after: u64, limit: usize) -> Result<Vec<Event>, Failed> {
        let mut select = self.connection.prepare_cached(
            "SELECT position, previous, job, tail, definition, state, attempt, at, detail
             FROM events WHERE position > ?1 ORDER BY position LIMIT ?2",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut rows = select.query(params![after as i64, limit])?;
        let mut list = Vec::new();
        while let Some(row) = rows.next()? {
            list.push(event(row)?);
        }
        Ok(list)
    }

    fn read_history(&self, last: u64) -> Result<Vec<Event>, Failed> {
        let mut select = self.connection.prepare_cached(
            "SELECT position, previous, job, tail, definition, state, attempt, at, detail
             FROM events WHERE position = ?1",
        )?;
        let (mut list, mut position) = (Vec::new(), last);
        while position > 0 {
            let mut rows = select.query(params![position as i64])?;
            let Some(row) = rows.next()? else { break };
            let event = event(row)?;
            // A damaged file must not make a loop.
            position = if event.previous < position { event.previous } else { 0 };
            list.push(event);
        }
        list.reverse();
        Ok(list)
    }
}

impl Store for Sqlite {
    fn recover(&mut self) -> Result<Recovered, StoreError> {
        self.read_all().map_err(|error| self.explained(error))
    }

    fn commit(&mut self, rows: &[Row], floor: i64) -> Result<(), StoreError> {
        self.write(rows, floor).map_err(|error| self.explained(error))
    }

    fn job(&mut self, id: JobId) -> Result<Option<(Record, Option<Bytes>)>, StoreError> {
        let found = self.read_job(id).and_then(|record| {
            let Some(record) = record else { return Ok(None) };
            let output = self.read_result(id)?.map(|(_, output)| output);
            let output = output.filter(|_| record.state == State::Succeeded);
            Ok(Some((record, output)))
        });
        found.map_err(|error| self.explained(error))
    }

    fn input(&mut self, id: JobId) -> Result<Option<(Option<Action>, Bytes)>, StoreError> {
        let read = || -> Result<_, Failed> {
            let sql = "SELECT action, input FROM jobs WHERE key = ?1 AND tail = ?2";
            let mut select = self.connection.prepare_cached(sql)?;
            let mut rows = select.query(params![id.key(), id.tail()])?;
            let Some(row) = rows.next()? else { return Ok(None) };
            Ok(Some((action(row, 0)?, blob(row, 1)?)))
        };
        read().map_err(|error| self.explained(error))
    }

    fn result(&mut self, id: JobId) -> Result<Option<(Option<ResultKey>, Bytes)>, StoreError> {
        self.read_result(id).map_err(|error| self.explained(error))
    }

    fn list(&mut self, filter: &Filter) -> Result<Vec<Record>, StoreError> {
        self.read_list(filter).map_err(|error| self.explained(error))
    }

    fn events(&mut self, after: u64, limit: usize) -> Result<Vec<Event>, StoreError> {
        self.read_events(after, limit).map_err(|error| self.explained(error))
    }

    fn history(&mut self, last: u64) -> Result<Vec<Event>, StoreError> {
        self.read_history(last).map_err(|error| self.explained(error))
    }
}

/// Why a statement failed.
#[derive(Debug)]
enum Failed {
    Sql(rusqlite::Error),
    Newer(i64),
    Corrupt(String),
}

impl From<rusqlite::Error> for Failed {
    fn from(error: rusqlite::Error) -> Self {
        Failed::Sql(error)
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
        || error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseLocked)
}

fn meta(connection: &Connection, name: &str) -> Result<Option<i64>, Failed> {
    let sql = "SELECT value FROM meta WHERE name = ?1";
    Ok(connection.query_row(sql, [name], |row| row.get(0)).optional()?)
}

fn put_meta(connection: &Connection, name: &str, value: i64) -> Result<(), Failed> {
    let sql = "INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)";
    connection.prepare_cached(sql)?.execute(params![name, value])?;
    Ok(())
}

fn put_kind(connection: &Connection, kind: &Kind) -> Result<(), Failed> {
    let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    let Definition { name, version, memory, max_attempts, .. } = &kind.definition;
    let definition = &kind.definition;
    let unstable = kind
        .unstable
        .map(|(one, other)| [one.bits().to_le_bytes(), other.bits().to_le_bytes()].concat());
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO definitions (name, version, memory, max_attempts, backoff,
             max_backoff, lease, deadline, concurrency, code, unstable)
             VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11)",
        )?
        .execute(params![
            name,
            version,
            memory,
            max_attempts,
            millis(definition.backoff),
            millis(definition.max_backoff),
            millis(definition.lease),
            millis(definition.deadline),
            definition.concurrency,
            kind.code.as_ref().map(|code| &code.0[..]),
            unstable,
        ])?;
    Ok(())
}

fn kind(row: &SqlRow<'_>) -> Result<Kind, Failed> {
    let time = |column| -> Result<Duration, Failed> {
        Ok(Duration::from_millis(row.get::<_, i64>(column)?.max(0) as u64))
    };
    let definition = Definition {
        name: row.get(0)?,
        version: row.get(1)?,
        memory: row.get(2)?,
        max_attempts: row.get(3)?,
        backoff: time(4)?,
        max_backoff: time(5)?,
        lease: time(6)?,
        deadline: time(7)?,
        concurrency: row.get(8)?,
    };
    let code = match row.get_ref(9)? {
        rusqlite::types::ValueRef::Null => None,
        _ => Some(Code(digest(row, 9)?)),
    };
    let unstable: Option<[u8; 32]> = row.get(10)?;
    let unstable = unstable.map(|both| {
        let id = |half: &[u8]| {
            JobId::from_bits(u128::from_le_bytes(half.try_into().expect("a half has 16 bytes")))
        };
        (id(&both[..16]), id(&both[16..]))
    });
    Ok(Kind { definition, code, unstable })
}

/// The columns that [`record`] reads.
const RECORD: &str = "key, tail, definition, version, state, priority, attempts, failures, due, \
                      expires, ended, event, detail";
const RECORD_COLUMNS: usize = 13;

fn record(row: &SqlRow<'_>) -> Result<Record, Failed> {
    let time = |column| -> Result<Option<Timestamp>, Failed> {
        Ok(row.get::<_, Option<i64>>(column)?.map(|millis| Timestamp(millis.max(0) as u64)))
    };
    Ok(Record {
        id: id(row, 0)?,
        definition: Arc::from(row.get_ref(2)?.as_str().map_err(corrupt)?),
        version: row.get(3)?,
        state: state(row, 4)?,
        priority: row.get(5)?,
        attempts: row.get(6)?,
        failures: row.get(7)?,
        due: time(8)?.unwrap_or_default(),
        expires: time(9)?,
        ended: time(10)?,
        event: row.get::<_, i64>(11)? as u64,
        detail: row.get(12)?,
    })
}

fn event(row: &SqlRow<'_>) -> Result<Event, Failed> {
    Ok(Event {
        position: row.get::<_, i64>(0)? as u64,
        previous: row.get::<_, i64>(1)? as u64,
        job: id(row, 2)?,
        definition: Arc::from(row.get_ref(4)?.as_str().map_err(corrupt)?),
        state: state(row, 5)?,
        attempt: row.get(6)?,
        at: Timestamp(row.get::<_, i64>(7)?.max(0) as u64),
        detail: row.get(8)?,
    })
}

/// The id in two columns, from `column`.
fn id(row: &SqlRow<'_>, column: usize) -> Result<JobId, Failed> {
    Ok(JobId::of(row.get(column)?, row.get(column + 1)?))
}

fn state(row: &SqlRow<'_>, column: usize) -> Result<State, Failed> {
    let code: u8 = row.get(column)?;
    State::from_code(code).ok_or_else(|| Failed::Corrupt(format!("{code} is not a state")))
}

fn digest(row: &SqlRow<'_>, column: usize) -> Result<[u8; 32], Failed> {
    Ok(row.get(column)?)
}

fn action(row: &SqlRow<'_>, column: usize) -> Result<Option<Action>, Failed> {
    Ok(row.get::<_, Option<[u8; 32]>>(column)?.map(Action))
}

fn blob(row: &SqlRow<'_>, column: usize) -> Result<Bytes, Failed> {
    Ok(Bytes::copy_from_slice(row.get_ref(column)?.as_blob().map_err(corrupt)?))
}

fn corrupt(error: rusqlite::types::FromSqlError) -> Failed {
    Failed::Corrupt(error.to_string())
}
