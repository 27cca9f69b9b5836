//! The log on a real disk: openraft's own suite, restarts, damage, size of what sled is given.

use std::ops::Bound;
use std::path::Path;

use openraft::StorageError;
use openraft::impls::leader_id_std::LeaderId;
use openraft::storage::{IOFlushed, RaftLogStorage as _};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt as _;
use openraft::vote::RaftLeaderIdExt as _;
use openraft::{EntryPayload, RaftLogReader as _};
use proptest::prelude::*;
use swarm_disk::SystemDisk;
use swarm_disk::memory::{MemoryDisk, Weather};
use swarm_identity::DataKey;
use swarm_proto::v1::Transaction;
use tempfile::TempDir;

use super::*;
use crate::snapshot::Snapshots;
use crate::state_machine::StateMachine;
use crate::types::Command;
use crate::weight::Scales;

fn id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId::<u64, u64>::new_committed(term, 1),
        index,
    }
}

fn entry(term: u64, index: u64, size: usize) -> Entry {
    let transaction = Transaction {
        proposer: "x".repeat(size),
        ..Transaction::default()
    };
    Entry {
        log_id: id(term, index),
        payload: EntryPayload::Normal(Command::new(&transaction)),
    }
}

async fn open(dir: &Path, key: &DataKey) -> Result<(LogStore, LogWriter), DiskError> {
    open_on(SystemDisk::shared(), Threads::Own, dir, key).await
}

async fn open_on(
    disk: Arc<dyn swarm_disk::Disk>,
    threads: Threads,
    dir: &Path,
    key: &DataKey,
) -> Result<(LogStore, LogWriter), DiskError> {
    let blocking = threads.blocking();
    LogStore::open(disk, dir, key, threads, blocking, FatalReporter::new()).await
}

async fn append(log: &mut LogStore, entries: Vec<Entry>) {
    let (done, flushed) = TypeConfig::oneshot();
    log.append(entries, IOFlushed::signal(done)).await.unwrap();
    flushed.await.unwrap().unwrap();
}

async fn close(log: LogStore, writer: LogWriter) {
    writer.close().await;
    drop(log);
}

fn blobs(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("log/blobs")).map_or(0, Iterator::count)
}

/// A log and a state machine on the machine's disk, or on one in memory without threads.
struct Builder {
    memory: bool,
}

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::random();
        let (disk, threads) = if self.memory {
            let disk: Arc<dyn swarm_disk::Disk> = Arc::new(MemoryDisk::default());
            (disk, Threads::Callers)
        } else {
            (SystemDisk::shared(), Threads::Own)
        };
        let opened = open_on(disk.clone(), threads, dir.path(), &key).await;
        let (log, _writer) = opened.unwrap();
        let path = dir.path().join("snapshots");
        let (snapshots, found) = Snapshots::open(disk, &path, Sealer::new(&key)).unwrap();
        let machine = StateMachine::restore(
            snapshots,
            found,
            Scales::new(1 << 20),
            threads.blocking(),
            FatalReporter::new(),
        );
        Ok((dir, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openrafts_own_suite_passes() {
    Suite::test_all(Builder { memory: false }).await.unwrap();
}

#[tokio::test]
async fn openrafts_own_suite_passes_on_one_thread_and_a_disk_in_memory() {
    Suite::test_all(Builder { memory: true }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_acknowledged_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let key = DataKey::random();
    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    let vote = Vote::new(3, 7);
    log.save_vote(&vote).await.unwrap();
    append(&mut log, (0..100).map(|i| entry(1, i, 300)).collect()).await;
    append(&mut log, (100..200).map(|i| entry(2, i, 300)).collect()).await;
    log.truncate_after(Some(id(2, 150))).await.unwrap();
    append(&mut log, (151..160).map(|i| entry(3, i, 300)).collect()).await;
    log.purge(id(1, 42)).await.unwrap();
    log.save_committed(Some(id(3, 155))).await.unwrap();
    close(log, writer).await;

    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    let state = log.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id, Some(id(1, 42)));
    assert_eq!(state.last_log_id, Some(id(3, 159)));
    assert_eq!(log.read_vote().await.unwrap(), Some(vote));
    assert_eq!(log.read_committed().await.unwrap(), Some(id(3, 155)));
    let found = log.try_get_log_entries(0..1000).await.unwrap();
    let expected: Vec<Entry> = (43..100)
        .map(|i| entry(1, i, 300))
        .chain((100..151).map(|i| entry(2, i, 300)))
        .chain((151..160).map(|i| entry(3, i, 300)))
        .collect();
    assert_eq!(found, expected);
    close(log, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_entries_span_keys_and_no_page_becomes_a_blob() {
    let dir = tempfile::tempdir().unwrap();
    let key = DataKey::random();
    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    let sizes = [10, 900 << 10, 6000, 6100, 6200, 1 << 20, 0];
    let entries: Vec<Entry> = (0..)
        .zip(sizes)
        .map(|(i, size)| entry(1, i, size))
        .collect();
    append(&mut log, entries.clone()).await;
    for start in 0..40 {
        let first = 7 + start * 50;
        append(
            &mut log,
            (first..first + 50).map(|i| entry(1, i, 3000)).collect(),
        )
        .await;
    }
    assert_eq!(blobs(dir.path()), 0);
    close(log, writer).await;

    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    assert_eq!(log.try_get_log_entries(0..7).await.unwrap(), entries);
    assert_eq!(log.try_get_log_entries(5..=5).await.unwrap(), entries[5..6]);
    // The limit of a message is reached by the second entry.
    assert_eq!(
        log.limited_get_log_entries(0, 7).await.unwrap(),
        entries[..6]
    );
    log.truncate_after(Some(id(1, 1))).await.unwrap();
    log.purge(id(1, 0)).await.unwrap();
    close(log, writer).await;
    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), entries[1..2]);
    assert_eq!(blobs(dir.path()), 0);
    close(log, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_data_key_is_refused_with_file_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, writer) = open(dir.path(), &DataKey::random()).await.unwrap();
    append(&mut log, vec![entry(1, 0, 10)]).await;
    close(log, writer).await;
    let error = open(dir.path(), &DataKey::random())
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("log.mark") || error.contains("raft_log/0.0"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lost_its_end_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let key = DataKey::random();
    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    append(&mut log, (0..10).map(|i| entry(1, i, 10)).collect()).await;
    close(log, writer).await;
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    let error = open(dir.path(), &key).await.err().unwrap().to_string();
    assert!(
        error.contains("raft_log/0.0") && error.contains("log/db"),
        "{error}"
    );
}

async fn disk(dir: &Path, key: &DataKey) -> Result<(Disk, Recovered), DiskError> {
    Disk::open(SystemDisk::shared(), dir, Sealer::new(key)).await
}

/// A log whose entries from 10 on were replaced by those of a later term, with what some of its
/// keys held before.
async fn rewritten(dir: &Path, key: &DataKey, size: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
    let entries = |term, range: std::ops::Range<u64>| -> Vec<Entry> {
        range.map(|index| entry(term, index, size)).collect()
    };
    let (disk, _) = disk(dir, key).await.unwrap();
    disk.append(None, &entries(1, 0..10)).unwrap();
    disk.append(Some(id(1, 9)), &entries(2, 10..12)).unwrap();
    let from = 10u64.to_be_bytes();
    let old = disk
        .raw()
        .range(Bound::Included(&from), Bound::Unbounded)
        .map(Result::unwrap)
        .collect();
    disk.truncate_after(Some(id(1, 9))).await.unwrap();
    disk.append(Some(id(1, 9)), &entries(3, 10..12)).unwrap();
    disk.sync().await.unwrap();
    disk.write_mark(Mark::new(Some(id(3, 11)), 0)).unwrap();
    old
}

#[tokio::test(flavor = "multi_thread")]
async fn older_versions_of_records_do_not_pass_for_the_log() {
    for size in [10, 20_000] {
        for behind in [false, true] {
            let (dir, key) = (tempfile::tempdir().unwrap(), DataKey::random());
            let old = rewritten(dir.path(), &key, size).await;
            if behind {
                let (disk, _) = disk(dir.path(), &key).await.unwrap();
                let more = [entry(3, 12, 10)];
                disk.append(Some(id(3, 11)), &more).unwrap();
                disk.sync().await.unwrap();
                // A power cut: the mark is older than the log.
            }
            // Pages go back one by one, and all together.
            for stale in old.iter().map(std::slice::from_ref).chain([&old[..]]) {
                let copy = tempfile::tempdir().unwrap();
                let copied = std::process::Command::new("cp")
                    .args(["-a", "--"])
                    .arg(dir.path().join("."))
                    .arg(copy.path())
                    .status();
                assert!(copied.unwrap().success());
                let (sound, found) = disk(copy.path(), &key).await.unwrap();
                assert_eq!(found.last, Some(id(3, if behind { 12 } else { 11 })));
                for (key, value) in stale {
                    sound.raw().put(key, value.clone()).unwrap();
                }
                sound.sync().await.unwrap();
                drop(sound);
                let error = disk(copy.path(), &key).await.err().unwrap();
                assert!(matches!(error, DiskError::Damaged { .. }), "{error}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_and_a_truncation_that_were_cut_short_are_no_damage() {
    let (dir, key) = (tempfile::tempdir().unwrap(), DataKey::random());
    let entries: Vec<Entry> = (0..4).map(|index| entry(1, index, 20_000)).collect();
    let part = |index: u64, part: u16| [&index.to_be_bytes()[..], &part.to_be_bytes()].concat();
    let (open, _) = disk(dir.path(), &key).await.unwrap();
    open.append(None, &entries).unwrap();
    open.sync().await.unwrap();
    open.write_mark(Mark::new(Some(id(1, 3)), 0)).unwrap();
    let kept = open.raw().get(&part(1, 2)).unwrap().unwrap();
    open.purge(&id(1, 1), 3).unwrap();
    // Of a purged entry its beginning is gone, and a part is left.
    open.raw().put(&part(1, 2), kept).unwrap();
    open.truncate_after(Some(id(1, 2))).await.unwrap();
    open.append(Some(id(1, 2)), &entries[3..]).unwrap();
    // Of a truncated entry the end is gone, and the beginning is left.
    open.raw().remove(&part(3, 3)).unwrap();
    open.raw().remove(&part(3, 2)).unwrap();
    open.sync().await.unwrap();
    drop(open);
    let (open, found) = disk(dir.path(), &key).await.unwrap();
    assert_eq!((found.purged, found.last), (Some(id(1, 1)), Some(id(1, 2))));
    assert_eq!(open.read(2..=9, usize::MAX).unwrap(), entries[2..3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_without_its_mark_is_refused() {
    let (dir, key) = (tempfile::tempdir().unwrap(), DataKey::random());
    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    append(&mut log, vec![entry(1, 0, 10)]).await;
    close(log, writer).await;
    let mark = dir.path().join("log.mark");
    let whole = std::fs::read(&mark).unwrap();
    std::fs::write(&mark, &whole[..10]).unwrap();
    let error = disk(dir.path(), &key).await.err().unwrap().to_string();
    assert!(error.contains("log.mark"), "{error}");
    std::fs::remove_file(&mark).unwrap();
    let error = disk(dir.path(), &key).await.err().unwrap().to_string();
    assert!(error.contains("log.mark"), "{error}");
    std::fs::write(&mark, &whole).unwrap();
    disk(dir.path(), &key).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_anywhere_in_the_file_is_never_taken_for_data() {
    let dir = tempfile::tempdir().unwrap();
    let key = DataKey::random();
    let (mut log, writer) = open(dir.path(), &key).await.unwrap();
    log.save_vote(&Vote::new(1, 1)).await.unwrap();
    let entries: Vec<Entry> = (0..200).map(|i| entry(1, i, 300)).collect();
    for chunk in entries.chunks(10) {
        append(&mut log, chunk.to_vec()).await;
    }
    close(log, writer).await;
    let file = dir.path().join("log/db");
    let whole = std::fs::read(&file).unwrap();
    let used = whole.iter().rposition(|&byte| byte != 0).unwrap();
    let mut refused = 0;
    for step in 0..20 {
        let copy = tempfile::tempdir().unwrap();
        std::fs::create_dir(copy.path().join("log")).unwrap();
        for name in ["log/conf", "log.mark"] {
            std::fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
        }
        let mut damaged = whole.clone();
        let at = used * step / 20 + 7;
        damaged[at..at + 16].fill(0xa5);
        std::fs::write(copy.path().join("log/db"), damaged).unwrap();
        match open(copy.path(), &key).await {
            Err(error) => {
                assert!(matches!(error, DiskError::Damaged { .. }), "{error}");
                refused += 1;
            }
            // The place was free, or held what has been written again since.
            Ok((mut log, writer)) => {
                assert_eq!(log.try_get_log_entries(..).await.unwrap(), entries);
                close(log, writer).await;
            }
        }
    }
    assert!(refused > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failed_write_nothing_is_acknowledged_and_the_owner_knows() {
    let dir = tempfile::tempdir().unwrap();
    let sealer = Sealer::new(&DataKey::random());
    let opened = Disk::open(SystemDisk::shared(), dir.path(), sealer).await;
    let (disk, found) = opened.unwrap();
    let fatal = FatalReporter::new();
    let mut reported = fatal.subscribe();
    let (mut log, _writer) = LogStore::start(
        disk.failing(),
        found,
        Threads::Own,
        Threads::Own.blocking(),
        fatal,
    )
    .unwrap();
    for index in 0..2 {
        let (done, flushed) = TypeConfig::oneshot();
        log.append([entry(1, index, 10)], IOFlushed::signal(done))
            .await
            .unwrap();
        assert!(flushed.await.unwrap().is_err());
    }
    assert!(log.save_vote(&Vote::new(5, 1)).await.is_err());
    assert_eq!(log.read_vote().await.unwrap(), None);
    let failure = reported.wait_for(Option::is_some).await.unwrap().clone();
    let failure = failure.unwrap();
    assert!(failure.reason.contains("log.mark"), "{failure}");
}

#[tokio::test]
async fn entries_of_every_length_around_the_longest_of_one_record_are_read_again() {
    let memory: Arc<dyn swarm_disk::Disk> = Arc::new(MemoryDisk::default());
    let (dir, key) = (Path::new("/raft"), DataKey::random());
    let opened = open_on(memory.clone(), Threads::Callers, dir, &key).await;
    let (mut log, writer) = opened.unwrap();
    let limit = crate::disk::PIECE_MAX;
    let sizes = (limit - 100..limit + 10).chain(2 * limit - 100..2 * limit + 10);
    let entries: Vec<Entry> = (0..)
        .zip(sizes)
        .map(|(index, size)| entry(1, index, size))
        .collect();
    let lengths = entries
        .iter()
        .map(|entry| crate::types::encode(entry).unwrap().len());
    let near = lengths.filter(|length| length.abs_diff(limit) <= 4);
    assert_eq!(near.count(), 9);
    for entry in entries.clone() {
        append(&mut log, vec![entry]).await;
    }
    close(log, writer).await;

    let opened = open_on(memory, Threads::Callers, dir, &key).await;
    let (mut log, writer) = opened.unwrap();
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), entries);
    close(log, writer).await;
}

#[derive(Clone, Debug)]
enum Step {
    Append { count: u64, size: usize },
    Truncate { back: u64 },
    Purge { forward: u64 },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (1..40u64, prop_oneof![0..400usize, 5000..7000usize, 0..30_000usize])
            .prop_map(|(count, size)| Step::Append { count, size }),
        2 => (0..60u64).prop_map(|back| Step::Truncate { back }),
        2 => (0..60u64).prop_map(|forward| Step::Purge { forward }),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn the_log_is_what_a_list_would_be(steps in prop::collection::vec(step(), 1..25)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let key = DataKey::random();
            let (mut log, mut writer) = open(dir.path(), &key).await.unwrap();
            let mut model: Vec<Entry> = Vec::new();
            let mut first = 0u64;
            for (term, step) in (1..).zip(steps) {
                let next = first + model.len() as u64;
                match step {
                    Step::Append { count, size } => {
                        let new: Vec<Entry> =
                            (next..next + count).map(|i| entry(term, i, size)).collect();
                        model.extend(new.iter().cloned());
                        append(&mut log, new).await;
                    }
                    Step::Truncate { back } => {
                        let keep = model.len().saturating_sub(back as usize);
                        if keep > 0 {
                            model.truncate(keep);
                            log.truncate_after(Some(model[keep - 1].log_id())).await.unwrap();
                        }
                    }
                    Step::Purge { forward } => {
                        let gone = model.len().min(forward as usize);
                        if gone > 0 {
                            log.purge(model[gone - 1].log_id()).await.unwrap();
                            model.drain(..gone);
                            first += gone as u64;
                        }
                    }
                    Step::Reopen => {
                        close(log, writer).await;
                        (log, writer) = open(dir.path(), &key).await.unwrap();
                    }
                }
                assert_eq!(log.try_get_log_entries(..).await.unwrap(), model);
            }
            assert_eq!(blobs(dir.path()), 0);
            close(log, writer).await;
        });
    }
}

/// Completes a sync when the test says so, or never.
struct Slow(Semaphore);

#[async_trait::async_trait]
impl Weather for Slow {
    async fn sync(&self, _: &Path) -> io::Result<()> {
        self.0.acquire().await.map_err(io::Error::other)?.forget();
        Ok(())
    }

    fn write(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// Whatever is polled until nothing moves any more.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn nothing_is_acknowledged_before_its_sync_and_a_crash_keeps_what_was() {
    for survive in [0, 1, usize::MAX] {
        let slow = Arc::new(Slow(Semaphore::new(100)));
        let memory = MemoryDisk::new(slow.clone());
        let (dir, key) = (Path::new("/raft"), DataKey::random());
        let disk: Arc<dyn swarm_disk::Disk> = Arc::new(memory.clone());
        let opened = open_on(disk.clone(), Threads::Callers, dir, &key).await;
        let (mut log, writer) = opened.unwrap();
        append(&mut log, (0..5).map(|i| entry(1, i, 100)).collect()).await;
        log.save_vote(&Vote::new(2, 7)).await.unwrap();

        slow.0.forget_permits(usize::MAX);
        let (done, mut flushed) = TypeConfig::oneshot();
        let more = (5..9).map(|i| entry(2, i, 3000));
        log.append(more, IOFlushed::signal(done)).await.unwrap();
        let mut voter = log.clone();
        let vote = tokio::spawn(async move { voter.save_vote(&Vote::new(3, 7)).await });
        settle().await;
        assert!(flushed.try_recv().is_err() && !vote.is_finished());
        vote.abort();
        // The power goes: whatever was being done ends where it is.
        writer.kill();
        drop(log);
        settle().await;
        memory.crash(&mut |most| survive.min(most));
        slow.0.add_permits(100);

        let opened = open_on(disk, Threads::Callers, dir, &key).await;
        let (mut log, writer) = opened.unwrap();
        let found = log.try_get_log_entries(..).await.unwrap();
        let all: Vec<Entry> = (0..5)
            .map(|i| entry(1, i, 100))
            .chain((5..9).map(|i| entry(2, i, 3000)))
            .collect();
        assert!(found.len() >= 5 && found == all[..found.len()], "{found:?}");
        assert!(log.read_vote().await.unwrap() >= Some(Vote::new(2, 7)));
        close(log, writer).await;
    }
}
