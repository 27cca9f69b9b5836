//! The raft log in a database: how entries, vote and mark are laid out in it.
//!
//! One record per append, cut at 6 KiB, under the first entry's index; a larger
//! entry spans several keys. Larger values would make sled's leaf pages outgrow
//! a segment quarter, and such pages move to `blobs/`, which sled never syncs.
//! Everything here waits for the disk; writes come from the one writer.
//!
//! A small file beside the database, the mark, remembers how far the log was
//! durable: sled takes a damaged tail for a torn one and forgets it silently.
//! Damage elsewhere can bring back older versions of pages, each of which opens:
//! so each record says which entry it follows.

use std::io;
use std::ops::{Bound, RangeInclusive};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::entry::RaftEntry as _;
use swarm_disk::{Database, DatabaseError, File, Pairs, Tree};

use crate::error::DiskError;
use crate::seal::{OVERHEAD, Sealer};
use crate::types::{Entry, LogId, Vote, decode, encode};

/// No value in sled is longer.
const RECORD_MAX: usize = 6 * 1024;
/// What fits into a record: its seal and its head take the rest.
const PAYLOAD_MAX: usize = RECORD_MAX - OVERHEAD - Head::BYTES;
/// What stands before each entry of a record that holds whole ones.
const LENGTH: usize = size_of::<u32>();
/// The longest entry that fits whole into a record. A longer one is cut into pieces of this
/// length, so that there are always two or more of them: one alone would be read as whole entries.
pub(crate) const PIECE_MAX: usize = PAYLOAD_MAX - LENGTH;
/// sled's page cache; its default is a gibibyte.
const CACHE_BYTES: u64 = 64 << 20;

/// What was found on disk.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) purged: Option<LogId>,
    pub(crate) last: Option<LogId>,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
}

/// The database, open.
pub(crate) struct Disk {
    host: Arc<dyn swarm_disk::Disk>,
    log: Box<dyn Tree>,
    meta: Box<dyn Tree>,
    db: Arc<dyn Database>,
    mark: Box<dyn File>,
    mark_path: PathBuf,
    path: PathBuf,
    sealer: Sealer,
}

/// Key of a record: first index and part, both big-endian, so that order of keys is order of entries.
fn key(index: u64, part: u16) -> [u8; 10] {
    let mut key = [0; 10];
    key[..8].copy_from_slice(&index.to_be_bytes());
    key[8..].copy_from_slice(&part.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Option<(u64, u16)> {
    let (index, part) = key.split_at_checked(8)?;
    Some((
        u64::from_be_bytes(index.try_into().ok()?),
        u16::from_be_bytes(part.try_into().ok()?),
    ))
}

fn key_name(index: u64, part: u16) -> String {
    format!("raft_log/{index}.{part}")
}

fn place(tree: &str, key: &[u8]) -> Vec<u8> {
    [tree.as_bytes(), b"/", key].concat()
}

/// A place in the log: the index behind an entry, and the entry's term. Nothing before: zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    next: u64,
    term: u64,
}

impl From<Option<LogId>> for Place {
    fn from(last: Option<LogId>) -> Self {
        last.map_or(Self::default(), |id| Self {
            next: id.index + 1,
            term: id.leader_id.term,
        })
    }
}

/// What stands before the payload of a record. A database that has lost some of its pages shows
/// older versions of them: each opens, but they do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    /// How many keys the entry spans.
    parts: u16,
    /// What the record follows.
    after: Place,
    /// Of its first entry.
    term: u64,
}

impl Head {
    const BYTES: usize = 2 + 3 * 8;

    fn encode(self) -> Vec<u8> {
        let mut bytes = self.parts.to_le_bytes().to_vec();
        for number in [self.after.next, self.after.term, self.term] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let number = |at: usize| {
            let bytes = bytes[at..at + 8].try_into();
            u64::from_le_bytes(bytes.expect("a range of eight"))
        };
        Self {
            parts: u16::from_le_bytes([bytes[0], bytes[1]]),
            after: Place {
                next: number(2),
                term: number(10),
            },
            term: number(18),
        }
    }
}

/// How far the log was durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    end: Place,
    /// Of the last vote that was saved.
    vote: u64,
}

impl Mark {
    const BYTES: usize = 3 * 8;

    pub(crate) fn new(last: Option<LogId>, vote: u64) -> Self {
        Self {
            end: last.into(),
            vote,
        }
    }
}

/// One record of the log tree.
enum Record {
    /// Whole entries from this index on.
    Entries(Head, Vec<Entry>),
    /// The first piece of an entry that spans several keys.
    FirstPart(Head, Vec<u8>),
}

impl Disk {
    /// Opens or creates the log in `dir` and checks every record in it.
    pub(crate) async fn open(
        host: Arc<dyn swarm_disk::Disk>,
        dir: &Path,
        sealer: Sealer,
    ) -> Result<(Self, Recovered), DiskError> {
        let log_dir = dir.join("log");
        host.create_dir(dir)
            .map_err(|e| DiskError::io("create", dir, e))?;
        let db_file = log_dir.join("db");
        let failed = |what| {
            let path = db_file.clone();
            move |error| database_failed(what, &path, error)
        };
        let db = host
            .database(&log_dir, CACHE_BYTES)
            .await
            .map_err(failed("open"))?;
        let tree = |name: &str| db.tree(Some(name)).map_err(failed("open a tree"));
        let (log, meta) = (tree("raft_log")?, tree("raft_meta")?);
        let mark_path = dir.join("log.mark");
        if !host.exists(&mark_path) {
            let used = |tree: &dyn Tree| tree.range(Bound::Unbounded, Bound::Unbounded).next();
            if used(&*log).is_some() || used(&*meta).is_some() {
                return Err(DiskError::damaged(
                    &mark_path,
                    "the mark",
                    "it is missing beside a log",
                ));
            }
            // Whole before anything is written to the log: later it is overwritten in its place,
            // within one sector.
            let first = seal_mark(&sealer, Mark::default());
            let aside = dir.join("log.mark.writing");
            swarm_disk::replace(&*host, &mark_path, &aside, &[&first])
                .await
                .map_err(|e| DiskError::io("write", &mark_path, e))?;
        }
        let mark = host
            .open(&mark_path)
            .map_err(|e| DiskError::io("open", &mark_path, e))?;
        let disk = Self {
            log,
            meta,
            path: db.path().to_owned(),
            db,
            mark,
            mark_path,
            sealer,
            host,
        };
        // The names of what is in it.
        disk.host
            .sync_dir(dir)
            .await
            .map_err(|e| DiskError::io("fsync", dir, e))?;
        let recovered = disk.recover()?;
        #[cfg(feature = "museum")]
        let recovered = if swarm_proto::museum::on(swarm_proto::museum::Bug::CutToCommitted)
            && let Some(committed) = recovered.committed
            && recovered.purged < Some(committed)
            && recovered.last > Some(committed)
        {
            disk.truncate_after(Some(committed)).await?;
            Recovered {
                last: Some(committed),
                ..recovered
            }
        } else {
            recovered
        };
        Ok((disk, recovered))
    }

    /// The file that errors are about.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn recover(&self) -> Result<Recovered, DiskError> {
        let mut found = Recovered {
            purged: self.read_meta("purged")?,
            last: None,
            vote: self.read_meta("vote")?,
            committed: self.read_meta("committed")?,
        };
        let mark = self.read_mark()?;
        found.last = found.purged;
        self.check_mark(mark, found.last)?;
        let floor = found.purged.map_or(0, |id| id.index + 1);
        let mut records = self.log.range(Bound::Unbounded, Bound::Unbounded);
        while let Some(item) = records.next() {
            let (raw_key, value) = item.map_err(|e| self.read_failed(e))?;
            let (first, part) = parse_key(&raw_key)
                .ok_or_else(|| self.damaged("raft_log/?".into(), "a key of another form"))?;
            if part != 0 && first < floor {
                // Deleting what is purged was cut short.
                continue;
            }
            let (head, entries) = match self.open_record(first, part, &value)? {
                Record::Entries(head, entries) => (head, entries),
                Record::FirstPart(..) if first < floor => continue,
                Record::FirstPart(head, begun) => {
                    match self.join_parts(first, head, begun, &mut records)? {
                        Some(entry) => (head, vec![entry]),
                        // A crash cut the entry short before it was acknowledged.
                        None if first >= mark.end.next => {
                            self.remove_from(first)?;
                            break;
                        }
                        None => {
                            return Err(self.damaged(key_name(first, 0), "parts are missing"));
                        }
                    }
                }
            };
            let after = Place::from(found.last);
            if first == after.next && head.after != after {
                return Err(self.damaged(
                    key_name(first, 0),
                    format!(
                        "it follows an entry of term {}, but one of term {} is before it",
                        head.after.term, after.term
                    ),
                ));
            }
            for entry in entries {
                let id = entry.log_id();
                if id.index < floor {
                    // Purged; it shares a record, or deleting it was cut short.
                    continue;
                }
                let after = Place::from(found.last);
                let reason = if id.index > after.next {
                    format!("entry {} is missing before entry {}", after.next, id.index)
                } else if id.index < after.next {
                    format!("entry {} is there twice", id.index)
                } else if id.leader_id.term < after.term {
                    format!(
                        "entry {} is of an earlier term than the one before",
                        id.index
                    )
                } else {
                    found.last = Some(id);
                    self.check_mark(mark, found.last)?;
                    continue;
                };
                return Err(self.damaged(key_name(first, 0), reason));
            }
        }
        let next = Place::from(found.last).next;
        if next < mark.end.next {
            return Err(self.damaged(
                key_name(next, 0),
                format!(
                    "the log ends before entry {next}, but was durable up to entry {}",
                    mark.end.next
                ),
            ));
        }
        let term = found.vote.map_or(0, |vote| vote.leader_id().term);
        if term < mark.vote {
            return Err(self.damaged(
                "raft_meta/vote".into(),
                format!(
                    "the vote is of term {term}, but one of term {} was saved",
                    mark.vote
                ),
            ));
        }
        Ok(found)
    }

    /// The entry that was the last durable one must still be what it was.
    fn check_mark(&self, mark: Mark, last: Option<LogId>) -> Result<(), DiskError> {
        let here = Place::from(last);
        if here.next == mark.end.next && here.term != mark.end.term {
            return Err(self.damaged(
                key_name(here.next.saturating_sub(1), 0),
                format!(
                    "the entry is of term {}, but one of term {} was durable there",
                    here.term, mark.end.term
                ),
            ));
        }
        Ok(())
    }

    /// Adds entries behind this one. Durable after the next [`Disk::sync`].
    pub(crate) fn append(&self, after: Option<LogId>, entries: &[Entry]) -> Result<(), DiskError> {
        self.append_after(after.into(), entries)
    }

    fn append_after(&self, mut after: Place, entries: &[Entry]) -> Result<(), DiskError> {
        let head = |after: Place, entry: &Entry| Head {
            parts: 1,
            after,
            term: entry.log_id().leader_id.term,
        };
        // The record that is being filled: its first index, its head, its payload.
        let mut record: Option<(u64, Head, Vec<u8>)> = None;
        for entry in entries {
            let id = entry.log_id();
            let bytes =
                encode(entry).map_err(|e| DiskError::io("encode an entry", &self.path, e))?;
            let size = LENGTH + bytes.len();
            if let Some((first, head, payload)) =
                record.take_if(|(.., payload)| payload.len() + size > PAYLOAD_MAX)
            {
                self.put_record(first, head, &payload)?;
            }
            if bytes.len() > PIECE_MAX {
                self.put_parts(id.index, head(after, entry), &bytes)?;
            } else {
                let (.., payload) =
                    record.get_or_insert_with(|| (id.index, head(after, entry), Vec::new()));
                payload.extend_from_slice(
                    &u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes(),
                );
                payload.extend_from_slice(&bytes);
            }
            after = Some(id).into();
        }
        match record {
            None => Ok(()),
            Some((first, head, payload)) => self.put_record(first, head, &payload),
        }
    }

    fn put_record(&self, first: u64, head: Head, payload: &[u8]) -> Result<(), DiskError> {
        let key = key(first, 0);
        self.put(&*self.log, &key, self.seal_part(&key, head, payload))
    }

    fn put_parts(&self, index: u64, head: Head, bytes: &[u8]) -> Result<(), DiskError> {
        let pieces = bytes.chunks(PIECE_MAX);
        let parts = u16::try_from(pieces.len()).map_err(|_| {
            DiskError::io("split an entry", &self.path, io::ErrorKind::FileTooLarge)
        })?;
        let head = Head { parts, ..head };
        let changes = (0..parts).zip(pieces).map(|(part, piece)| {
            let key = key(index, part);
            (key.to_vec(), Some(self.seal_part(&key, head, piece)))
        });
        self.log
            .apply(changes.collect())
            .map_err(|e| self.failed("write", e))
    }

    fn seal_part(&self, key: &[u8], head: Head, payload: &[u8]) -> Vec<u8> {
        let plain = [&head.encode(), payload].concat();
        self.sealer.seal(&place("raft_log", key), &plain)
    }

    fn put(&self, tree: &dyn Tree, key: &[u8], value: Vec<u8>) -> Result<(), DiskError> {
        tree.put(key, value).map_err(|e| self.failed("write", e))
    }

    fn removed(&self, tree: &dyn Tree, key: &[u8]) -> Result<(), DiskError> {
        tree.remove(key).map_err(|e| self.failed("delete", e))
    }

    fn records(&self, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Pairs {
        self.log.range(from, to)
    }

    fn open_part(&self, index: u64, part: u16, value: &[u8]) -> Result<(Head, Vec<u8>), DiskError> {
        let plain = self
            .sealer
            .open(&place("raft_log", &key(index, part)), value)
            .map_err(|e| self.damaged(key_name(index, part), e))?;
        match plain.split_first_chunk::<{ Head::BYTES }>() {
            Some((head, payload)) => Ok((Head::decode(head), payload.to_vec())),
            None => Err(self.damaged(key_name(index, part), "too short")),
        }
    }

    fn open_record(&self, first: u64, part: u16, value: &[u8]) -> Result<Record, DiskError> {
        let (head, payload) = self.open_part(first, part, value)?;
        if part != 0 {
            return Err(self.damaged(key_name(first, part), "a part without its beginning"));
        }
        if head.parts > 1 {
            return Ok(Record::FirstPart(head, payload));
        }
        parse_entries(first, &payload)
            .map(|entries| Record::Entries(head, entries))
            .map_err(|reason| self.damaged(key_name(first, 0), reason))
    }

    /// The entry that begins like this; `None` when the log ends before its last part.
    fn join_parts(
        &self,
        index: u64,
        head: Head,
        begun: Vec<u8>,
        records: &mut Pairs,
    ) -> Result<Option<Entry>, DiskError> {
        let mut bytes = begun;
        for part in 1..head.parts {
            let Some(item) = records.next() else {
                return Ok(None);
            };
            let (raw_key, value) = item.map_err(|e| self.read_failed(e))?;
            if raw_key != key(index, part) {
                return Err(self.damaged(key_name(index, part), "missing"));
            }
            let (of, piece) = self.open_part(index, part, &value)?;
            if of != head {
                return Err(self.damaged(key_name(index, part), "a part of another entry"));
            }
            bytes.extend_from_slice(&piece);
        }
        decode_entry(index, &bytes)
            .map(Some)
            .map_err(|reason| self.damaged(key_name(index, 0), reason))
    }

    /// The entries with these indexes that are there, in order; stops after the
    /// one with which `max_bytes` are reached.
    pub(crate) fn read(
        &self,
        wanted: RangeInclusive<u64>,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, DiskError> {
        let (from, to) = (*wanted.start(), *wanted.end());
        // The record that holds `from` begins at or before it.
        let start = match self
            .records(Bound::Unbounded, Bound::Included(&key(from, 0)))
            .next_back()
        {
            None => from,
            Some(item) => {
                let (raw_key, _) = item.map_err(|e| self.read_failed(e))?;
                match parse_key(&raw_key) {
                    // A part further on: that entry is before `from`.
                    Some((first, 0)) => first,
                    _ => from,
                }
            }
        };
        let mut records = self.records(
            Bound::Included(&key(start, 0)),
            Bound::Included(&key(to, u16::MAX)),
        );
        let mut entries = Vec::new();
        let mut bytes = 0;
        while let Some(item) = records.next() {
            let (raw_key, value) = item.map_err(|e| self.read_failed(e))?;
            let (first, part) = parse_key(&raw_key)
                .ok_or_else(|| self.damaged("raft_log/?".into(), "a key of another form"))?;
            let found = match self.open_record(first, part, &value)? {
                Record::Entries(_, entries) => entries,
                Record::FirstPart(head, begun) => self
                    .join_parts(first, head, begun, &mut records)?
                    .into_iter()
                    .collect(),
            };
            for entry in found {
                if wanted.contains(&entry.log_id().index) {
                    bytes += entry_size(&entry);
                    entries.push(entry);
                    if bytes >= max_bytes {
                        return Ok(entries);
                    }
                }
            }
        }
        Ok(entries)
    }

    /// Removes everything after `keep` (everything for `None`).
    pub(crate) async fn truncate_after(&self, keep: Option<LogId>) -> Result<(), DiskError> {
        let end = Place::from(keep);
        // Lowered durably before anything disappears.
        let mark = self.read_mark()?;
        if mark.end.next > end.next {
            self.write_mark(Mark { end, ..mark })?;
            self.mark
                .sync()
                .await
                .map_err(|e| DiskError::io("fdatasync", &self.mark_path, e))?;
        }
        self.remove_from(end.next)?;
        let Some(keep) = keep.map(|id| id.index) else {
            return Ok(());
        };
        let Some(item) = self
            .records(Bound::Unbounded, Bound::Included(&key(keep, 0)))
            .next_back()
        else {
            return Ok(());
        };
        let (raw_key, value) = item.map_err(|e| self.read_failed(e))?;
        let Some((first, 0)) = parse_key(&raw_key) else {
            return Ok(());
        };
        if let Record::Entries(head, mut entries) = self.open_record(first, 0, &value)? {
            let before = entries.len();
            entries.retain(|entry| entry.log_id().index <= keep);
            if entries.len() < before {
                self.append_after(head.after, &entries)?;
            }
        }
        Ok(())
    }

    /// From the end: a crash leaves an entry without its end, never an end without its beginning.
    fn remove_from(&self, index: u64) -> Result<(), DiskError> {
        self.remove(
            self.records(Bound::Included(&key(index, 0)), Bound::Unbounded)
                .rev(),
        )
    }

    fn remove(
        &self,
        records: impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), DatabaseError>>,
    ) -> Result<(), DiskError> {
        for record in records {
            let (raw_key, _) = record.map_err(|e| self.read_failed(e))?;
            self.removed(&*self.log, &raw_key)?;
        }
        Ok(())
    }

    /// Forgets everything up to `upto`. The marker goes first: entries that a
    /// crash leaves behind are below it and count as gone.
    pub(crate) fn purge(&self, upto: &LogId, last: u64) -> Result<(), DiskError> {
        self.write_meta("purged", upto)?;
        if last <= upto.index {
            let end = key(upto.index, u16::MAX);
            return self.remove(self.records(Bound::Unbounded, Bound::Included(&end)));
        }
        // A record ends where the next begins; the one that `upto` lies in stays.
        let mut record: Vec<Vec<u8>> = Vec::new();
        let end = key(upto.index + 1, 0);
        for item in self.records(Bound::Unbounded, Bound::Included(&end)) {
            let (raw_key, _) = item.map_err(|e| self.read_failed(e))?;
            if matches!(parse_key(&raw_key), Some((_, 0))) {
                for done in record.drain(..) {
                    self.removed(&*self.log, &done)?;
                }
            }
            record.push(raw_key);
        }
        Ok(())
    }

    /// Saves the vote. Durable after the next [`Disk::sync`].
    pub(crate) fn save_vote(&self, vote: &Vote) -> Result<(), DiskError> {
        self.write_meta("vote", vote)
    }

    /// Saves how far entries are known to be committed: a hint that need not be durable.
    pub(crate) fn save_committed(&self, committed: &Option<LogId>) -> Result<(), DiskError> {
        match committed {
            Some(committed) => self.write_meta("committed", committed),
            None => self.removed(&*self.meta, b"committed"),
        }
    }

    fn write_meta<T: serde::Serialize>(&self, name: &str, value: &T) -> Result<(), DiskError> {
        let bytes = encode(value).map_err(|e| DiskError::io("encode", &self.path, e))?;
        let sealed = self
            .sealer
            .seal(&place("raft_meta", name.as_bytes()), &bytes);
        self.put(&*self.meta, name.as_bytes(), sealed)
    }

    fn read_meta<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>, DiskError> {
        let key = || format!("raft_meta/{name}");
        let Some(value) = self
            .meta
            .get(name.as_bytes())
            .map_err(|e| self.read_failed(e))?
        else {
            return Ok(None);
        };
        let bytes = self
            .sealer
            .open(&place("raft_meta", name.as_bytes()), &value)
            .map_err(|e| self.damaged(key(), e))?;
        decode(&bytes).map(Some).map_err(|e| self.damaged(key(), e))
    }

    /// Returns when everything written so far is on the disk itself.
    pub(crate) async fn sync(&self) -> Result<(), DiskError> {
        self.db
            .sync()
            .await
            .map_err(|e| self.failed("fdatasync", e))
    }

    /// Remembers how far the log is durable. Not synced: after a power cut it may be older,
    /// never newer than the log.
    pub(crate) fn write_mark(&self, mark: Mark) -> Result<(), DiskError> {
        self.mark
            .write_at(&seal_mark(&self.sealer, mark), 0)
            .map_err(|e| DiskError::io("write", &self.mark_path, e))
    }

    fn read_mark(&self) -> Result<Mark, DiskError> {
        let content = self
            .host
            .read(&self.mark_path)
            .map_err(|e| DiskError::io("read", &self.mark_path, e))?;
        let damaged = |reason: String| DiskError::damaged(&self.mark_path, "the mark", reason);
        let plain = self
            .sealer
            .open(b"log.mark", &content)
            .map_err(|e| damaged(e.to_string()))?;
        let plain: [u8; Mark::BYTES] = plain
            .try_into()
            .map_err(|_| damaged("of another length".into()))?;
        let number = |at: usize| {
            let bytes = plain[at..at + 8].try_into();
            u64::from_le_bytes(bytes.expect("a range of eight"))
        };
        Ok(Mark {
            end: Place {
                next: number(0),
                term: number(8),
            },
            vote: number(16),
        })
    }

    /// The records as they are, to bring back older ones.
    #[cfg(test)]
    pub(crate) fn raw(&self) -> &dyn Tree {
        &*self.log
    }

    /// One on which the next sync cannot be completed.
    #[cfg(test)]
    pub(crate) fn failing(self) -> Self {
        let mark = std::fs::File::open(&self.mark_path).unwrap();
        let mark = Box::new(mark);
        Self { mark, ..self }
    }

    fn read_failed(&self, error: DatabaseError) -> DiskError {
        self.failed("read", error)
    }

    fn failed(&self, what: &'static str, error: DatabaseError) -> DiskError {
        database_failed(what, &self.path, error)
    }

    fn damaged(&self, key: String, reason: impl ToString) -> DiskError {
        DiskError::damaged(&self.path, key, reason)
    }
}

fn seal_mark(sealer: &Sealer, mark: Mark) -> Vec<u8> {
    let numbers = [mark.end.next, mark.end.term, mark.vote];
    sealer.seal(b"log.mark", &numbers.map(u64::to_le_bytes).concat())
}

/// Takes the entries out of a record that begins with entry `first`, each behind its length.
pub(crate) fn parse_entries(first: u64, payload: &[u8]) -> Result<Vec<Entry>, String> {
    let mut rest = payload;
    let mut entries = Vec::new();
    let mut next = first;
    while !rest.is_empty() {
        let (length, tail) = rest.split_first_chunk::<LENGTH>().ok_or("cut short")?;
        let (bytes, tail) = tail
            .split_at_checked(u32::from_le_bytes(*length) as usize)
            .ok_or("cut short")?;
        entries.push(decode_entry(next, bytes)?);
        next = next.checked_add(1).ok_or("its entries have no numbers")?;
        rest = tail;
    }
    Ok(entries)
}

fn decode_entry(expected: u64, bytes: &[u8]) -> Result<Entry, String> {
    let entry: Entry = decode(bytes).map_err(|e| e.to_string())?;
    match entry.log_id().index {
        index if index == expected => Ok(entry),
        index => Err(format!("entry {index} where {expected} belongs")),
    }
}

/// What an entry counts for in limits of bytes.
pub(crate) fn entry_size(entry: &Entry) -> usize {
    const FIXED: usize = 64;
    match &entry.payload {
        openraft::EntryPayload::Normal(command) => FIXED + command.size(),
        _ => 4 * FIXED,
    }
}

fn database_failed(what: &'static str, path: &Path, error: DatabaseError) -> DiskError {
    match error {
        DatabaseError::Corrupt(reason) => DiskError::damaged(path, "a page", reason),
        DatabaseError::Io(error) => DiskError::io(what, path, error),
    }
}
