//! Entry points for fuzzing: what is on disk, and what other managers send.
//!
//! Each function takes what may have been damaged or forged and panics when a rule
//! is broken; `seeds` gives inputs that are valid. Only in builds with the feature `fuzzing`.

use std::fmt::Debug;

use openraft::entry::RaftEntry as _;
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use openraft::vote::RaftLeaderIdExt as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use swarm_identity::DataKey;
use swarm_proto::v1::Transaction;

use crate::disk;
use crate::seal::{OVERHEAD, Sealer};
use crate::snapshot::{self, SnapshotFile};
use crate::types::{
    Command, Entry, LogId, Outcome, SnapshotMeta, StoredMembership, TypeConfig, Vote, decode,
    encode,
};

fn sealer() -> Sealer {
    Sealer::new(&DataKey::from_bytes([7; 32]))
}

/// A record of the log: the first entry's index, then what was sealed. What is read is written
/// back to the same entries.
pub fn log_record(data: &[u8]) {
    let Some((first, payload)) = data.split_first_chunk::<8>() else {
        return;
    };
    let first = u64::from_be_bytes(*first);
    let Ok(entries) = disk::parse_entries(first, payload) else {
        return;
    };
    let mut written = Vec::new();
    for (place, entry) in entries.iter().enumerate() {
        assert_eq!(entry.log_id().index, first + place as u64);
        assert!(disk::entry_size(entry) >= 64);
        if let openraft::EntryPayload::Normal(command) = &entry.payload {
            let _ = command.transaction();
        }
        let bytes = encode(entry).expect("just read");
        written.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        written.extend_from_slice(&bytes);
    }
    assert_eq!(disk::parse_entries(first, &written), Ok(entries));
}

/// A snapshot file: forged; then with these bytes as its pieces, whole and changed in one place.
pub fn snapshot_file(data: &[u8]) {
    let sealer = sealer();
    // Nobody without the key can write one that opens.
    assert!(SnapshotFile::open(&sealer, data).is_err());
    let Some((&[size, place, other], text)) = data.split_first_chunk::<3>() else {
        return;
    };
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(size.into())),
        ..SnapshotMeta::default()
    };
    let write = || {
        let pieces = text.chunks(usize::from(size) + 1);
        let parts = snapshot::sealed(&sealer, &meta, pieces).expect("our own");
        parts.collect::<Vec<_>>().concat()
    };
    let (whole, again) = (write(), write());
    let read = |file: &[u8]| SnapshotFile::open(&sealer, file).and_then(SnapshotFile::records);
    let (found, state) = read(&whole).expect("just written");
    assert_eq!((found, &state[..]), (meta.clone(), text));
    let mut file = whole.clone();
    let place = usize::from(place) * file.len() / 256;
    match other % 3 {
        0 => file[place] ^= other | 1,
        1 => file.truncate(place),
        // The beginning of the same one, sealed again.
        _ => file[..=place].copy_from_slice(&again[..=place]),
    }
    assert!(file == whole || file == again || read(&file).is_err());
}

/// A sealed record, forged; then the same bytes sealed, and opened elsewhere or changed.
pub fn sealed(data: &[u8]) {
    let sealer = sealer();
    assert!(sealer.open(b"here", data).is_err());
    let Some((&place, text)) = data.split_first() else {
        return;
    };
    let mut record = sealer.seal(b"here", text);
    assert_eq!(record.len(), text.len() + OVERHEAD);
    assert_eq!(sealer.open(b"here", &record).as_deref(), Ok(text));
    assert!(sealer.open(b"there", &record).is_err());
    let place = usize::from(place) % record.len();
    record[place] ^= 1 << (text.len() % 8);
    assert!(sealer.open(b"here", &record).is_err());
}

/// A message of another manager: the first byte chooses the kind. What is read is written back
/// to something that reads the same.
pub fn raft_message(data: &[u8]) {
    let Some((&kind, body)) = data.split_first() else {
        return;
    };
    match kind % 7 {
        0 => same::<AppendEntriesRequest<TypeConfig>>(body),
        1 => same::<VoteRequest<TypeConfig>>(body),
        2 => same::<TransferLeaderRequest<TypeConfig>>(body),
        3 => same::<(Vote, SnapshotMeta)>(body),
        4 => same::<StoredMembership>(body),
        5 => same::<Outcome>(body),
        _ => same::<Entry>(body),
    }
}

fn same<T: DeserializeOwned + Serialize + Debug>(body: &[u8]) {
    let Ok(value) = decode::<T>(body) else { return };
    let written = encode(&value).expect("just read");
    let again = decode::<T>(&written).expect("just written");
    assert_eq!(encode(&again).expect("just read"), written, "{value:?}");
}

fn log_id(index: u64) -> LogId {
    LogId {
        leader_id: openraft::impls::leader_id_std::LeaderId::<u64, u64>::new_committed(1, 1),
        index,
    }
}

fn entries() -> Vec<Entry> {
    let transaction = Transaction {
        proposer: "node".into(),
        ..Transaction::default()
    };
    vec![
        Entry::new_blank(log_id(7)),
        Entry::new_normal(log_id(8), Command::new(&transaction)),
        Entry::new_membership(log_id(9), StoredMembership::default().membership().clone()),
    ]
}

/// Valid inputs.
pub mod seeds {
    use super::*;

    /// For [`super::log_record`].
    #[must_use]
    pub fn log_record() -> Vec<Vec<u8>> {
        let mut record = 7u64.to_be_bytes().to_vec();
        let mut all = vec![record.clone()];
        for entry in entries() {
            let bytes = encode(&entry).expect("our own entry");
            record.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            record.extend_from_slice(&bytes);
            all.push(record.clone());
        }
        all
    }

    /// For [`super::snapshot_file`].
    #[must_use]
    pub fn snapshot_file() -> Vec<Vec<u8>> {
        let text = b"what is written into some pieces, in turn";
        [[0, 0, 0], [7, 99, 1], [20, 200, 2], [255, 255, 6]]
            .iter()
            .map(|first| [&first[..], text].concat())
            .collect()
    }

    /// For [`super::sealed`].
    #[must_use]
    pub fn sealed() -> Vec<Vec<u8>> {
        vec![b"\x05text".to_vec(), sealer().seal(b"elsewhere", b"text")]
    }

    /// For [`super::raft_message`].
    #[must_use]
    pub fn raft_message() -> Vec<Vec<u8>> {
        fn message<T: Serialize>(kind: u8, value: &T) -> Vec<u8> {
            [vec![kind], encode(value).expect("our own")].concat()
        }
        let vote = Vote::new(1, 1);
        let append = AppendEntriesRequest::<TypeConfig> {
            vote,
            prev_log_id: Some(log_id(6)),
            entries: entries(),
            leader_commit: Some(log_id(5)),
        };
        let mut all = vec![
            message(0, &append),
            message(3, &(vote, SnapshotMeta::default())),
            message(4, &StoredMembership::default()),
            message(5, &Outcome(Ok(()))),
        ];
        all.extend(entries().iter().map(|entry| message(6, entry)));
        all
    }
}
