//! Values that are built from files and rebuilt when the files change.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::TlsError;

/// Time between two checks of the files. A check is a few `stat` calls and costs nothing; a renewed
/// certificate is in use long before the old one expires.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

type Make<T, E> = Box<dyn Fn() -> Result<T, E> + Send + Sync>;

/// A value that is built from certificate files, and rebuilt when they change.
/// [`ServerTls`](super::ServerTls) and [`ClientTls`](super::ClientTls) are built on it, and other
/// TLS clients may be.
pub struct Reloadable<T, E = TlsError> {
    files: Vec<PathBuf>,
    make: Make<T, E>,
    current: watch::Sender<Arc<T>>,
    /// The state of the files at the last attempt to build the value.
    tried: Mutex<Vec<Stamp>>,
}

/// Identifies a version of a file; `None` if the file does not exist.
type Stamp = Option<(SystemTime, u64, u64)>;

impl<T: Send + Sync + 'static, E: fmt::Display + 'static> Reloadable<T, E> {
    /// Builds the value with `make`.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn new(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, E> {
        // Before the files are read: a change in between is noticed at the next check.
        let tried = Mutex::new(stamps(&files));
        let current = watch::Sender::new(Arc::new(make()?));
        Ok(Arc::new(Reloadable { files, make: Box::new(make), current, tried }))
    }

    /// The files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The current value.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.current.borrow())
    }

    /// Notifies of each new value from now on.
    pub fn changes(&self) -> watch::Receiver<Arc<T>> {
        self.current.subscribe()
    }

    /// Rebuilds the value, or keeps the old one.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn reload(&self) -> Result<(), E> {
        let tried = stamps(&self.files);
        let made = (self.make)();
        *self.tried() = tried;
        self.current.send_replace(Arc::new(made?));
        Ok(())
    }

    /// Never returns: rebuilds the value when a file has changed, checked every
    /// [`RELOAD_INTERVAL`], and on SIGHUP. A failure is logged once, and the old value stays in
    /// use.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn keep_current(self: Arc<Self>) -> impl Future<Output = ()> + Send {
        // Installed at once, not when the task first runs: an operator may send SIGHUP before that,
        // and without a handler it ends the process.
        let mut hangup = Hangup::listen();
        async move {
            loop {
                let asked = tokio::select! {
                    biased;
                    () = hangup.next() => true,
                    () = tokio::time::sleep(RELOAD_INTERVAL) => false,
                };
                let reloadable = Arc::clone(&self);
                // The files may be on a slow network file system.
                let looking = tokio::task::spawn_blocking(move || reloadable.look(asked));
                if looking.await.is_err() {
                    return;
                }
            }
        }
    }

    /// Rebuilds the value if `asked` or if the files have changed, and logs the result.
    fn look(&self, asked: bool) {
        if !asked && *self.tried() == stamps(&self.files) {
            return;
        }
        let files: Vec<_> = self.files.iter().map(|file| file.display().to_string()).collect();
        match self.reload() {
            Ok(()) if files.is_empty() => {
                tracing::info!("reloaded the operating system's certificate authorities")
            }
            Ok(()) => tracing::info!("reloaded certificates from {}", files.join(", ")),
            Err(error) => tracing::warn!("{error}; the certificates loaded before stay in use"),
        }
    }

    fn tried(&self) -> std::sync::MutexGuard<'_, Vec<Stamp>> {
        // Nothing is built under the lock, so a panic leaves the guarded value intact.
        self.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, E> fmt::Debug for Reloadable<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reloadable").field(&self.files).finish()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |file: &PathBuf| {
        let data = fs::metadata(file).ok()?;
        Some((data.modified().ok()?, data.len(), number(&data)))
    };
    files.iter().map(stamp).collect()
}

/// A file that replaces another one has another inode number.
#[cfg(unix)]
fn number(data: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(data)
}

#[cfg(not(unix))]
fn number(_: &fs::Metadata) -> u64 {
    0
}

/// SIGHUP, the request to reload files; `None` if the handler could not be installed.
#[cfg(unix)]
struct Hangup(Option<tokio::signal::unix::Signal>);

#[cfg(unix)]
impl Hangup {
    fn listen() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        Hangup(signal(SignalKind::hangup()).ok())
    }

    async fn next(&mut self) {
        match &mut self.0 {
            Some(signal) => drop(signal.recv().await),
            None => std::future::pending().await,
        }
    }
}

#[cfg(not(unix))]
struct Hangup;

#[cfg(not(unix))]
impl Hangup {
    fn listen() -> Self {
        Hangup
    }

    async fn next(&mut self) {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_reloaded_and_a_broken_one_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("content");
        fs::write(&file, "1").unwrap();
        let tries = Arc::new(AtomicUsize::new(0));
        let reloadable = Reloadable::new(vec![file.clone()], {
            let (file, tries) = (file.clone(), Arc::clone(&tries));
            move || {
                tries.fetch_add(1, Ordering::SeqCst);
                let text = fs::read_to_string(&file).unwrap();
                text.parse::<u32>().map_err(|error| super::super::pem::wrong(&file, error))
            }
        })
        .unwrap();
        let keeping = tokio::spawn(Arc::clone(&reloadable).keep_current());
        let wait = || tokio::time::sleep(RELOAD_INTERVAL * 2);
        wait().await;
        assert_eq!((*reloadable.current(), tries.load(Ordering::SeqCst)), (1, 1));
        // Of another length: the time stamps of some file systems are too coarse to show two
        // changes.
        fs::write(&file, "22").unwrap();
        wait().await;
        assert_eq!((*reloadable.current(), tries.load(Ordering::SeqCst)), (22, 2));
        // Tried once, and not again until the file changes.
        fs::write(&file, "broken").unwrap();
        wait().await;
        wait().await;
        assert_eq!((*reloadable.current(), tries.load(Ordering::SeqCst)), (22, 3));
        fs::write(&file, "333").unwrap();
        wait().await;
        assert_eq!((*reloadable.current(), tries.load(Ordering::SeqCst)), (333, 4));
        keeping.abort();
    }
}
