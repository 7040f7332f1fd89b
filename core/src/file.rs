//! Bounded reading of the files that a user names: never more than a limit, and never an endless
//! wait. Opening of output files without a wait.
//!
//! A name may lead to a FIFO that nothing writes to, or to a device without an end. A plain
//! `std::fs::read` then hangs, or takes all memory.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::time::Duration;

/// The longest wait for the next bytes of a pipe or a device. A shell's `<(…)` is a pipe.
const PIPE_PATIENCE: Duration = Duration::from_secs(5);

/// The most that is read from a device: some devices have no end.
const MAX_DEVICE_BYTES: u64 = 1 << 20;

/// Limit for files with settings, tokens, certificates and other texts that people write.
pub const MAX_TEXT_BYTES: u64 = 16 << 20;

/// Reads a whole file of at most `limit` bytes. The buffer grows with the bytes that arrive.
///
/// ```
/// let error = afterimage_core::file::read("/dev/zero".as_ref(), 100).unwrap_err();
/// assert_eq!(error.kind(), std::io::ErrorKind::FileTooLarge);
/// ```
///
/// # Errors
/// Those of the system; `FileTooLarge`; `IsADirectory`; `TimedOut` for a pipe that stays silent.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let source = Source::open(path)?;
    if source.metadata.is_file() && source.metadata.len() > limit {
        return Err(too_large(limit));
    }
    let mut bytes = Vec::new();
    source.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(limit));
    }
    Ok(bytes)
}

/// Reads a text of at most [`MAX_TEXT_BYTES`] in UTF-8.
///
/// # Errors
/// As [`read`]; `InvalidData` for other encodings, and for a byte-order mark: it would become a
/// part of the first word.
pub fn read_text(path: &Path) -> io::Result<String> {
    let bytes = read(path, MAX_TEXT_BYTES)?;
    refuse_mark(&bytes)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        invalid(format!("byte {at} is not UTF-8; save the file as UTF-8"))
    })
}

/// Opens a file to write, with these options. A FIFO needs a reader already: opening it would wait
/// for one.
///
/// # Errors
/// Those of the system; `NotConnected` for a FIFO without a reader.
pub fn open_to_write(path: &Path, options: &OpenOptions) -> io::Result<File> {
    if !is_fifo(path) {
        return options.open(path);
    }
    // It stays open until the second one is: a reader must not see an end between them.
    let _probe = without_waiting(&mut options.clone()).open(path).map_err(no_reader)?;
    options.open(path)
}

/// Refuses a text that begins with a byte-order mark.
///
/// # Errors
/// `InvalidData`, which names the encoding.
pub fn refuse_mark(bytes: &[u8]) -> io::Result<()> {
    let encoding = match bytes {
        [0xef, 0xbb, 0xbf, ..] => "UTF-8",
        // With a letter after it: a random token may begin with the same two bytes.
        [0xff, 0xfe, _, 0, ..] | [0xfe, 0xff, 0, _, ..] => "UTF-16",
        _ => return Ok(()),
    };
    Err(invalid(format!(
        "the file begins with a byte-order mark ({encoding}); save it as UTF-8 without one"
    )))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

fn too_large(limit: u64) -> io::Error {
    let limit = match limit {
        _ if limit.is_multiple_of(1 << 20) => format!("{} MiB", limit >> 20),
        _ if limit.is_multiple_of(1 << 10) => format!("{} KiB", limit >> 10),
        _ => format!("{limit} bytes"),
    };
    io::Error::new(ErrorKind::FileTooLarge, format!("the file is too large; the limit is {limit}"))
}

/// An open file, pipe or device. A read from a pipe waits for a limited time, and a device ends
/// after a limited number of bytes.
#[derive(Debug)]
pub struct Source {
    file: File,
    metadata: Metadata,
    /// What a device may still give.
    left: u64,
}

impl Source {
    /// Opens it without waiting for the other end of a pipe.
    ///
    /// # Errors
    /// Those of the system; `IsADirectory`, which some systems report only when it is read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = without_waiting(OpenOptions::new().read(true)).open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::Error::new(ErrorKind::IsADirectory, "it is a folder; give a file"));
        }
        Ok(Source { file, metadata, left: MAX_DEVICE_BYTES })
    }

    /// Its size, if it is a regular file.
    pub fn size(&self) -> Option<u64> {
        self.metadata.is_file().then_some(self.metadata.len())
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.metadata.is_file() {
            return self.file.read(buffer);
        }
        let is_device = is_device(&self.metadata);
        if is_device && self.left == 0 {
            return Err(too_large(MAX_DEVICE_BYTES));
        }
        let most =
            if is_device { self.left.min(buffer.len() as u64) as usize } else { buffer.len() };
        let read = loop {
            wait(&self.file)?;
            match self.file.read(&mut buffer[..most]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => break read?,
            }
        };
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

#[cfg(unix)]
fn without_waiting(options: &mut OpenOptions) -> &mut OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
}

#[cfg(not(unix))]
fn without_waiting(options: &mut OpenOptions) -> &mut OpenOptions {
    options
}

#[cfg(unix)]
fn is_fifo(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

#[cfg(not(unix))]
fn is_fifo(_: &Path) -> bool {
    false
}

#[cfg(unix)]
fn no_reader(error: io::Error) -> io::Error {
    if error.raw_os_error() != Some(libc::ENXIO) {
        return error;
    }
    io::Error::new(ErrorKind::NotConnected, "it is a FIFO without a reader; start the reader first")
}

#[cfg(not(unix))]
fn no_reader(error: io::Error) -> io::Error {
    error
}

#[cfg(unix)]
fn is_device(metadata: &Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_char_device(&metadata.file_type())
}

#[cfg(not(unix))]
fn is_device(_: &Metadata) -> bool {
    false
}

/// Waits until a read does not block. A person at a terminal has no time limit.
#[cfg(unix)]
fn wait(file: &File) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::io::IsTerminal;
    let limit = Timespec::try_from(PIPE_PATIENCE).expect("some seconds fit");
    let limit = (!file.is_terminal()).then_some(&limit);
    loop {
        let mut fds = [PollFd::new(file, PollFlags::IN)];
        match poll(&mut fds, limit) {
            Ok(0) => {
                let text = format!("nothing came through this pipe within {PIPE_PATIENCE:?}");
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(not(unix))]
fn wait(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, [7; 100]).unwrap();
        assert_eq!(read(&file, 100).unwrap(), [7; 100]);
        let error = read(&file, 99).unwrap_err();
        assert_eq!(error.to_string(), "the file is too large; the limit is 99 bytes");
        assert_eq!(read(folder.path(), 99).unwrap_err().kind(), ErrorKind::IsADirectory);
        assert_eq!(read(&folder.path().join("x"), 9).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn an_endless_device_is_an_error() {
        let error = read("/dev/zero".as_ref(), u64::MAX).unwrap_err();
        assert_eq!(error.to_string(), "the file is too large; the limit is 1 MiB");
        assert_eq!(read("/dev/null".as_ref(), 9).unwrap(), b"");
    }

    #[test]
    fn a_pipe_is_read_and_a_silent_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let writer = fifo.clone();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            fs::write(writer, [7; 100_000]).unwrap();
        });
        assert_eq!(read(&fifo, 1 << 20).unwrap(), [7; 100_000]);
        writer.join().unwrap();
        assert_eq!(read(&fifo, 1 << 20).unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_fifo_is_opened_to_write_only_if_it_has_a_reader() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let mut options = OpenOptions::new();
        options.write(true);
        let error = open_to_write(&fifo, &options).unwrap_err().to_string();
        assert_eq!(error, "it is a FIFO without a reader; start the reader first");
        let path = fifo.clone();
        let reader = std::thread::spawn(move || fs::read(path).unwrap());
        let mut file = loop {
            match open_to_write(&fifo, &options) {
                Ok(file) => break file,
                Err(_) => std::thread::yield_now(),
            }
        };
        // More than the buffer of a pipe: the write waits for the reader.
        file.write_all(&[7; 200_000]).unwrap();
        drop(file);
        assert_eq!(reader.join().unwrap().len(), 200_000);
    }

    #[test]
    fn a_byte_order_mark_is_named() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"\xef\xbb\xbftoken").unwrap();
        let error = read_text(file.path()).unwrap_err().to_string();
        assert!(error.contains("byte-order mark (UTF-8)"), "{error}");
        fs::write(file.path(), b"a\xff").unwrap();
        let error = read_text(file.path()).unwrap_err().to_string();
        assert_eq!(error, "byte 1 is not UTF-8; save the file as UTF-8");
    }
}
