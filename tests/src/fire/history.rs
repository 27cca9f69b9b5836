//! What was asked of which object, when, and what was answered.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The object as an answer shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The number that its last writer put into it: unique in a history.
    pub value: u64,
    /// Its ID. An object that is made again under the same name has another one.
    pub id: String,
    /// Its version: rises with every change, also with those of others than the clients.
    pub version: u64,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Make it, with this value.
    Create(u64),
    /// Change what was seen into this value.
    Update(Seen, u64),
    /// Remove it, by name.
    Remove,
    /// Read it.
    Get,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Made, changed or removed: the object with this ID.
    Done(String),
    /// What is there.
    Saw(Option<Seen>),
    /// Not made: the name is taken.
    Exists,
    /// Not changed or removed: there is no such object.
    Gone,
    /// Not changed: it is not what was seen.
    Stale,
    /// It may be done, or not, now or later.
    Unknown,
}

/// Who asked where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// Number of the client.
    pub client: u16,
    /// Number of the host.
    pub host: u16,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Tick before it was sent.
    pub call: u64,
    /// Tick after it was answered.
    pub ret: u64,
    /// What was asked.
    pub ask: Ask,
    /// What was answered.
    pub answer: Answer,
    /// Who asked.
    pub who: Who,
    /// When it was sent, from the beginning of the history.
    pub at: Duration,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let until = match self.answer {
            Answer::Unknown => "?".to_owned(),
            _ => self.ret.to_string(),
        };
        write!(
            f,
            "{:>9.3}s  [{}, {until}]  client {} at h{}: ",
            self.at.as_secs_f64(),
            self.call,
            self.who.client,
            self.who.host
        )?;
        match &self.ask {
            Ask::Create(value) => write!(f, "create {value}")?,
            Ask::Update(seen, value) => write!(f, "update {} to {value}", seen.value)?,
            Ask::Remove => write!(f, "remove")?,
            Ask::Get => write!(f, "get")?,
        }
        match &self.answer {
            Answer::Done(_) => write!(f, " -> done"),
            Answer::Saw(None) => write!(f, " -> nothing there"),
            Answer::Saw(Some(seen)) => write!(f, " -> {} (version {})", seen.value, seen.version),
            Answer::Exists => write!(f, " -> the name is taken"),
            Answer::Gone => write!(f, " -> there is none"),
            Answer::Stale => write!(f, " -> out of sequence"),
            Answer::Unknown => write!(f, " -> outcome unknown"),
        }
    }
}

/// All records of one object.
#[derive(Clone, Debug, Default)]
pub struct ObjectHistory {
    /// What was there before the first record.
    pub start: Option<Seen>,
    /// In no particular order.
    pub records: Vec<Record>,
}

/// Collects records from many clients.
pub struct History {
    ticks: AtomicU64,
    began: Instant,
    objects: Mutex<BTreeMap<String, ObjectHistory>>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            ticks: AtomicU64::new(1),
            began: Instant::now(),
            objects: Mutex::default(),
        }
    }
}

impl History {
    /// The next moment of a clock that all clients share: what returned before
    /// something was called has the smaller tick.
    pub fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    /// Since the beginning.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Says what is there already.
    pub fn starts_with(&self, object: &str, seen: Seen) {
        self.objects
            .lock()
            .entry(object.to_owned())
            .or_default()
            .start = Some(seen);
    }

    /// Keeps a record.
    pub fn add(&self, object: &str, record: Record) {
        let mut objects = self.objects.lock();
        match objects.get_mut(object) {
            Some(history) => history.records.push(record),
            None => {
                let history = ObjectHistory {
                    start: None,
                    records: vec![record],
                };
                objects.insert(object.to_owned(), history);
            }
        }
    }

    /// Names of the objects.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.objects.lock().keys().cloned().collect()
    }

    /// Everything, by object.
    #[must_use]
    pub fn take(&self) -> BTreeMap<String, ObjectHistory> {
        std::mem::take(&mut self.objects.lock())
    }
}
