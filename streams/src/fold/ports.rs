//! Sea ports: checked records, and a table of them in SQLite.
//!
//! A record is a member of one JSON object: the key of the port, and its description. Without a
//! database the fold checks and counts the records. With one it inserts or updates a row for each,
//! and stores the run's checkpoint in the same transaction. So after any interruption the table has
//! the ports up to the checkpoint, each once.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{Corrupt, Fold, Saved, Sink, SinkError};
use crate::checkpoint::Checkpoint;
use crate::folder::Start;
use crate::record::{Rejected, member};

/// The name in a plan.
pub const PORTS: &str = "ports";

/// The longest wait for another writer of the database.
const BUSY: Duration = Duration::from_secs(30);

const SCHEMA: &str = "
    PRAGMA journal_mode = wal;
    PRAGMA synchronous = normal;
    CREATE TABLE IF NOT EXISTS ports (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, city TEXT, country TEXT,
        province TEXT, timezone TEXT, code TEXT, longitude REAL, latitude REAL,
        alias TEXT, regions TEXT, unlocs TEXT
    ) STRICT;
    CREATE INDEX IF NOT EXISTS ports_by_city ON ports (city);
    CREATE TABLE IF NOT EXISTS runs (
        id TEXT PRIMARY KEY, generation INTEGER NOT NULL, checkpoint BLOB
    ) STRICT;";

const UPSERT: &str = "
    INSERT INTO ports (key, name, city, country, province, timezone, code, longitude, latitude,
        alias, regions, unlocs)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
    ON CONFLICT (key) DO UPDATE SET name = ?2, city = ?3, country = ?4, province = ?5, timezone = ?6,
        code = ?7, longitude = ?8, latitude = ?9, alias = ?10, regions = ?11, unlocs = ?12";

/// A port, as the file describes it. Members that it does not name are checked and dropped.
#[derive(Debug, Deserialize)]
struct Port<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    city: Option<Cow<'a, str>>,
    country: Option<Cow<'a, str>>,
    province: Option<Cow<'a, str>>,
    timezone: Option<Cow<'a, str>>,
    code: Option<Cow<'a, str>>,
    /// Longitude and latitude in degrees.
    coordinates: Option<[f64; 2]>,
    #[serde(borrow)]
    alias: Option<&'a RawValue>,
    #[serde(borrow)]
    regions: Option<&'a RawValue>,
    #[serde(borrow)]
    unlocs: Option<&'a RawValue>,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Ports {
    count: u64,
    database: Option<Database>,
}

/// A connection, and the run whose checkpoint it stores.
struct Database {
    connection: Connection,
    run: Option<(String, i64)>,
    /// A transaction is open.
    is_open: bool,
    /// The first error of the present transaction.
    failed: Option<rusqlite::Error>,
}

impl Ports {
    /// Ports that go into the database at `path`, which is created if there is none. With an id,
    /// the run's checkpoint is in the database, and a former holder of the run can no longer
    /// write. Returns the checkpoint, if there is one.
    ///
    /// # Errors
    /// If the database cannot be used, or `start` does not fit.
    pub fn into(
        path: &Path,
        id: Option<&str>,
        start: Start,
    ) -> Result<(Self, Option<Checkpoint>), SinkError> {
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        connection.execute_batch(SCHEMA)?;
        let (mut run, mut checkpoint) = (None, None);
        if let Some(id) = id {
            let transaction =
                connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            let found: Option<(i64, Option<Vec<u8>>)> = transaction
                .query_row("SELECT generation, checkpoint FROM runs WHERE id = ?1", [id], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?;
            match (&found, start) {
                (None, Start::Resume) => return Err(SinkError::Unknown(id.to_owned())),
                (Some((_, Some(_))), Start::New) => return Err(SinkError::Exists(id.to_owned())),
                _ => {}
            }
            let (generation, bytes) = found.unwrap_or_default();
            checkpoint = bytes.map(|bytes: Vec<u8>| Checkpoint::from_bytes(&bytes)).transpose()?;
            transaction.execute(
                "INSERT INTO runs (id, generation) VALUES (?1, ?2)
                 ON CONFLICT (id) DO UPDATE SET generation = ?2",
                params![id, generation + 1],
            )?;
            transaction.commit()?;
            run = Some((id.to_owned(), generation + 1));
        }
        let database = Some(Database { connection, run, is_open: false, failed: None });
        Ok((Ports { count: 0, database }, checkpoint))
    }
}

impl Database {
    fn upsert(&mut self, key: &str, port: &Port<'_>) -> rusqlite::Result<()> {
        if !self.is_open {
            self.connection.execute_batch("BEGIN IMMEDIATE")?;
            self.is_open = true;
        }
        let [longitude, latitude] = port.coordinates.map_or([None; 2], |at| at.map(Some));
        let text = |text: &Option<&RawValue>| text.map(|text| text.get().to_owned());
        self.connection.prepare_cached(UPSERT)?.execute(params![
            key,
            port.name,
            port.city,
            port.country,
            port.province,
            port.timezone,
            port.code,
            longitude,
            latitude,
            text(&port.alias),
            text(&port.regions),
            text(&port.unlocs),
        ])?;
        Ok(())
    }
}

impl Sink for Database {
    fn commit(&mut self, checkpoint: &Checkpoint) -> Result<(), SinkError> {
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        if !self.is_open {
            self.connection.execute_batch("BEGIN IMMEDIATE")?;
            self.is_open = true;
        }
        if let Some((id, generation)) = &self.run {
            let changed = self
                .connection
                .prepare_cached(
                    "UPDATE runs SET checkpoint = ?3 WHERE id = ?1 AND generation = ?2",
                )?
                .execute(params![id, generation, checkpoint.to_bytes()])?;
            if changed == 0 {
                // The rows of this transaction are not written either.
                self.connection.execute_batch("ROLLBACK")?;
                self.is_open = false;
                return Err(SinkError::Fenced);
            }
        }
        self.connection.execute_batch("COMMIT")?;
        self.is_open = false;
        Ok(())
    }
}

impl Fold for Ports {
    fn update(&mut self, record: &[u8]) -> Result<(), Rejected> {
        let (key, value) = member(record)?;
        let port: Port<'_> =
            serde_json::from_slice(value).map_err(|error| Rejected::Invalid(error.to_string()))?;
        if let Some([longitude, latitude]) = port.coordinates
            && !(longitude.abs() <= 180.0 && latitude.abs() <= 90.0)
        {
            return Err(Rejected::Invalid(format!("{longitude}, {latitude} is not on Earth")));
        }
        if let Some(database) = &mut self.database
            && database.failed.is_none()
        {
            database.failed = database.upsert(&key, &port).err();
        }
        self.count = self.count.saturating_add(1);
        Ok(())
    }

    fn save(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.count.to_le_bytes());
    }

    fn merge(&mut self, saved: &[u8]) -> Result<(), Corrupt> {
        let mut saved = Saved(saved);
        let count = saved.u64()?;
        saved.end()?;
        self.count = self.count.checked_add(count).ok_or(Corrupt)?;
        Ok(())
    }

    fn value(&self) -> Value {
        json!({ "ports": self.count })
    }

    fn sink(&mut self) -> Option<&mut dyn Sink> {
        self.database.as_mut().map(|database| database as &mut dyn Sink)
    }
}
