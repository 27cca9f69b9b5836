//! What the lab tells the library that it preloads into each host's `swarmd`: see `tests/faults`.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

#[path = "../faults/src/control.rs"]
pub(crate) mod control;

/// Longest delay of a sync: beyond that a disk is broken, not slow.
const DELAY_MAX: Duration = Duration::from_secs(60);
/// Furthest that a clock is wrong: ten years.
const SKEW_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The library, beside the binaries.
///
/// # Errors
/// It is not built.
pub fn library(bin_dir: &Path) -> Result<PathBuf> {
    let path = bin_dir.join("libswarm_faults.so");
    ensure!(
        path.exists(),
        "{} is not built: `cargo build --release -p swarm-faults`",
        path.display()
    );
    Ok(path)
}

/// Makes a host's control file, with no fault in it, unless it is there.
///
/// # Errors
/// It cannot be written.
pub fn prepare(path: &Path) -> io::Result<()> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?
        .set_len(control::SIZE as u64)
}

/// Writes one word of a control file.
fn set(path: &Path, offset: usize, word: [u8; 8]) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.write_all_at(&word, offset as u64))
        .with_context(|| format!("writing {}", path.display()))
}

/// Lets each sync take so much longer.
///
/// # Errors
/// The delay is too long, or the file cannot be written.
pub fn set_sync_delay(path: &Path, delay: Duration) -> Result<()> {
    ensure!(
        delay <= DELAY_MAX,
        "a disk is slow by at most {DELAY_MAX:?}"
    );
    let nanos = u64::try_from(delay.as_nanos())?;
    set(path, control::SYNC_DELAY, nanos.to_ne_bytes())
}

/// Whether writes to the state directory find no space.
///
/// # Errors
/// The file cannot be written.
pub fn set_full(path: &Path, full: bool) -> Result<()> {
    set(path, control::FULL, u64::from(full).to_ne_bytes())
}

/// Puts the wall clock ahead (or behind, when negative), in nanoseconds.
///
/// # Errors
/// It is too far, or the file cannot be written.
pub fn set_skew(path: &Path, skew: Skew) -> Result<()> {
    set(path, control::SKEW, skew.0.to_ne_bytes())
}

/// Takes all faults back.
///
/// # Errors
/// The file cannot be written.
pub fn clear(path: &Path) -> Result<()> {
    for offset in [control::SYNC_DELAY, control::SKEW, control::FULL] {
        set(path, offset, [0; 8])?;
    }
    Ok(())
}

/// How wrong a clock is, in nanoseconds: "+90s", "-5m".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skew(i64);

impl std::str::FromStr for Skew {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (sign, span) = match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(span), _) => (1, span),
            (_, Some(span)) => (-1, span),
            _ => {
                return Err(anyhow!(
                    "'{text}' does not say whether the clock is ahead (+90s) or behind (-90s)"
                ));
            }
        };
        let span = parse_span(span)?;
        ensure!(span <= SKEW_MAX, "a clock is wrong by at most ten years");
        Ok(Self(sign * i64::try_from(span.as_nanos())?))
    }
}

/// A span of time: a whole number and ms, s, m or h.
///
/// # Errors
/// It is not one.
pub fn parse_span(text: &str) -> Result<Duration> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1_u64,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(millis))
        .filter(|_| millis > 0)
        .map(Duration::from_millis)
        .ok_or_else(|| anyhow!("'{text}' is no span of time like 200ms, 3s, 5m or 1h"))
}

/// A share of packets in ten-thousandths, from "5%" or "0.25%".
///
/// # Errors
/// It is not between 0.01% and 100%.
pub fn parse_percent(text: &str) -> Result<u32> {
    let refused = || anyhow!("'{text}' is no share of packets between 0.01% and 100%");
    let number = text.strip_suffix('%').ok_or_else(refused)?;
    let number: f64 = number.parse().map_err(|_| refused())?;
    let share = (number * 100.0).round();
    ensure!((1.0..=10_000.0).contains(&share), refused());
    // In range, and whole.
    Ok(share as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_skews_and_shares_are_parsed_or_refused_with_the_value() {
        assert_eq!(parse_span("200ms").unwrap(), Duration::from_millis(200));
        assert_eq!(parse_span("5m").unwrap(), Duration::from_secs(300));
        assert_eq!("+90s".parse::<Skew>().unwrap(), Skew(90_000_000_000));
        assert_eq!("-1ms".parse::<Skew>().unwrap(), Skew(-1_000_000));
        assert_eq!(parse_percent("5%").unwrap(), 500);
        assert_eq!(parse_percent("0.01%").unwrap(), 1);
        for bad in [
            "",
            "5",
            "ms",
            "-5s",
            "1.5s",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            let error = parse_span(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("'{bad}'")), "{error}");
        }
        for bad in ["", "90s", "+", "+90", "+11y", "+999999h"] {
            assert!(bad.parse::<Skew>().is_err(), "{bad}");
        }
        for bad in ["", "5", "%", "0%", "101%", "-3%", "NaN%", "inf%", "0.001%"] {
            assert!(parse_percent(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_set_is_in_the_file_until_it_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("faults");
        prepare(&path).unwrap();
        set_sync_delay(&path, Duration::from_millis(200)).unwrap();
        set_skew(&path, "-1ms".parse().unwrap()).unwrap();
        set_full(&path, true).unwrap();
        // A second start of swarmd takes nothing back.
        prepare(&path).unwrap();
        let read = |offset: usize| -> [u8; 8] {
            std::fs::read(&path).unwrap()[offset..offset + 8]
                .try_into()
                .unwrap()
        };
        assert_eq!(u64::from_ne_bytes(read(control::SYNC_DELAY)), 200_000_000);
        assert_eq!(i64::from_ne_bytes(read(control::SKEW)), -1_000_000);
        assert_eq!(u64::from_ne_bytes(read(control::FULL)), 1);
        clear(&path).unwrap();
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
        assert!(set_sync_delay(&path, Duration::from_secs(61)).is_err());
    }
}
