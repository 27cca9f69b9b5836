//! The raft log in a database: how entries, vote and mark are laid out in it.
//!
//! One record per append, cut at 6 KiB, under the first entry's index; a larger
//! entry spans several keys. Larger values would make sled's leaf pages outgrow
//! a segment quarter, and such pages move to `blobs/`, which sled never syncs.
//! Everything here waits for the disk; writes come from the one writer.
//!
//! A small file beside the database, the mark, remembers how far the log was
//! durable: sled takes a damaged tail for a torn one and forgets it silently.

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
/// What fits into a record: its seal and the number of parts take the rest.
const PAYLOAD_MAX: usize = RECORD_MAX - OVERHEAD - 2;
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

/// One record of the log tree.
enum Record {
    /// Whole entries from this index on.
    Entries(Vec<Entry>),
    /// The first piece of an entry that spans this many keys.
    FirstPart(u16, Vec<u8>),
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
        // The mark's name, if it was just created.
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
            disk.truncate_after(Some(committed.index)).await?;
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
        let (durable_next, durable_term) = self.read_mark()?;
        found.last = found.purged;
        let mut next = found.purged.map_or(0, |id| id.index + 1);
        let mut records = self.log.range(Bound::Unbounded, Bound::Unbounded);
        while let Some(item) = records.next() {
            let (raw_key, value) = item.map_err(|e| self.read_failed(e))?;
            let (first, part) = parse_key(&raw_key)
                .ok_or_else(|| self.damaged("raft_log/?".into(), "a key of another form"))?;
            let entries = match self.open_record(first, part, &value) {
                Ok(Record::Entries(entries)) => entries,
                Ok(Record::FirstPart(parts, head)) => {
                    match self.join_parts(first, parts, head, &mut records)? {
                        Some(entry) => vec![entry],
                        // A crash cut the entry short before it was acknowledged.
                        None if first >= durable_next => {
                            self.remove_from(first)?;
                            break;
                        }
                        None => {
                            return Err(self.damaged(key_name(first, 0), "parts are missing"));
                        }
                    }
                }
                Err(error) => return Err(error),
            };
            for entry in entries {
                let id = entry.log_id();
                if id.index < next {
                    // Already purged; deleting it was cut short, or it shares a record.
                    continue;
                }
                if id.index > next {
                    return Err(self.damaged(
                        key_name(first, 0),
                        format!("entry {next} is missing before entry {}", id.index),
                    ));
                }
                next += 1;
                found.last = Some(id);
            }
        }
        if next < durable_next {
            return Err(self.damaged(
                key_name(next, 0),
                format!(
                    "the log ends before entry {next}, but was durable up to entry {durable_next}"
                ),
            ));
        }
        let term = found.vote.map_or(0, |vote| vote.leader_id().term);
        if term < durable_term {
            return Err(self.damaged(
                "raft_meta/vote".into(),
                format!("the vote is of term {term}, but one of term {durable_term} was saved"),
            ));
        }
        Ok(found)
    }

    /// Adds entries behind the last one. Durable after the next [`Disk::sync`].
    pub(crate) fn append(&self, entries: &[Entry]) -> Result<(), DiskError> {
        let mut payload: Vec<u8> = Vec::new();
        let mut first = 0;
        for entry in entries {
            let index = entry.log_id().index;
            let bytes =
                encode(entry).map_err(|e| DiskError::io("encode an entry", &self.path, e))?;
            let size = 4 + bytes.len();
            if !payload.is_empty() && payload.len() + size > PAYLOAD_MAX {
                self.put_record(first, &payload)?;
                payload.clear();
            }
            if size > PAYLOAD_MAX {
                self.put_parts(index, &bytes)?;
                continue;
            }
            if payload.is_empty() {
                first = index;
            }
            payload
                .extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            payload.extend_from_slice(&bytes);
        }
        if payload.is_empty() {
            return Ok(());
        }
        self.put_record(first, &payload)
    }

    fn put_record(&self, first: u64, payload: &[u8]) -> Result<(), DiskError> {
        let key = key(first, 0);
        self.put(&*self.log, &key, self.seal_part(&key, 1, payload))
    }

    fn put_parts(&self, index: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let pieces = bytes.chunks(PAYLOAD_MAX);
        let parts = u16::try_from(pieces.len()).map_err(|_| {
            DiskError::io("split an entry", &self.path, io::ErrorKind::FileTooLarge)
        })?;
        let changes = (0..parts).zip(pieces).map(|(part, piece)| {
            let key = key(index, part);
            (key.to_vec(), Some(self.seal_part(&key, parts, piece)))
        });
        self.log
            .apply(changes.collect())
            .map_err(|e| self.failed("write", e))
    }

    fn seal_part(&self, key: &[u8], parts: u16, payload: &[u8]) -> Vec<u8> {
        let plain = [&parts.to_le_bytes(), payload].concat();
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

    fn open_part(&self, index: u64, part: u16, value: &[u8]) -> Result<(u16, Vec<u8>), DiskError> {
        let plain = self
            .sealer
            .open(&place("raft_log", &key(index, part)), value)
            .map_err(|e| self.damaged(key_name(index, part), e))?;
        match plain.split_first_chunk::<2>() {
            Some((parts, payload)) => Ok((u16::from_le_bytes(*parts), payload.to_vec())),
            None => Err(self.damaged(key_name(index, part), "too short")),
        }
    }

    fn open_record(&self, first: u64, part: u16, value: &[u8]) -> Result<Record, DiskError> {
        let (parts, payload) = self.open_part(first, part, value)?;
        if part != 0 {
            return Err(self.damaged(key_name(first, part), "a part without its beginning"));
        }
        if parts > 1 {
            return Ok(Record::FirstPart(parts, payload));
        }
        let mut rest = payload.as_slice();
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let damaged = |reason: String| self.damaged(key_name(first, 0), reason);
            let (length, tail) = rest
                .split_first_chunk::<4>()
                .ok_or_else(|| damaged("cut short".into()))?;
            let (bytes, tail) = tail
                .split_at_checked(u32::from_le_bytes(*length) as usize)
                .ok_or_else(|| damaged("cut short".into()))?;
            entries.push(self.decode_entry(first, entries.len() as u64, bytes)?);
            rest = tail;
        }
        Ok(Record::Entries(entries))
    }

    fn decode_entry(&self, first: u64, offset: u64, bytes: &[u8]) -> Result<Entry, DiskError> {
        let entry: Entry = decode(bytes).map_err(|e| self.damaged(key_name(first, 0), e))?;
        let (index, expected) = (entry.log_id().index, first + offset);
        if index == expected {
            Ok(entry)
        } else {
            let reason = format!("entry {index} where {expected} belongs");
            Err(self.damaged(key_name(first, 0), reason))
        }
    }

    /// The entry whose first part is `head`; `None` when the log ends before its last part.
    fn join_parts(
        &self,
        index: u64,
        parts: u16,
        head: Vec<u8>,
        records: &mut Pairs,
    ) -> Result<Option<Entry>, DiskError> {
        let mut bytes = head;
        for part in 1..parts {
            let Some(item) = records.next() else {
                return Ok(None);
            };
            let (raw_key, value) = item.map_err(|e| self.read_failed(e))?;
            if raw_key != key(index, part) {
                return Err(self.damaged(key_name(index, part), "missing"));
            }
            bytes.extend_from_slice(&self.open_part(index, part, &value)?.1);
        }
        self.decode_entry(index, 0, &bytes).map(Some)
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
                Record::Entries(entries) => entries,
                Record::FirstPart(parts, head) => self
                    .join_parts(first, parts, head, &mut records)?
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
    pub(crate) async fn truncate_after(&self, keep: Option<u64>) -> Result<(), DiskError> {
        let first_removed = keep.map_or(0, |index| index + 1);
        // Lowered durably before anything disappears.
        let (durable_next, term) = self.read_mark()?;
        if durable_next > first_removed {
            self.write_mark(first_removed, term)?;
            self.mark
                .sync()
                .await
                .map_err(|e| DiskError::io("fdatasync", &self.mark_path, e))?;
        }
        self.remove_from(first_removed)?;
        let Some(keep) = keep else { return Ok(()) };
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
        if let Record::Entries(mut entries) = self.open_record(first, 0, &value)? {
            let before = entries.len();
            entries.retain(|entry| entry.log_id().index <= keep);
            if entries.len() < before {
                self.append(&entries)?;
            }
        }
        Ok(())
    }

    fn remove_from(&self, index: u64) -> Result<(), DiskError> {
        self.remove(self.records(Bound::Included(&key(index, 0)), Bound::Unbounded))
    }

    fn remove(&self, records: Pairs) -> Result<(), DiskError> {
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

    /// Remembers that entries before `next` and a vote of `term` are durable.
    /// Not synced: after a power cut it may be older, never newer than the log.
    pub(crate) fn write_mark(&self, next: u64, term: u64) -> Result<(), DiskError> {
        let plain = [next.to_le_bytes(), term.to_le_bytes()].concat();
        self.mark
            .write_at(&self.sealer.seal(b"log.mark", &plain), 0)
            .map_err(|e| DiskError::io("write", &self.mark_path, e))
    }

    fn read_mark(&self) -> Result<(u64, u64), DiskError> {
        let content = self
            .host
            .read(&self.mark_path)
            .map_err(|e| DiskError::io("read", &self.mark_path, e))?;
        let Some(sealed) = content.first_chunk::<{ OVERHEAD + 16 }>() else {
            return Ok((0, 0));
        };
        let damaged = |reason: String| DiskError::damaged(&self.mark_path, "the mark", reason);
        let plain = self
            .sealer
            .open(b"log.mark", sealed)
            .map_err(|e| damaged(e.to_string()))?;
        let number = |range: std::ops::Range<usize>| {
            plain
                .get(range)
                .and_then(|bytes| bytes.try_into().ok())
                .map(u64::from_le_bytes)
                .ok_or_else(|| damaged("too short".into()))
        };
        Ok((number(0..8)?, number(8..16)?))
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
