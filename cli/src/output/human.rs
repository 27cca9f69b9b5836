//! Times, durations, sizes and shares of a processor, as people write and read them. Pure.

use std::time::Duration;

use prost_types::Timestamp;

/// "12 seconds", "About a minute", "3 weeks".
pub fn duration(span: Duration) -> String {
    let seconds = span.as_secs();
    let minutes = seconds / 60;
    let hours = (span.as_secs_f64() / 3600.0).round() as u64;
    match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

/// "12 seconds ago", seen from `now` (since the Unix epoch).
pub fn ago(at: Option<&Timestamp>, now: Duration) -> String {
    let at = at.map_or(Duration::ZERO, since_epoch);
    format!("{} ago", duration(now.saturating_sub(at)).to_lowercase())
}

fn since_epoch(at: &Timestamp) -> Duration {
    let seconds = u64::try_from(at.seconds).unwrap_or(0);
    Duration::new(
        seconds,
        u32::try_from(at.nanos).unwrap_or(0).min(999_999_999),
    )
}

/// The machine's clock, since the Unix epoch.
pub fn now() -> Duration {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
}

/// "2026-11-23T17:11:05.72Z"
pub fn rfc3339(at: Option<&Timestamp>) -> String {
    let at = at.copied().unwrap_or_default();
    jiff::Timestamp::new(at.seconds, at.nanos)
        .map(|at| at.to_string())
        .unwrap_or_default()
}

/// Reads a point in time: RFC 3339, seconds since 1970, or a duration before `now`.
pub fn parse_since(text: &str, now: Duration) -> Result<Timestamp, String> {
    if let Ok(span) = parse_duration(text) {
        let at = now.saturating_sub(span);
        return Ok(Timestamp {
            seconds: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(at.subsec_nanos()).unwrap_or(0),
        });
    }
    if let Ok(seconds) = text.parse::<i64>() {
        return Ok(Timestamp { seconds, nanos: 0 });
    }
    let at: jiff::Timestamp = text.parse().map_err(|_| {
        format!("invalid value for \"since\": failed to parse value as time or duration: {text:?}")
    })?;
    Ok(Timestamp {
        seconds: at.as_second(),
        nanos: at.subsec_nanosecond(),
    })
}

/// Reads a duration: "10s", "1m30s", "1.5h", "0".
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("time: invalid duration {text:?}");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(|| format!("time: missing unit in duration {text:?}"))?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let unit = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        total += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(wrong()),
            };
        rest = &rest[unit..];
    }
    // Longer than any life of a cluster, and what a protobuf duration can say.
    if total > 1e9 {
        return Err(wrong());
    }
    Ok(Duration::from_nanos((total * 1e9).round() as u64))
}

/// "1m30s", "5s", "250ms"
pub fn show_duration(span: Duration) -> String {
    if span.is_zero() {
        return "0s".to_owned();
    }
    if span < Duration::from_secs(1) {
        return format!("{}ms", span.as_secs_f64() * 1e3);
    }
    let (hours, minutes) = (span.as_secs() / 3600, span.as_secs() / 60 % 60);
    let seconds = span.as_secs_f64() - (hours * 3600 + minutes * 60) as f64;
    let seconds = (seconds * 1e9).round() / 1e9;
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

/// Reads a size: "512m", "1.5GiB", "100" (bytes).
pub fn parse_size(text: &str) -> Result<i64, String> {
    let wrong = || format!("invalid size: '{text}'");
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let unit = text[end..].trim_start().to_ascii_lowercase();
    let power = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(wrong()),
    };
    let bytes = number * 1024f64.powi(power);
    if bytes > 9e18 {
        return Err(wrong());
    }
    Ok(bytes as i64)
}

/// "512MiB"
pub fn show_size(bytes: i64) -> String {
    let mut number = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    while number >= 1024.0 {
        let Some(next) = units.next() else { break };
        number /= 1024.0;
        unit = next;
    }
    let text = format!("{number:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text}{unit}")
}

/// Reads processors: "1.5" as billionths.
pub fn parse_cpus(text: &str) -> Result<i64, String> {
    let cpus: f64 = text
        .parse()
        .ok()
        .filter(|cpus: &f64| cpus.is_finite() && (0.0..1e6).contains(cpus))
        .ok_or_else(|| {
            format!("invalid cpu value {text:?}: failed to parse value as a rational number")
        })?;
    Ok((cpus * 1e9).round() as i64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn spans_read_as_people_say_them() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (150, "2 minutes"),
            (3600, "About an hour"),
            (3600 * 47, "47 hours"),
            (3600 * 24 * 3, "3 days"),
            (3600 * 24 * 21, "3 weeks"),
            (3600 * 24 * 90, "3 months"),
            (3600 * 24 * 365 * 3, "3 years"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn durations_are_read_and_shown() {
        for (text, millis) in [
            ("0", 0),
            ("10s", 10_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("250ms", 250),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)));
        }
        for wrong in ["", "5", "s", "1x", "1m2", "-5s", "99999999999999h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
        for (millis, text) in [
            (0, "0s"),
            (5000, "5s"),
            (90_000, "1m30s"),
            (250, "250ms"),
            (3_600_000, "1h0m0s"),
        ] {
            assert_eq!(show_duration(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in [
            ("1", 1),
            ("4k", 4096),
            ("512m", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("1000g", 1000 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for wrong in ["", "m", "1x", "-1", "1..2", "99999p"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(show_size(512 << 20), "512MiB");
        assert_eq!(show_size(3 << 29), "1.5GiB");
    }

    #[test]
    fn processors_are_billionths() {
        assert_eq!(parse_cpus("0.5"), Ok(500_000_000));
        assert!(parse_cpus("many").is_err());
        assert!(parse_cpus("NaN").is_err());
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in ".{0,20}") {
            let _ = parse_duration(&text);
            let _ = parse_size(&text);
            let _ = parse_cpus(&text);
            let _ = parse_since(&text, now());
        }
    }
}
