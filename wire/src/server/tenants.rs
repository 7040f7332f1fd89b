//! Tenants: groups of clients with a token, a name and a weight each.
//!
//! Fair queues take from tenants in turn by weight, so a tenant gets no more for opening more
//! connections.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use afterimage_core::Tenant;
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::proto::handshake::MAX_TOKEN_LEN;

/// The most tenants: their numbers have 8 bits, and 0 is for clients without a tenant.
pub const MAX_TENANTS: usize = 255;

/// The largest weight. A tenant with it gets a hundred turns for one of a tenant without a weight.
pub const MAX_WEIGHT: u8 = 100;

/// The longest name, in bytes.
const MAX_NAME: usize = 64;

/// The tenants of a server, from a file with one line `NAME TOKEN [WEIGHT]` for each.
///
/// Fields are separated by spaces. A line that begins with `#` is a comment. Clones share the
/// tenants: a reload of one is a reload of all.
#[derive(Clone)]
pub struct Tenants(Arc<Inner>);

struct Inner {
    file: PathBuf,
    tenants: RwLock<Arc<[Entry]>>,
}

#[derive(Clone, PartialEq, Eq)]
struct Entry {
    name: Box<str>,
    token: Box<[u8]>,
    tenant: Tenant,
}

/// Why tenants cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TenantsError {
    /// The file cannot be read.
    #[error("cannot read {}: {error}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why it cannot be read.
        error: io::Error,
    },
    /// A line is invalid. The message does not quote it, because it has a token.
    #[error("{}, line {line}: {problem}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// The number of the line, from 1.
        line: usize,
        /// Why it is invalid.
        problem: String,
    },
    /// The file has no tenant.
    #[error("{} has no tenant; write one line for each: NAME TOKEN [WEIGHT]", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
}

impl Tenants {
    /// The tenants in a file.
    ///
    /// # Errors
    /// When the file cannot be read, or when a line is invalid.
    pub fn read(file: impl Into<PathBuf>) -> Result<Self, TenantsError> {
        let file = file.into();
        let tenants = RwLock::new(read(&file, &[])?);
        Ok(Tenants(Arc::new(Inner { file, tenants })))
    }

    /// Reads the file again. After an error the old tenants stay in use. Open connections stay
    /// open, with the weight that they had. A name keeps its number.
    ///
    /// # Errors
    /// As [`Tenants::read`].
    pub fn reload(&self) -> Result<(), TenantsError> {
        let tenants = read(&self.0.file, &self.entries())?;
        *self.0.tenants.write().unwrap_or_else(PoisonError::into_inner) = tenants;
        Ok(())
    }

    /// The tenant whose client shows this token, in the same time for every tenant.
    pub fn of(&self, shown: &[u8]) -> Option<Tenant> {
        let (mut number, mut weight) = (0, 0);
        for Entry { token, tenant, .. } in &*self.entries() {
            let equal = token.ct_eq(shown);
            number.conditional_assign(&tenant.number, equal);
            weight.conditional_assign(&tenant.weight, equal);
        }
        (number > 0).then_some(Tenant { number, weight })
    }

    fn entries(&self) -> Arc<[Entry]> {
        Arc::clone(&self.0.tenants.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn read(file: &Path, before: &[Entry]) -> Result<Arc<[Entry]>, TenantsError> {
    let text = afterimage_core::file::read_text(file)
        .map_err(|error| TenantsError::File { file: file.to_owned(), error })?;
    let mut entries: Vec<Entry> = Vec::new();
    let mut tokens = HashSet::new();
    let mut free = (1..=MAX_TENANTS as u8)
        .filter(|number| before.iter().all(|entry| entry.tenant.number != *number))
        .collect::<Vec<_>>();
    free.reverse();
    for (i, line) in text.lines().enumerate() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.is_empty() || fields[0].starts_with('#') {
            continue;
        }
        let problem =
            |problem: String| TenantsError::Line { file: file.into(), line: i + 1, problem };
        let (name, token, weight) = fields_of(&fields).map_err(problem)?;
        if entries.iter().any(|entry| &*entry.name == name) {
            return Err(problem(format!("{name} has two lines; keep one")));
        }
        if !tokens.insert(token) {
            return Err(problem(format!("{name} has the token of another tenant")));
        }
        let known = before.iter().find(|entry| &*entry.name == name);
        let number = match known.map(|entry| entry.tenant.number).or_else(|| free.pop()) {
            Some(number) => number,
            None => return Err(problem(format!("more than {MAX_TENANTS} tenants"))),
        };
        let tenant = Tenant { number, weight };
        entries.push(Entry { name: name.into(), token: token.as_bytes().into(), tenant });
    }
    if entries.is_empty() {
        return Err(TenantsError::Empty { file: file.to_owned() });
    }
    Ok(entries.into())
}

/// The name, the token and the weight of a line.
fn fields_of<'a>(fields: &[&'a str]) -> Result<(&'a str, &'a str, u8), String> {
    let (name, token, weight) = match *fields {
        [name, token] => (name, token, "1"),
        [name, token, weight] => (name, token, weight),
        _ => return Err(format!("{} fields; expected NAME TOKEN [WEIGHT]", fields.len())),
    };
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.len() > MAX_NAME || !name.bytes().all(is_plain) {
        return Err(format!(
            "the name must have at most {MAX_NAME} letters, digits, dots, dashes and underscores"
        ));
    }
    if token.len() > MAX_TOKEN_LEN {
        let len = token.len();
        return Err(format!("the token of {name} has {len} bytes; the limit is {MAX_TOKEN_LEN}"));
    }
    match weight.parse() {
        Ok(weight @ 1..=MAX_WEIGHT) => Ok((name, token, weight)),
        _ => Err(format!("the weight of {name} must be a number from 1 to {MAX_WEIGHT}")),
    }
}

impl fmt::Debug for Tenants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries();
        let names = entries.iter().map(|entry| (&entry.name, entry.tenant));
        f.debug_map().entries(names).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Tenants, TenantsError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tenants");
        std::fs::write(&file, text).unwrap();
        Tenants::read(file)
    }

    #[test]
    fn a_token_names_its_tenant() {
        let tenants = of("# comment\n\n search  s3cret  10\nbatch other\r\n").unwrap();
        assert_eq!(tenants.of(b"s3cret"), Some(Tenant { number: 1, weight: 10 }));
        assert_eq!(tenants.of(b"other"), Some(Tenant { number: 2, weight: 1 }));
        assert_eq!((tenants.of(b""), tenants.of(b"s3cre")), (None, None));
        let shown = format!("{tenants:?}");
        assert!(shown.contains("search") && !shown.contains("s3cret"), "{shown}");
    }

    #[test]
    fn a_wrong_line_is_named_and_its_token_is_not() {
        let long = format!("a {}", "x".repeat(MAX_TOKEN_LEN + 1));
        let many: String = (0..=MAX_TENANTS).map(|i| format!("t{i} token{i}\n")).collect();
        for (text, expected) in [
            ("", "has no tenant"),
            ("a t\nalone", "line 2: 1 fields; expected NAME TOKEN [WEIGHT]"),
            ("a secret 0", "line 1: the weight of a must be a number from 1 to 100"),
            ("a secret 101", "from 1 to 100"),
            ("a/b secret", "the name must have"),
            ("a secret\na other", "line 2: a has two lines; keep one"),
            ("a secret\nb secret", "line 2: b has the token of another tenant"),
            (&long, "the token of a has 1025 bytes; the limit is 1024"),
            (&many, "line 256: more than 255 tenants"),
        ] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} has no {expected:?}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_reload_keeps_numbers_and_a_bad_file_keeps_all() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tenants");
        std::fs::write(&file, "a one\nb two\n").unwrap();
        let tenants = Tenants::read(&file).unwrap();
        std::fs::write(&file, "new three\nb two 5\n").unwrap();
        tenants.clone().reload().unwrap();
        assert_eq!(tenants.of(b"two"), Some(Tenant { number: 2, weight: 5 }));
        assert_eq!(tenants.of(b"three"), Some(Tenant { number: 3, weight: 1 }));
        assert_eq!(tenants.of(b"one"), None);
        std::fs::write(&file, "b\n").unwrap();
        assert!(tenants.reload().is_err());
        assert!(tenants.of(b"two").is_some());
    }
}
