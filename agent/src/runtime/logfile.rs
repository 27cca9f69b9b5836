//! The files that hold a container's output.
//!
//! `0` is written to, `1` is the one before it, and so on. One record per line:
//! `NANOSECONDS 1|2 F|P DATA`, where 1 is standard output and 2 standard error, F a
//! line whose newline was cut off and P a piece of a longer line. The shim
//! writes, the agent reads; they share only the files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::LogLine;
use super::oci::LogLimits;

/// A longer line is cut into pieces of this many bytes.
pub(super) const MAX_PIECE: usize = 16 << 10;
/// Longest record: time, marks, piece and newline.
pub(super) const MAX_RECORD: usize = MAX_PIECE + 64;

/// Cuts one stream into records.
#[derive(Default)]
pub(super) struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    /// Appends the records that `data` completes.
    pub fn push(&mut self, stderr: bool, nanos: i128, mut data: &[u8], out: &mut Vec<u8>) {
        while !data.is_empty() {
            let space = MAX_PIECE - self.pending.len();
            let window = &data[..data.len().min(space)];
            if let Some(end) = window.iter().position(|byte| *byte == b'\n') {
                self.pending.extend_from_slice(&window[..end]);
                self.emit(stderr, nanos, b'F', out);
                data = &data[end + 1..];
            } else {
                self.pending.extend_from_slice(window);
                data = &data[window.len()..];
                if self.pending.len() == MAX_PIECE {
                    self.emit(stderr, nanos, b'P', out);
                }
            }
        }
    }

    /// Appends what is left when the stream has ended.
    pub fn finish(&mut self, stderr: bool, nanos: i128, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.emit(stderr, nanos, b'P', out);
        }
    }

    fn emit(&mut self, stderr: bool, nanos: i128, mark: u8, out: &mut Vec<u8>) {
        // Writing to a vector cannot fail.
        let _ = write!(
            out,
            "{nanos} {} {} ",
            if stderr { 2 } else { 1 },
            mark as char
        );
        out.append(&mut self.pending);
        out.push(b'\n');
    }
}

/// Reads one record, without its newline.
pub(super) fn parse(record: &[u8]) -> Option<LogLine> {
    let mut parts = record.splitn(4, |byte| *byte == b' ');
    let time_nanos = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    let stderr = match parts.next()? {
        b"1" => false,
        b"2" => true,
        _ => return None,
    };
    let whole = match parts.next()? {
        b"F" => true,
        b"P" => false,
        _ => return None,
    };
    let mut data = parts.next()?.to_vec();
    if whole {
        data.push(b'\n');
    }
    Some(LogLine {
        stderr,
        time_nanos,
        data: Bytes::from(data),
    })
}

/// Appends records and rotates. What cannot be written (a full disk) is dropped:
/// a container must not stand still for its log.
pub(super) struct LogWriter {
    dir: PathBuf,
    limits: LogLimits,
    file: Option<File>,
    size: u64,
}

impl LogWriter {
    pub fn open(dir: &Path, limits: LogLimits) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join("0"))?;
        let size = file.metadata()?.len();
        Ok(Self {
            dir: dir.to_owned(),
            limits,
            file: Some(file),
            size,
        })
    }

    /// `records` ends at the end of a record.
    pub fn write(&mut self, records: &[u8]) {
        if records.is_empty() {
            return;
        }
        if self.file.is_none() || self.size >= self.limits.max_bytes {
            self.rotate();
        }
        if let Some(file) = &mut self.file {
            match file.write_all(records) {
                Ok(()) => self.size += records.len() as u64,
                // Half a record may be there; a newline keeps it from spoiling the next.
                Err(_) => drop(file.write_all(b"\n")),
            }
        }
    }

    fn rotate(&mut self) {
        let name = |index: u32| self.dir.join(index.to_string());
        let last = self.limits.max_files.max(1) - 1;
        if last == 0 {
            let _ = fs::remove_file(name(0));
        }
        for index in (0..last).rev() {
            let _ = fs::rename(name(index), name(index + 1));
        }
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(name(0));
        if let Ok(file) = file {
            self.file = Some(file);
            self.size = 0;
        }
    }
}

/// The files of a log, newest first, each with its inode.
fn files(dir: &Path) -> Vec<(File, u64)> {
    let mut files = Vec::new();
    for index in 0u32.. {
        let Ok(file) = File::open(dir.join(index.to_string())) else {
            break;
        };
        let Ok(meta) = file.metadata() else { break };
        files.push((file, meta.ino()));
    }
    files
}

/// Reads records in order, across rotations.
pub(super) struct LogReader {
    dir: PathBuf,
    file: Option<(File, u64)>,
    pending: Vec<u8>,
    scanned: usize,
    /// Records still to leave out.
    skip: u64,
}

impl LogReader {
    /// Starts `tail` records before the end, or at the oldest that is kept.
    pub fn open(dir: &Path, tail: Option<u64>) -> io::Result<Self> {
        let mut reader = Self {
            dir: dir.to_owned(),
            file: None,
            pending: Vec::new(),
            scanned: 0,
            skip: 0,
        };
        if let Some(tail) = tail {
            let mut total: u64 = 0;
            while reader.next_record()?.is_some() {
                total += 1;
            }
            reader = Self {
                dir: dir.to_owned(),
                file: None,
                pending: Vec::new(),
                scanned: 0,
                skip: total.saturating_sub(tail),
            };
        }
        Ok(reader)
    }

    /// The next record, or `None` at the end of what is written so far.
    pub fn next(&mut self) -> io::Result<Option<LogLine>> {
        while let Some(record) = self.next_record()? {
            if self.skip > 0 {
                self.skip -= 1;
            } else if let Some(line) = parse(&record) {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    fn next_record(&mut self) -> io::Result<Option<Vec<u8>>> {
        use std::io::Read;
        loop {
            if let Some(end) = self.pending[self.scanned..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let end = self.scanned + end;
                let mut record: Vec<u8> = self.pending.drain(..=end).collect();
                record.pop();
                self.scanned = 0;
                return Ok(Some(record));
            }
            self.scanned = self.pending.len();
            if self.scanned > MAX_RECORD {
                // Not written by a shim. Skip to the next newline.
                self.pending.clear();
                self.scanned = 0;
            }
            let mut buffer = [0; 64 << 10];
            let n = match &mut self.file {
                Some((file, _)) => file.read(&mut buffer)?,
                None => 0,
            };
            if n > 0 {
                self.pending.extend_from_slice(&buffer[..n]);
            } else if !self.advance()? {
                return Ok(None);
            }
        }
    }

    /// At the end of the current file: on to the one written after it, if there is one.
    fn advance(&mut self) -> io::Result<bool> {
        let mut files = files(&self.dir);
        let at = self
            .file
            .as_ref()
            .and_then(|(_, inode)| files.iter().position(|(_, other)| other == inode));
        let next = match (at, files.len()) {
            (Some(0), _) | (None, 0) => return Ok(false),
            (Some(at), _) => at - 1,
            // The first, or ours was rotated away: the oldest there is.
            (None, count) => count - 1,
        };
        if at.is_some()
            && let Some((file, _)) = &mut self.file
        {
            // Written between the last read and the rotation.
            use std::io::Read;
            let mut rest = Vec::new();
            file.take(1 << 20).read_to_end(&mut rest)?;
            if !rest.is_empty() {
                self.pending.extend_from_slice(&rest);
                return Ok(true);
            }
        }
        self.pending.clear();
        self.scanned = 0;
        self.file = Some(files.swap_remove(next));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(reader: &mut LogReader) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(line) = reader.next().unwrap() {
            lines.push(String::from_utf8(line.data.to_vec()).unwrap());
        }
        lines
    }

    fn write(writer: &mut LogWriter, text: &str) {
        let mut out = Vec::new();
        Splitter::default().push(false, 7, text.as_bytes(), &mut out);
        writer.write(&out);
    }

    #[test]
    fn lines_come_back_with_their_stream_time_and_newline() {
        let (mut out, mut splitter) = (Vec::new(), Splitter::default());
        splitter.push(false, 1, b"a b", &mut out);
        assert!(out.is_empty());
        splitter.push(false, 2, b" c\n\nrest", &mut out);
        splitter.finish(true, 3, &mut out);
        let lines: Vec<LogLine> = out
            .split(|byte| *byte == b'\n')
            .filter(|record| !record.is_empty())
            .map(|record| parse(record).unwrap())
            .collect();
        let shown: Vec<(bool, i128, &[u8])> = lines
            .iter()
            .map(|line| (line.stderr, line.time_nanos, line.data.as_ref()))
            .collect();
        assert_eq!(
            shown,
            [
                (false, 2, &b"a b c\n"[..]),
                (false, 2, b"\n"),
                (true, 3, b"rest")
            ]
        );
    }

    #[test]
    fn a_line_without_end_is_cut_into_pieces() {
        let (mut out, mut splitter) = (Vec::new(), Splitter::default());
        splitter.push(false, 1, &vec![b'x'; 3 * MAX_PIECE], &mut out);
        let pieces: Vec<usize> = out
            .split(|byte| *byte == b'\n')
            .filter(|record| !record.is_empty())
            .map(|record| parse(record).unwrap().data.len())
            .collect();
        assert_eq!(pieces, [MAX_PIECE; 3]);
    }

    #[test]
    fn rotation_keeps_the_newest_files_and_reading_goes_on_across_it() {
        let dir = tempfile::tempdir().unwrap();
        let limits = LogLimits {
            max_bytes: 30,
            max_files: 3,
        };
        let mut writer = LogWriter::open(dir.path(), limits).unwrap();
        write(&mut writer, "line 0\n");
        let mut reader = LogReader::open(dir.path(), None).unwrap();
        assert_eq!(collect(&mut reader), ["line 0\n"]);
        for index in 1..4 {
            write(&mut writer, &format!("line {index}\n"));
        }
        assert_eq!(collect(&mut reader), ["line 1\n", "line 2\n", "line 3\n"]);
        for index in 4..40 {
            write(&mut writer, &format!("line {index}\n"));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
        let kept = collect(&mut LogReader::open(dir.path(), None).unwrap());
        assert_eq!(kept.last().unwrap(), "line 39\n");
        assert!(kept.len() >= 6 && kept.len() < 20, "{kept:?}");
        // Those of the file it had open are not lost to it, those between are.
        assert!(collect(&mut reader).ends_with(&kept));
    }

    #[test]
    fn tail_counts_from_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::open(
            dir.path(),
            LogLimits {
                max_bytes: 30,
                max_files: 5,
            },
        )
        .unwrap();
        for index in 0..10 {
            write(&mut writer, &format!("line {index}\n"));
        }
        let tail = |count| collect(&mut LogReader::open(dir.path(), Some(count)).unwrap());
        assert_eq!(tail(2), ["line 8\n", "line 9\n"]);
        assert_eq!(tail(0), Vec::<String>::new());
        assert_eq!(
            tail(100).len(),
            collect(&mut LogReader::open(dir.path(), None).unwrap()).len()
        );
    }

    #[test]
    fn damaged_records_are_left_out() {
        for record in [&b""[..], b"x", b"1 3 F a", b"1 1 X a", b"1 1 F"] {
            assert!(parse(record).is_none(), "{record:?}");
        }
    }
}
