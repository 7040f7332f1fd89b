//! What is made from files, and made anew when they change.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::TlsError;

/// How often files are looked at for changes: three `stat`s, seldom enough to cost nothing, often
/// enough that a renewed certificate is in use long before the old one ends.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

type Make<T> = Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>;

/// See the module.
pub(super) struct Kept<T> {
    files: Vec<PathBuf>,
    make: Make<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    current: Arc<T>,
    /// The files as they were when it was last tried to make something of them.
    tried: Vec<Stamp>,
}

/// Tells one content of a file from the next; `None` for no such file.
type Stamp = Option<(SystemTime, u64, u64)>;

impl<T: Send + Sync + 'static> Kept<T> {
    /// What `make` makes of these files.
    pub(super) fn new(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, TlsError> {
        // Before they are read: a change in between is seen the next time.
        let tried = stamps(&files);
        let state = Mutex::new(State { current: Arc::new(make()?), tried });
        Ok(Arc::new(Kept { files, make: Box::new(make), state }))
    }

    pub(super) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    pub(super) fn current(&self) -> Arc<T> {
        Arc::clone(&self.lock().current)
    }

    /// Makes it anew, or leaves what there is.
    pub(super) fn reload(&self) -> Result<(), TlsError> {
        let tried = stamps(&self.files);
        let made = (self.make)();
        let mut state = self.lock();
        state.tried = tried;
        state.current = Arc::new(made?);
        Ok(())
    }

    /// Goes on for ever: makes it anew whenever its files change, and when the process gets SIGHUP.
    pub(super) fn keep_current(self: Arc<Self>) -> impl Future<Output = ()> + Send {
        // Now and not when the task first runs: by then somebody may know that we are there, and a SIGHUP that
        // nobody listens to ends the process.
        let mut hangup = Hangup::listen();
        async move {
            loop {
                let asked = tokio::select! {
                    biased;
                    () = hangup.next() => true,
                    () = tokio::time::sleep(RELOAD_INTERVAL) => false,
                };
                let kept = Arc::clone(&self);
                // Files may be far away, and slow.
                let looking = tokio::task::spawn_blocking(move || kept.look(asked));
                if looking.await.is_err() {
                    return;
                }
            }
        }
    }

    /// Makes it anew if that is asked for or the files have changed, and logs what came of it.
    fn look(&self, asked: bool) {
        if !asked && self.lock().tried == stamps(&self.files) {
            return;
        }
        let files: Vec<_> = self.files.iter().map(|file| file.display().to_string()).collect();
        match self.reload() {
            Ok(()) => tracing::info!("certificates loaded anew from {}", files.join(", ")),
            Err(error) => tracing::warn!("{error}; the certificates loaded before stay in use"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<T>> {
        // Nothing is made under the lock, so a poisoned state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let kept = Kept::new(vec![file.clone()], {
            let (file, tries) = (file.clone(), Arc::clone(&tries));
            move || {
                tries.fetch_add(1, Ordering::SeqCst);
                let text = fs::read_to_string(&file).unwrap();
                text.parse::<u32>().map_err(|error| super::super::pem::wrong(&file, error))
            }
        })
        .unwrap();
        let keeping = tokio::spawn(Arc::clone(&kept).keep_current());
        let wait = || tokio::time::sleep(RELOAD_INTERVAL * 2);
        wait().await;
        assert_eq!((*kept.current(), tries.load(Ordering::SeqCst)), (1, 1));
        // Of another length: a file system may tell the time too coarsely to see two changes.
        fs::write(&file, "22").unwrap();
        wait().await;
        assert_eq!((*kept.current(), tries.load(Ordering::SeqCst)), (22, 2));
        // Tried once, and not again until it changes.
        fs::write(&file, "broken").unwrap();
        wait().await;
        wait().await;
        assert_eq!((*kept.current(), tries.load(Ordering::SeqCst)), (22, 3));
        fs::write(&file, "333").unwrap();
        wait().await;
        assert_eq!((*kept.current(), tries.load(Ordering::SeqCst)), (333, 4));
        keeping.abort();
    }
}
