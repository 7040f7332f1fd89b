//! API keys: a name, a scope, a limit of requests, and the SHA-256 of the key.
//!
//! The file has no keys, only their hashes: a reader of the file cannot use them. A key has 256
//! random bits, so a plain hash is enough; slow hashes are for passwords.

use std::collections::HashSet;
use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rand::TryRng;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::access::Scope;

/// The keys of a gateway, from a file with a line `NAME SCOPE SHA256 [RATE]` for each.
///
/// A line that begins with `#` is a comment. Clones share the keys: a reload of one is a reload of
/// all.
#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    file: PathBuf,
    entries: RwLock<Arc<[Entry]>>,
}

#[derive(Clone)]
struct Entry {
    name: Box<str>,
    scope: Scope,
    digest: [u8; 32],
    limit: Option<Limit>,
}

/// Why keys cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// The file cannot be read.
    #[error("cannot read {}: {error}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why it cannot be read.
        error: io::Error,
    },
    /// A line is invalid.
    #[error("{}, line {line}: {problem}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// The number of the line, from 1.
        line: usize,
        /// Why it is invalid.
        problem: String,
    },
    /// The file has no key.
    #[error("{} has no key; write one line for each: NAME SCOPE SHA256 [RATE]", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
}

/// The rights of a key.
#[derive(Clone, Debug)]
pub(crate) struct Granted {
    pub(crate) scope: Scope,
    pub(crate) limit: Option<Limit>,
}

impl Keys {
    /// The keys in a file.
    ///
    /// # Errors
    /// When the file cannot be read, or when a line is invalid.
    pub fn read(file: impl Into<PathBuf>) -> Result<Self, KeysError> {
        let file = file.into();
        let entries = RwLock::new(read(&file, &[])?);
        Ok(Keys(Arc::new(Inner { file, entries })))
    }

    /// Reads the file again. After an error the old keys stay in use. A key whose limit has not
    /// changed keeps its account.
    ///
    /// # Errors
    /// As [`Keys::read`].
    pub fn reload(&self) -> Result<(), KeysError> {
        let entries = read(&self.0.file, &self.entries())?;
        *self.0.entries.write().unwrap_or_else(PoisonError::into_inner) = entries;
        Ok(())
    }

    /// The rights of the key that a client shows, in a time that does not depend on which it is.
    pub(crate) fn find(&self, shown: &[u8]) -> Option<Granted> {
        let digest = Sha256::digest(shown);
        let entries = self.entries();
        let mut found = None;
        for entry in &*entries {
            if bool::from(entry.digest.ct_eq(&digest)) {
                found = Some(entry);
            }
        }
        found.map(|entry| Granted { scope: entry.scope, limit: entry.limit.clone() })
    }

    fn entries(&self) -> Arc<[Entry]> {
        Arc::clone(&self.0.entries.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries();
        f.debug_map().entries(entries.iter().map(|entry| (&entry.name, entry.scope))).finish()
    }
}

/// A new key: 256 random bits.
///
/// # Errors
/// When the system gives no random bytes.
pub fn random() -> Result<String, rand::rngs::SysError> {
    let mut bytes = [0; 32];
    rand::rngs::SysRng.try_fill_bytes(&mut bytes)?;
    let mut key = String::from("ai_");
    for byte in bytes {
        let _ = write!(key, "{byte:02x}");
    }
    Ok(key)
}

/// The line of a key file for a new key.
pub fn line(name: &str, scope: Scope, key: &str, rate: Option<Rate>) -> String {
    let mut line = format!("{name} {scope} ");
    for byte in Sha256::digest(key) {
        let _ = write!(line, "{byte:02x}");
    }
    if let Some(rate) = rate {
        let _ = write!(line, " {rate}");
    }
    line
}

/// Checks the name of a key.
///
/// # Errors
/// The reason, if it is not valid.
pub fn check_name(name: &str) -> Result<(), String> {
    const MAX_NAME: usize = 64;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_plain) {
        return Ok(());
    }
    Err(format!("a name has 1 to {MAX_NAME} letters, digits, dots, dashes and underscores"))
}

fn read(file: &Path, before: &[Entry]) -> Result<Arc<[Entry]>, KeysError> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| KeysError::File { file: file.to_owned(), error })?;
    let mut entries: Vec<Entry> = Vec::new();
    let mut names = HashSet::new();
    for (i, line) in text.lines().enumerate() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.is_empty() || fields[0].starts_with('#') {
            continue;
        }
        let problem = |problem| KeysError::Line { file: file.into(), line: i + 1, problem };
        let mut entry = entry(&fields).map_err(problem)?;
        if !names.insert(entry.name.clone()) {
            return Err(problem(format!("{} has two lines; keep one", entry.name)));
        }
        let known = before.iter().find(|known| known.name == entry.name);
        let limit = known.and_then(|known| known.limit.as_ref());
        if let (Some(new), Some(old)) = (&mut entry.limit, limit)
            && new.rate == old.rate
        {
            *new = old.clone();
        }
        entries.push(entry);
    }
    if entries.is_empty() {
        return Err(KeysError::Empty { file: file.to_owned() });
    }
    Ok(entries.into())
}

fn entry(fields: &[&str]) -> Result<Entry, String> {
    let (name, scope, digest, rate) = match *fields {
        [name, scope, digest] => (name, scope, digest, None),
        [name, scope, digest, rate] => (name, scope, digest, Some(rate)),
        _ => return Err(format!("{} fields; expected NAME SCOPE SHA256 [RATE]", fields.len())),
    };
    check_name(name)?;
    let scope = scope.parse()?;
    let digest = digest_of(digest).ok_or("the SHA-256 must have 64 hexadecimal digits")?;
    let limit = rate.map(|rate| rate.parse().map(Limit::new)).transpose()?;
    Ok(Entry { name: name.into(), scope, digest, limit })
}

fn digest_of(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(digest)
}

/// A number of requests in a time: `100/s`, `600/min` or `1000/h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    requests: u32,
    unit: Unit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Second,
    Minute,
    Hour,
}

impl Unit {
    fn time(self) -> Duration {
        Duration::from_secs(match self {
            Unit::Second => 1,
            Unit::Minute => 60,
            Unit::Hour => 3600,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Unit::Second => "s",
            Unit::Minute => "min",
            Unit::Hour => "h",
        }
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(requests, unit)| {
            let units = [Unit::Second, Unit::Minute, Unit::Hour];
            let unit = units.into_iter().find(|known| known.name() == unit)?;
            let requests = requests.parse().ok().filter(|&requests| requests > 0)?;
            Some(Rate { requests, unit })
        });
        parsed.ok_or_else(|| format!("{text:?} is not a rate; expected 100/s, 600/min or 1000/h"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.requests, self.unit.name())
    }
}

/// The account of a key: it may send the requests of one unit of time at once, and then as many as
/// the rate gives back (the generic cell rate algorithm of ITU-T I.371).
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    pub(crate) rate: Rate,
    /// The time at which all requests of the account are given back; `None` before the first one.
    full_at: Arc<Mutex<Option<Instant>>>,
}

impl Limit {
    fn new(rate: Rate) -> Self {
        Limit { rate, full_at: Arc::default() }
    }

    /// Takes one request from the account. Fails with the time after which there is one again.
    pub(crate) fn take(&self, now: Instant) -> Result<(), Duration> {
        let unit = self.rate.unit.time();
        let each = unit / self.rate.requests;
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let next = full_at.map_or(now, |full_at| full_at.max(now)) + each;
        let ahead = next.saturating_duration_since(now);
        if ahead > unit {
            return Err(ahead - unit);
        }
        *full_at = Some(next);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Keys, KeysError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        std::fs::write(&file, text).unwrap();
        Keys::read(file)
    }

    #[test]
    fn a_key_has_its_scope_and_the_file_has_no_key() {
        let text = [
            line("reader", Scope::Read, "one", None),
            "# comment\n".to_owned(),
            line("app", Scope::Infer, "two", Some("5/s".parse().unwrap())),
        ];
        let text = text.join("\n");
        assert!(!text.contains("one") && !text.contains("two"), "{text}");
        let keys = of(&text).unwrap();
        assert_eq!(keys.find(b"one").map(|key| key.scope), Some(Scope::Read));
        let app = keys.find(b"two").unwrap();
        assert_eq!((app.scope, app.limit.unwrap().rate), (Scope::Infer, "5/s".parse().unwrap()));
        assert!(keys.find(b"").is_none() && keys.find(b"three").is_none());
        // SHA-256 of "abc" (FIPS 180-4).
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(line("a", Scope::Admin, "abc", None), format!("a admin {abc}"));
    }

    #[test]
    fn a_wrong_line_is_named() {
        let hash = "0".repeat(64);
        for (text, expected) in [
            (String::new(), "has no key"),
            (format!("a read {hash}\nalone"), "line 2: 1 fields"),
            (format!("a write {hash}"), "expected read, infer or admin"),
            ("a read 12".to_owned(), "64 hexadecimal digits"),
            (format!("a read {hash} 5"), "\"5\" is not a rate"),
            (format!("a read {hash} 0/s"), "\"0/s\" is not a rate"),
            (format!("a/b read {hash}"), "a name has"),
            (format!("a read {hash}\na read {hash}"), "line 2: a has two lines; keep one"),
        ] {
            let error = of(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} has no {expected:?}");
        }
    }

    #[test]
    fn a_limit_allows_a_burst_and_then_its_rate() {
        let limit = Limit::new("10/s".parse().unwrap());
        let start = Instant::now();
        for i in 0..10 {
            assert_eq!(limit.take(start), Ok(()), "request {i}");
        }
        assert_eq!(limit.take(start), Err(Duration::from_millis(100)));
        assert_eq!(limit.take(start + Duration::from_millis(100)), Ok(()));
        assert!(limit.take(start + Duration::from_millis(150)).is_err());
        // After a pause the account is full and holds no more than a second's requests.
        let later = start + Duration::from_secs(60);
        let taken = (0..100).filter(|_| limit.take(later).is_ok()).count();
        assert_eq!(taken, 10);
    }

    #[test]
    fn a_reload_keeps_accounts_and_a_bad_file_keeps_all_keys() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let key = line("a", Scope::Infer, "key", Some("1/h".parse().unwrap()));
        std::fs::write(&file, &key).unwrap();
        let keys = Keys::read(&file).unwrap();
        let now = Instant::now();
        let take = || keys.find(b"key").unwrap().limit.unwrap().take(now);
        assert_eq!(take(), Ok(()));
        keys.clone().reload().unwrap();
        assert!(take().is_err(), "a reload gives no further request");
        std::fs::write(&file, "a").unwrap();
        assert!(keys.reload().is_err());
        assert!(take().is_err());
    }
}
