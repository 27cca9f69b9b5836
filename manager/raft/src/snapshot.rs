//! Snapshots as plain files: written aside, synced, renamed, directory synced.
//!
//! A file holds a magic number and a random identifier, then pieces, each sealed on its own behind its length: the
//! snapshot's place in the log, the encoded state in pieces of whole records, and an empty one that ends it. What
//! is sealed with a piece says which one of which file it is, so none can be missing, be there twice, or come from elsewhere.
//! A state of a million tasks has hundreds of megabytes, of which one piece is in memory while it is written.
//! A file that does not open is refused with its name, never skipped: the log before it is gone. Everything here
//! waits for the disk.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use swarm_disk::{Blocking, Disk, Replacement};
use swarm_store::{PIECE_MAX, State};
use tokio::sync::Semaphore;

use crate::error::{DiskError, FatalReporter, chain};
use crate::seal::{OVERHEAD, Sealer};
use crate::types::{CodecError, LogId, Snapshot, SnapshotMeta, decode, encode};

/// The first bytes of a snapshot file, with the version of what follows.
const MAGIC: &[u8; 8] = b"SWSNAP\0\x02";
/// Of the version before, which is still read: one sealed record.
const MAGIC_ONE: &[u8; 8] = b"SWSNAP\0\x01";
const SUFFIX: &str = ".snapshot";

/// Bytes of a file's identifier.
const ID: usize = 16;
/// Bytes of the length before each piece.
const LENGTH: usize = 4;
/// The first piece: what is not the state.
const META: u64 = 0;

/// The snapshots of one member: one that counts, and perhaps one being written.
#[derive(Clone)]
pub(crate) struct Snapshots {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    sealer: Sealer,
    current: Arc<Mutex<Option<Current>>>,
    /// Held while one is written. Closed when the member has stopped.
    writing: Arc<Semaphore>,
}

#[derive(Clone)]
struct Current {
    meta: SnapshotMeta,
    path: PathBuf,
}

impl Snapshots {
    /// Opens the directory and reads the newest snapshot, which is returned.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        sealer: Sealer,
    ) -> Result<(Self, Option<Restored>), DiskError> {
        disk.create_dir(dir)
            .map_err(|e| DiskError::io("create", dir, e))?;
        let mut files: Vec<PathBuf> = Vec::new();
        let listing = disk.list(dir).map_err(|e| DiskError::io("list", dir, e))?;
        for path in listing {
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.ends_with(SUFFIX)) {
                files.push(path);
            } else {
                // Cut short by a crash, before the rename that makes it count.
                remove(&*disk, &path)?;
            }
        }
        // Names are padded, so their order is the order in the log.
        files.sort();
        let snapshots = Self {
            disk,
            dir: dir.to_owned(),
            sealer,
            current: Arc::default(),
            writing: Arc::new(Semaphore::new(1)),
        };
        let Some(newest) = files.pop() else {
            return Ok((snapshots, None));
        };
        let found = snapshots.load(&newest, |file| file.restore())?;
        *snapshots.current.lock() = Some(Current {
            meta: found.meta.clone(),
            path: newest,
        });
        files
            .iter()
            .try_for_each(|path| remove(&*snapshots.disk, path))?;
        Ok((snapshots, Some(found)))
    }

    /// Where the snapshots are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The place of the newest snapshot in the log.
    pub(crate) fn newest(&self) -> Option<SnapshotMeta> {
        let current = self.current.lock();
        current.as_ref().map(|current| current.meta.clone())
    }

    /// The newest snapshot, read from its file.
    fn newest_records(&self) -> Result<Option<(SnapshotMeta, Bytes)>, DiskError> {
        loop {
            let Some(current) = self.current.lock().clone() else {
                return Ok(None);
            };
            match self.load(&current.path, |file| file.records()) {
                Ok(records) => return Ok(Some(records)),
                // A newer one has taken its place meanwhile.
                Err(_) if !self.is_current(&current.path) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn is_current(&self, path: &Path) -> bool {
        let current = self.current.lock();
        current.as_ref().is_some_and(|current| current.path == path)
    }

    /// Writes a snapshot of a state in pieces, and deletes the one before it. One that is not newer is not
    /// written, and none after [`Snapshots::close`], when nobody asks for it any more.
    pub(crate) async fn save<P: AsRef<[u8]>>(
        &self,
        meta: &SnapshotMeta,
        state: impl Iterator<Item = P> + Send,
    ) -> Result<(), DiskError> {
        let Ok(_writing) = self.writing.acquire().await else {
            return Ok(());
        };
        if self.is_behind(meta) {
            return Ok(());
        }
        let (term, index) = meta
            .last_log_id
            .map_or((0, 0), |id| (id.leader_id.term, id.index));
        let path = self.dir.join(format!("{index:020}-{term:020}{SUFFIX}"));
        let aside = path.with_extension("writing");
        let file = sealed(&self.sealer, meta, state);
        let file = file.map_err(|e| DiskError::io("encode", &path, e))?;
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::SnapshotNotSynced) {
            let whole = file.collect::<Vec<_>>().concat();
            let write = || {
                self.disk.open(&aside)?.write_at(&whole, 0)?;
                self.disk.rename(&aside, &path)
            };
            write().map_err(|e| DiskError::io("write", &path, e))?;
            *self.current.lock() = Some(Current {
                meta: meta.clone(),
                path,
            });
            return Ok(());
        }
        self.put(&path, &aside, file)
            .await
            .map_err(|e| DiskError::io("write", &path, e))?;
        let superseded = {
            let mut current = self.current.lock();
            let newer = current
                .as_ref()
                .is_none_or(|current| current.meta.last_log_id <= meta.last_log_id);
            let written = Current {
                meta: meta.clone(),
                path: path.clone(),
            };
            if newer {
                current.replace(written)
            } else {
                Some(written)
            }
        };
        match superseded {
            Some(old) if old.path != path || !self.is_current(&path) => {
                remove(&*self.disk, &old.path)
            }
            _ => Ok(()),
        }
    }

    async fn put(
        &self,
        path: &Path,
        aside: &Path,
        content: impl Iterator<Item = Vec<u8>> + Send,
    ) -> io::Result<()> {
        let mut file = Replacement::begin(&*self.disk, path, aside)?;
        for part in content {
            file.append(&part).await?;
        }
        file.finish().await
    }

    /// Waits for the one that is being written, and has no more written: the directory may be opened again by
    /// a member that is started in its place, and what that one has found must not be deleted.
    pub(crate) async fn close(&self) {
        let last = self.writing.acquire().await;
        self.writing.close();
        drop(last);
    }

    fn is_behind(&self, meta: &SnapshotMeta) -> bool {
        let current = self.current.lock();
        current
            .as_ref()
            .is_some_and(|current| current.meta.last_log_id >= meta.last_log_id)
    }

    /// The last entry in the newest snapshot.
    pub(crate) fn last(&self) -> Option<LogId> {
        let current = self.current.lock();
        current
            .as_ref()
            .and_then(|current| current.meta.last_log_id)
    }

    fn load<T>(
        &self,
        path: &Path,
        read: impl FnOnce(SnapshotFile<'_>) -> Result<T, String>,
    ) -> Result<T, DiskError> {
        let bytes = self
            .disk
            .read(path)
            .map_err(|e| DiskError::io("read", path, e))?;
        SnapshotFile::open(&self.sealer, &bytes)
            .and_then(read)
            .map_err(|reason| DiskError::damaged(path, "the snapshot", reason))
    }
}

/// A snapshot as a member starts from it.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) meta: SnapshotMeta,
    pub(crate) state: State,
    /// Of the encoded state.
    pub(crate) bytes: u64,
}

/// The encoded state of a snapshot, on its way through openraft.
#[derive(Clone)]
pub enum Records {
    /// They have been received.
    Here(Bytes),
    /// In the member's newest file. openraft asks for a snapshot at each start, and most often only wants
    /// to know which entries it holds.
    Filed(Filed),
}

/// The newest snapshot of a member, to be read when it is sent.
#[derive(Clone)]
pub struct Filed {
    pub(crate) snapshots: Snapshots,
    pub(crate) blocking: Blocking,
    pub(crate) fatal: FatalReporter,
}

impl Filed {
    async fn read(self) -> io::Result<(SnapshotMeta, Bytes)> {
        let snapshots = self.snapshots.clone();
        let reading = self.blocking.run(async move { snapshots.newest_records() });
        match reading.await.map_err(io::Error::other)? {
            Ok(newest) => newest.ok_or_else(|| io::ErrorKind::NotFound.into()),
            Err(error) => {
                self.fatal
                    .report("reading a snapshot", self.snapshots.dir(), chain(&error));
                Err(error.into())
            }
        }
    }
}

/// The records of a snapshot, read if they are not here: those of a newer one, if there is one by now.
pub(crate) async fn read(snapshot: Snapshot) -> io::Result<(SnapshotMeta, Bytes)> {
    match snapshot.snapshot {
        Records::Here(bytes) => Ok((snapshot.meta, bytes)),
        Records::Filed(filed) => filed.read().await,
    }
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Here(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::Filed(_) => f.write_str("in a file"),
        }
    }
}

/// What is sealed with a piece: which one of which file it is.
fn place(id: [u8; ID], number: u64, last: bool) -> [u8; MAGIC.len() + ID + 9] {
    let mut place = [0; MAGIC.len() + ID + 9];
    let (magic, rest) = place.split_at_mut(MAGIC.len());
    let (file, rest) = rest.split_at_mut(ID);
    magic.copy_from_slice(MAGIC);
    file.copy_from_slice(&id);
    rest[..8].copy_from_slice(&number.to_le_bytes());
    rest[8] = last.into();
    place
}

/// The content of a snapshot file, one part after the other.
pub(crate) fn sealed<P: AsRef<[u8]>>(
    sealer: &Sealer,
    meta: &SnapshotMeta,
    mut state: impl Iterator<Item = P> + Send,
) -> Result<impl Iterator<Item = Vec<u8>> + Send, CodecError> {
    let id: [u8; ID] = rand::random();
    let sealer = sealer.clone();
    let seal = move |number: u64, plain: &[u8], last: bool| {
        let length = u32::try_from(plain.len() + OVERHEAD).expect("a piece is some megabytes");
        let mut piece = Vec::with_capacity(LENGTH + plain.len() + OVERHEAD);
        piece.extend_from_slice(&length.to_le_bytes());
        sealer.seal_to(&place(id, number, last), plain, &mut piece);
        piece
    };
    let begin = [&MAGIC[..], &id, &seal(META, &encode(meta)?, false)].concat();
    let mut number = META;
    let mut ended = false;
    let pieces = std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let piece = state.next();
        ended = piece.is_none();
        number += 1;
        let plain = piece.as_ref().map_or(&[][..], AsRef::as_ref);
        Some(seal(number, plain, ended))
    });
    Ok(std::iter::once(begin).chain(pieces))
}

/// A snapshot file that was read, with its first and its last piece opened.
pub(crate) struct SnapshotFile<'a> {
    meta: SnapshotMeta,
    state: EncodedState<'a>,
}

enum EncodedState<'a> {
    /// Of this version.
    Pieces(Pieces<'a>),
    /// Of the version before.
    One(Bytes),
}

/// The pieces of a state, sealed.
struct Pieces<'a> {
    sealer: &'a Sealer,
    id: [u8; ID],
    file: &'a [u8],
    /// Their numbers and where they are in the file.
    places: Vec<(u64, Range<usize>)>,
}

impl Pieces<'_> {
    fn open(&self, (number, sealed): &(u64, Range<usize>)) -> Result<Vec<u8>, String> {
        let place = place(self.id, *number, false);
        open_piece(self.sealer, &place, &self.file[sealed.clone()])
    }
}

impl<'a> SnapshotFile<'a> {
    pub(crate) fn open(sealer: &'a Sealer, file: &'a [u8]) -> Result<Self, String> {
        if let Some(sealed) = file.strip_prefix(MAGIC_ONE) {
            return Self::open_one(sealer, sealed);
        }
        let (id, _) = file
            .strip_prefix(MAGIC)
            .ok_or("not a snapshot, or one of a newer build")?
            .split_first_chunk::<ID>()
            .ok_or("cut short")?;
        let mut pieces = Vec::new();
        let mut at = MAGIC.len() + ID;
        while at < file.len() {
            let length = file[at..].first_chunk::<LENGTH>().ok_or("cut short")?;
            let length = u32::from_le_bytes(*length) as usize;
            let piece = at + LENGTH..at + LENGTH + length;
            let possible = OVERHEAD..=PIECE_MAX + OVERHEAD;
            if !possible.contains(&length) || piece.end > file.len() {
                return Err("cut short, or a length is damaged".to_owned());
            }
            at = piece.end;
            pieces.push((pieces.len() as u64, piece));
        }
        let (end, meta) = (pieces.pop(), pieces.first().cloned());
        let (Some((end, sealed_end)), Some((_, sealed_meta))) = (end, meta) else {
            return Err("cut short".to_owned());
        };
        open_piece(sealer, &place(*id, end, true), &file[sealed_end])?;
        let meta = open_piece(sealer, &place(*id, META, false), &file[sealed_meta])?;
        pieces.remove(0);
        Ok(Self {
            meta: decode(&meta).map_err(|error| error.to_string())?,
            state: EncodedState::Pieces(Pieces {
                sealer,
                id: *id,
                file,
                places: pieces,
            }),
        })
    }

    /// The version before: behind its length the place in the log, then the state, all in one record.
    fn open_one(sealer: &Sealer, sealed: &[u8]) -> Result<Self, String> {
        let plain = open_piece(sealer, MAGIC_ONE, sealed)?;
        let (length, _) = plain.split_first_chunk::<LENGTH>().ok_or("cut short")?;
        let meta_end = LENGTH + u32::from_le_bytes(*length) as usize;
        let meta = plain.get(LENGTH..meta_end).ok_or("cut short")?;
        Ok(Self {
            meta: decode(meta).map_err(|error| error.to_string())?,
            state: EncodedState::One(Bytes::from(plain).slice(meta_end..)),
        })
    }

    /// The state, decoded.
    pub(crate) fn restore(self) -> Result<Restored, String> {
        let (bytes, state) = match self.state {
            EncodedState::Pieces(pieces) => {
                let lengths = pieces
                    .places
                    .iter()
                    .map(|(_, piece)| piece.len() - OVERHEAD);
                let state = State::decode_pieces(&pieces.places, |piece| pieces.open(piece));
                (lengths.sum(), state)
            }
            EncodedState::One(state) => (state.len(), State::decode(&state)),
        };
        Ok(Restored {
            meta: self.meta,
            state: state.map_err(|error| error.to_string())?,
            bytes: bytes as u64,
        })
    }

    /// The encoded state, as it is sent to another member.
    pub(crate) fn records(self) -> Result<(SnapshotMeta, Bytes), String> {
        let state = match self.state {
            EncodedState::Pieces(pieces) => {
                let mut state = Vec::with_capacity(pieces.file.len());
                for piece in &pieces.places {
                    state.extend_from_slice(&pieces.open(piece)?);
                }
                state.into()
            }
            EncodedState::One(state) => state,
        };
        Ok((self.meta, state))
    }
}

fn open_piece(sealer: &Sealer, place: &[u8], sealed: &[u8]) -> Result<Vec<u8>, String> {
    sealer
        .open(place, sealed)
        .map_err(|error| error.to_string())
}

fn remove(disk: &dyn Disk, path: &Path) -> Result<(), DiskError> {
    match disk.remove(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(DiskError::io("delete", path, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use openraft::vote::RaftLeaderIdExt as _;
    use swarm_disk::SystemDisk;
    use swarm_identity::DataKey;

    fn meta(index: u64) -> SnapshotMeta {
        let term = openraft::impls::leader_id_std::LeaderId::<u64, u64>::new_committed(1, 1);
        SnapshotMeta {
            last_log_id: Some(LogId {
                leader_id: term,
                index,
            }),
            ..SnapshotMeta::default()
        }
    }

    /// After an entry that does nothing.
    fn state(index: u64) -> State {
        let empty = swarm_store::testing::transaction([]);
        State::default().apply(index, &empty).unwrap().state
    }

    async fn save(snapshots: &Snapshots, index: u64) {
        let state = state(index);
        snapshots.save(&meta(index), state.pieces()).await.unwrap();
    }

    #[tokio::test]
    async fn the_newest_snapshot_survives_and_older_ones_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::new(&DataKey::random());
        let (snapshots, found) =
            Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone()).unwrap();
        assert!(found.is_none());
        for index in [10, 20, 15] {
            save(&snapshots, index).await;
        }
        std::fs::write(dir.path().join("00000000000000000030.writing"), b"half").unwrap();

        let (snapshots, found) = Snapshots::open(SystemDisk::shared(), dir.path(), sealer).unwrap();
        let found = found.unwrap();
        assert_eq!(found.meta, meta(20));
        assert_eq!(found.state, state(20));
        assert_eq!(snapshots.last(), meta(20).last_log_id);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn who_has_stopped_deletes_nothing_that_another_one_has_found() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::new(&DataKey::random());
        let (snapshots, _) =
            Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone()).unwrap();
        save(&snapshots, 10).await;
        let writing = snapshots.writing.clone().acquire_owned().await.unwrap();
        let mut close = Box::pin(snapshots.close());
        assert!(
            close.as_mut().now_or_never().is_none(),
            "one is being written"
        );
        drop(writing);
        close.await;
        let (next, _) = Snapshots::open(SystemDisk::shared(), dir.path(), sealer).unwrap();
        save(&snapshots, 20).await;
        let (found, records) = next.newest_records().unwrap().unwrap();
        assert_eq!((found, &records[..]), (meta(10), &state(10).encode()[..]));
    }

    #[tokio::test]
    async fn a_damaged_snapshot_is_refused_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::new(&DataKey::random());
        let (snapshots, _) =
            Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone()).unwrap();
        save(&snapshots, 10).await;
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap();
        let path = file.unwrap().path();
        let whole = std::fs::read(&path).unwrap();
        for place in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            let error = Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone())
                .err()
                .unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    /// A state of a few pieces.
    fn large() -> State {
        use swarm_store::testing::{create, node, transaction};
        let nodes = (0..300).map(|number| {
            let mut node = node(&format!("node{number}"), "10.0.0.1");
            let spec = node.spec.get_or_insert_default();
            let labels = &mut spec.annotations.get_or_insert_default().labels;
            labels.insert("long".to_owned(), "x".repeat(4000));
            create(node)
        });
        let state = State::default().apply(1, &transaction(nodes)).unwrap();
        state.state
    }

    fn file_of(state: &State, sealer: &Sealer) -> Vec<u8> {
        let meta = meta(1);
        let parts = sealed(sealer, &meta, state.pieces()).unwrap();
        parts.collect::<Vec<_>>().concat()
    }

    #[test]
    fn pieces_give_the_state_and_the_same_bytes() {
        let state = large();
        let sealer = Sealer::new(&DataKey::random());
        let bytes = file_of(&state, &sealer);
        let open = || SnapshotFile::open(&sealer, &bytes).unwrap();
        let restored = open().restore().unwrap();
        assert_eq!(restored.state, state);
        assert_eq!(restored.meta, meta(1));
        let (read, records) = open().records().unwrap();
        assert_eq!(read, meta(1));
        assert_eq!(records, state.encode());
        assert_eq!(restored.bytes, records.len() as u64);
    }

    #[test]
    fn no_piece_is_missing_moved_doubled_or_another_files() {
        let state = large();
        let sealer = Sealer::new(&DataKey::random());
        let bytes = file_of(&state, &sealer);
        let EncodedState::Pieces(pieces) = SnapshotFile::open(&sealer, &bytes).unwrap().state
        else {
            panic!("of this version");
        };
        let places: Vec<_> = pieces
            .places
            .into_iter()
            .map(|(_, sealed)| sealed.start - LENGTH..sealed.end)
            .collect();
        assert!(places.len() > 3, "{} pieces", places.len());
        let (one, two) = (places[0].clone(), places[1].clone());
        let cut = |from: usize, to: usize| [&bytes[..from], &bytes[to..]].concat();
        let last = places.last().unwrap().end;
        let twice = [&bytes[..one.end], &bytes[one.start..]].concat();
        let swapped = [
            &bytes[..one.start],
            &bytes[two.clone()],
            &bytes[one.clone()],
            &bytes[two.end..],
        ];
        // The same pieces, sealed with the same key.
        let other = file_of(&state, &sealer);
        let foreign = [&bytes[..one.start], &other[one.clone()], &bytes[one.end..]].concat();
        let short = [&bytes[..one.start], &[2, 0, 0, 0, 7, 7], &bytes[one.end..]].concat();
        for (what, file) in [
            ("one is missing", cut(one.start, one.end)),
            ("the end is missing", bytes[..last].to_vec()),
            ("all but the first are missing", cut(one.start, last)),
            ("one is there twice", twice),
            ("two are swapped", swapped.concat()),
            ("one is another file's", foreign),
            ("one is too short to be sealed", short),
        ] {
            let read = SnapshotFile::open(&sealer, &file).and_then(SnapshotFile::restore);
            assert!(read.is_err(), "{what}");
        }
        for length in 0..bytes.len().min(600) {
            assert!(SnapshotFile::open(&sealer, &bytes[..length]).is_err());
        }
    }

    #[test]
    fn a_file_of_the_version_before_is_read() {
        let (sealer, state) = (Sealer::new(&DataKey::random()), state(7));
        let place = encode(&meta(7)).unwrap();
        let length = u32::try_from(place.len()).unwrap().to_le_bytes();
        let plain = [&length[..], &place, &state.encode()].concat();
        let file = [&MAGIC_ONE[..], &sealer.seal(MAGIC_ONE, &plain)].concat();
        let restored = SnapshotFile::open(&sealer, &file).unwrap().restore();
        let restored = restored.unwrap();
        assert_eq!((restored.meta, restored.state), (meta(7), state));
    }
}
