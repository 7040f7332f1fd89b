//! What is made from files, and made anew when they change.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::TlsError;

/// How often files are looked at for changes: three `stat`s, seldom enough to cost nothing, often
/// enough that a renewed certificate is in use long before the old one ends.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

type Make<T, E> = Box<dyn Fn() -> Result<T, E> + Send + Sync>;

/// What is made from files of certificates, and made anew when they change:
/// [`ServerTls`](super::ServerTls) and [`ClientTls`](super::ClientTls) are, and so may be whatever
/// else speaks TLS.
pub struct Reloadable<T, E = TlsError> {
    files: Vec<PathBuf>,
    make: Make<T, E>,
    current: watch::Sender<Arc<T>>,
    /// The files as they were when it was last tried to make something of them.
    tried: Mutex<Vec<Stamp>>,
}

/// Tells one content of a file from the next; `None` for no such file.
type Stamp = Option<(SystemTime, u64, u64)>;

impl<T: Send + Sync + 'static, E: fmt::Display + 'static> Reloadable<T, E> {
    /// What `make` makes of these files.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn new(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, E> {
        // Before they are read: a change in between is seen the next time.
        let tried = Mutex::new(stamps(&files));
        let current = watch::Sender::new(Arc::new(make()?));
        Ok(Arc::new(Reloadable { files, make: Box::new(make), current, tried }))
    }

    /// The files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// What was made last.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.current.borrow())
    }

    /// Tells of what is made from now on.
    pub fn changes(&self) -> watch::Receiver<Arc<T>> {
        self.current.subscribe()
    }

    /// Makes it anew, or leaves what there is.
    ///
    /// # Errors
    /// Those of what makes it.
    pub fn reload(&self) -> Result<(), E> {
        let tried = stamps(&self.files);
        let made = (self.make)();
        *self.tried() = tried;
        self.current.send_replace(Arc::new(made?));
        Ok(())
    }

    /// Goes on for ever: makes it anew when a file has changed, looking every [`RELOAD_INTERVAL`],
    /// and when the process gets SIGHUP. What does not do is warned of once, and not used.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn keep_current(self: Arc<Self>) -> impl Future<Output = ()> + Send {
        // Now and not when the task first runs: by then somebody may know that we are there, and a
        // SIGHUP that nobody listens to ends the process.
        let mut hangup = Hangup::listen();
        async move {
            loop {
                let asked = tokio::select! {
                    biased;
                    () = hangup.next() => true,
                    () = tokio::time::sleep(RELOAD_INTERVAL) => false,
                };
                let reloadable = Arc::clone(&self);
                // Files may be far away, and slow.
                let looking = tokio::task::spawn_blocking(move || reloadable.look(asked));
                if looking.await.is_err() {
                    return;
                }
            }
        }
    }

    /// Makes it anew if that is asked for or the files have changed, and logs what came of it.
    fn look(&self, asked: bool) {
        if !asked && *self.tried() == stamps(&self.files) {
            return;
        }
        let files: Vec<_> = self.files.iter().map(|file| file.display().to_string()).collect();
        match self.reload() {
            Ok(()) if files.is_empty() => tracing::info!("the system's authorities loaded anew"),
            Ok(()) => tracing::info!("certificates loaded anew from {}", files.join(", ")),
            Err(error) => tracing::warn!("{error}; the certificates loaded before stay in use"),
        }
    }

    fn tried(&self) -> std::sync::MutexGuard<'_, Vec<Stamp>> {
        // Nothing is made under the lock, so what it guards is whole.
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

/// A file that takes another one's place has another number.
#[cfg(unix)]
fn number(data: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(data)
}

#[cfg(not(unix))]
fn number(_: &fs::Metadata) -> u64 {
    0
}

/// SIGHUP, by which a service is told to read its files again; `None` where there is none.
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
    async fn a_changed_file_is_read_within_the_interval_and_a_broken_one_leaves_the_old_content() {
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
        // Of another length: a file system may tell the time too coarsely to see two changes.
        fs::write(&file, "22").unwrap();
        wait().await;
        assert_eq!((*reloadable.current(), tries.load(Ordering::SeqCst)), (22, 2));
        // Tried once, and not again until it changes.
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
