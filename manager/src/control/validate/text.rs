//! Names, labels and other short texts.

use std::collections::BTreeMap;

use super::Invalid;

/// Longest name of an object, one DNS label.
const NAME_MAX: usize = 63;
/// Longest domain name.
const DOMAIN_MAX: usize = 253;
/// Most labels on one object.
const LABELS_MAX: usize = 1024;
/// Longest key of a label or variable, in bytes.
const KEY_MAX: usize = 256;
/// Longest single text, in bytes: what the kernel takes as one argument.
const TEXT_MAX: usize = 128 << 10;

/// An object's name: Swarm's rule, `^[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*$`, at most 63 characters.
pub(super) fn name(name: &str) -> Result<(), Invalid> {
    if name.is_empty() {
        return Err(Invalid::argument("name must be provided"));
    }
    if !is_dns_label(name) {
        return Err(Invalid::argument(
            "name must be valid as a DNS name component",
        ));
    }
    if name.len() > NAME_MAX {
        return Err(Invalid::argument("name must be 63 characters or fewer"));
    }
    Ok(())
}

fn is_dns_label(text: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    edge(bytes.first())
        && edge(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// A name with dots: a host, an alias or a search domain.
pub(super) fn domain(what: &str, text: &str) -> Result<(), Invalid> {
    let well_formed = text.len() <= DOMAIN_MAX
        && text
            .split('.')
            .all(|label| label.len() <= NAME_MAX && is_dns_label(label));
    if well_formed {
        Ok(())
    } else {
        Err(Invalid::argument(format!(
            "{what} {} is not a valid DNS name",
            quoted(text)
        )))
    }
}

/// Labels: bounded in number and size, keys without spaces or control characters.
pub(super) fn labels(what: &str, labels: &BTreeMap<String, String>) -> Result<(), Invalid> {
    count(what, labels.len(), LABELS_MAX)?;
    for (key, value) in labels {
        if key.is_empty() {
            return Err(Invalid::argument(format!("{what} with an empty key")));
        }
        if key.len() > KEY_MAX || key.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(Invalid::argument(format!(
                "{what} key {} must have at most {KEY_MAX} bytes and no spaces",
                quoted(key)
            )));
        }
        short(what, value)?;
    }
    Ok(())
}

/// `KEY=value`, or `KEY`.
pub(super) fn variable(text: &str) -> Result<(), Invalid> {
    let key = text.split_once('=').map_or(text, |(key, _)| key);
    if key.is_empty() || key.len() > KEY_MAX || key.chars().any(|c| c.is_control()) {
        return Err(Invalid::argument(format!(
            "invalid environment variable: {}",
            quoted(text)
        )));
    }
    short("environment variable", text)
}

/// A text that fits and can be passed to the kernel.
pub(super) fn short(what: &str, text: &str) -> Result<(), Invalid> {
    if text.len() > TEXT_MAX {
        return Err(Invalid::argument(format!(
            "{what} has {} bytes, more than {TEXT_MAX}",
            text.len()
        )));
    }
    if text.contains('\0') {
        return Err(Invalid::argument(format!(
            "{what} {} contains a zero byte",
            quoted(text)
        )));
    }
    Ok(())
}

/// One line of at most 256 bytes, for a file that is read by lines or a lookup.
pub(super) fn line(what: &str, text: &str) -> Result<(), Invalid> {
    if text.len() > KEY_MAX || text.chars().any(char::is_control) {
        return Err(Invalid::argument(format!(
            "{what} {} must be one line of at most {KEY_MAX} bytes",
            quoted(text)
        )));
    }
    Ok(())
}

/// At most `limit` of something.
pub(super) fn count(what: &str, number: usize, limit: usize) -> Result<(), Invalid> {
    if number > limit {
        return Err(Invalid::argument(format!(
            "{number} values of {what} are more than {limit}"
        )));
    }
    Ok(())
}

/// The text in quotes, escaped, and cut where it would make a message unreadable.
pub(super) fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{:?}…", &text[..at]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_follow_swarms_rule_and_texts() {
        for good in ["a", "web", "web-1", "my_web", "A--b", "0", &"x".repeat(63)] {
            assert_eq!(name(good), Ok(()), "{good}");
        }
        for bad in ["-web", "web-", "we b", "web.1", "wéb", "_a", "a/b"] {
            assert_eq!(
                name(bad).unwrap_err().to_string(),
                "name must be valid as a DNS name component",
                "{bad}"
            );
        }
        assert_eq!(
            name(&"x".repeat(64)).unwrap_err().to_string(),
            "name must be 63 characters or fewer"
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_a_check_panic(text in any::<String>(), other in any::<String>()) {
            let _ = name(&text);
            let _ = domain("alias", &text);
            let _ = variable(&text);
            let _ = short("argument", &text);
            let _ = line("user", &text);
            let _ = labels("label", &BTreeMap::from([(text.clone(), other)]));
            let _ = quoted(&text);
        }

        #[test]
        fn an_accepted_name_is_one_dns_label(text in "[a-zA-Z0-9_.-]{0,70}") {
            if name(&text).is_ok() {
                prop_assert!(text.len() <= 63 && !text.contains('.'));
                prop_assert!(domain("alias", &text).is_ok());
            }
        }
    }
}
