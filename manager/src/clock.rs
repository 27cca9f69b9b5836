//! Points in time, as the decisions see them: a [`Duration`] since the Unix epoch.
//!
//! Decisions get `now` as an argument. A clock that jumps back makes elapsed
//! times zero, never negative.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost_types::Timestamp;

/// Clocks of managers that are right differ by less. A stored time that is further ahead was
/// written by a clock that was wrong, and is no reason to wait for it.
pub const CLOCKS_DIFFER: Duration = Duration::from_secs(10);

/// Where loops read the time since the Unix epoch.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The machine's clock.
#[must_use]
pub fn system_clock() -> Clock {
    Arc::new(|| {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
    })
}

/// A stored time. Times before 1970 count as 1970.
#[must_use]
pub fn since_epoch(at: &Timestamp) -> Duration {
    match u64::try_from(at.seconds) {
        Ok(seconds) => Duration::new(
            seconds,
            u32::try_from(at.nanos).unwrap_or(0).min(999_999_999),
        ),
        Err(_) => Duration::ZERO,
    }
}

/// A time to store.
#[must_use]
pub fn timestamp(at: Duration) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(at.subsec_nanos()).unwrap_or(0),
    }
}

/// A span in a spec, or what its absence means. Negative ones count as zero.
#[must_use]
pub fn span(given: Option<&prost_types::Duration>, absent: Duration) -> Duration {
    match given {
        None => absent,
        Some(given) => Duration::try_from(*given).unwrap_or(Duration::ZERO),
    }
}
