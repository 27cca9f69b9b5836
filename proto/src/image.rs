//! References of images: `nginx`, `host:5000/a/b:tag`, `…@sha256:…`.
//!
//! One grammar for the command line, the managers' border and the nodes that pull. Pure.

use std::borrow::Cow;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longest name (registry and path), as in the distribution specification.
const NAME_MAX: usize = 255;
/// Where images come from whose reference names no registry.
const HUB: &str = "docker.io";
/// Longest tag.
const TAG_MAX: usize = 128;

/// A well-formed reference of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRef {
    registry: Option<String>,
    path: String,
    tag: Option<String>,
    digest: Option<String>,
}

/// Text that is no image reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageRefError {
    /// Nothing was given.
    #[error("ContainerSpec: image reference must be provided")]
    Empty,
    /// Something was, but not a reference.
    #[error("ContainerSpec: {0:?} is not a valid repository/tag")]
    Malformed(String),
}

impl ImageRef {
    /// Reads a reference.
    ///
    /// # Errors
    /// See [`ImageRefError`].
    pub fn parse(text: &str) -> Result<Self, ImageRefError> {
        if text.is_empty() {
            return Err(ImageRefError::Empty);
        }
        Self::read(text).ok_or_else(|| {
            ImageRefError::Malformed(text.chars().take(NAME_MAX).collect::<String>())
        })
    }

    fn read(text: &str) -> Option<Self> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        // A colon after the last slash starts a tag; one before it belongs to a port.
        let name_end = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[name_end..].find(':') {
            Some(colon) => {
                let colon = name_end + colon;
                (&rest[..colon], Some(&rest[colon + 1..]))
            }
            None => (rest, None),
        };
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if names_a_registry(first) => (Some(first), path),
            _ => (None, name),
        };
        let looks_like_an_id =
            registry.is_none() && path.len() == 64 && path.bytes().all(|b| b.is_ascii_hexdigit());
        let well_formed = registry.is_none_or(is_registry)
            && path.split('/').all(is_path_component)
            && !looks_like_an_id
            && tag.is_none_or(is_tag)
            && digest.is_none_or(is_digest);
        let image = Self {
            registry: registry.map(str::to_owned),
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
            digest: digest.map(str::to_owned),
        };
        // With the registry that is meant when none is named.
        let length = image.registry().len() + 1 + image.repository().len();
        (well_formed && length.max(name.len()) <= NAME_MAX).then_some(image)
    }

    /// The registry that serves the image; `docker.io` when the reference names none.
    #[must_use]
    pub fn registry(&self) -> &str {
        match self.registry.as_deref() {
            // An old name of the same.
            None | Some("index.docker.io") => HUB,
            Some(registry) => registry,
        }
    }

    /// What the registry knows it by: `library/nginx` for `nginx`.
    #[must_use]
    pub fn repository(&self) -> Cow<'_, str> {
        if self.registry() == HUB && !self.path.contains('/') {
            return format!("library/{}", self.path).into();
        }
        self.path.as_str().into()
    }

    /// The tag; `latest` when the reference has neither tag nor digest.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        match (&self.tag, &self.digest) {
            (None, None) => Some("latest"),
            (tag, _) => tag.as_deref(),
        }
    }

    /// `sha256:` and 64 hexadecimal digits, if it is pinned.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// With everything that it leaves out: `docker.io/library/nginx:latest`.
    #[must_use]
    pub fn whole(&self) -> String {
        let mut text = format!("{}/{}", self.registry(), self.repository());
        if let Some(tag) = self.tag() {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(digest);
        }
        text
    }

    /// The same image, and this digest: as it was written, with its tag.
    #[must_use]
    pub fn pinned(&self, digest: &str) -> Self {
        Self {
            tag: self.tag().map(str::to_owned),
            digest: Some(digest.to_owned()),
            ..self.clone()
        }
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(registry) = &self.registry {
            write!(f, "{registry}/")?;
        }
        f.write_str(&self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Docker's rule for `first/…`: a registry, or the first part of a path on the default one.
fn names_a_registry(first: &str) -> bool {
    first.contains(['.', ':'])
        || first == "localhost"
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_registry(text: &str) -> bool {
    let port = |port: &str| {
        !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
    };
    if let Some(rest) = text.strip_prefix('[') {
        let Some((addr, after)) = rest.split_once(']') else {
            return false;
        };
        return addr.parse::<Ipv6Addr>().is_ok()
            && (after.is_empty() || after.strip_prefix(':').is_some_and(port));
    }
    let (host, number) = match text.split_once(':') {
        Some((host, number)) => (host, Some(number)),
        None => (text, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    // A name that ends in a number is taken for an address wherever addresses are read.
    let last = host.rsplit('.').next().unwrap_or(host);
    let hex = last
        .strip_prefix("0x")
        .or_else(|| last.strip_prefix("0X"))
        .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
    let numeric = hex || last.bytes().all(|b| b.is_ascii_digit());
    host.split('.').all(label)
        && (!numeric || host.parse::<Ipv4Addr>().is_ok())
        && number.is_none_or(port)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    if !bytes.first().copied().is_some_and(word) || !bytes.last().copied().is_some_and(word) {
        return false;
    }
    bytes.split(|&b| word(b)).all(|between| {
        matches!(between, b"" | b"." | b"_" | b"__") || between.iter().all(|&b| b == b'-')
    })
}

fn is_tag(text: &str) -> bool {
    let bytes = text.as_bytes();
    text.len() <= TAG_MAX
        && bytes
            .first()
            .is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_')
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Of the kinds there are, the one that nodes check.
fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        hex.len() == 64 && hex.bytes().all(digit)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_that_people_write_are_read_back_as_written() {
        for (text, registry) in [
            ("nginx", "docker.io"),
            ("nginx:1.27-alpine", "docker.io"),
            ("library/nginx:latest", "docker.io"),
            ("host:5000/a/b:tag", "host:5000"),
            ("localhost/a", "localhost"),
            ("10.9.0.254:5000/nginx", "10.9.0.254:5000"),
            ("[fd00::1]:5000/nginx", "[fd00::1]:5000"),
            (
                "registry.example.com/a__b/c-d.e_f:V1",
                "registry.example.com",
            ),
            (&format!("nginx@{DIGEST}"), "docker.io"),
            (&format!("host:5000/nginx:1@{DIGEST}"), "host:5000"),
        ] {
            let image = ImageRef::parse(text).unwrap();
            assert_eq!(image.to_string(), text);
            assert_eq!(image.registry(), registry, "{text}");
        }
    }

    #[test]
    fn what_a_reference_leaves_out_is_filled_in() {
        let whole = |text: &str| ImageRef::parse(text).unwrap().whole();
        assert_eq!(whole("nginx"), "docker.io/library/nginx:latest");
        assert_eq!(whole("index.docker.io/a/b:1"), "docker.io/a/b:1");
        assert_eq!(whole("[fd00::1]:5000/a"), "[fd00::1]:5000/a:latest");
        assert_eq!(
            whole(&format!("h:5000/a@{DIGEST}")),
            format!("h:5000/a@{DIGEST}")
        );
    }

    #[test]
    fn a_pinned_reference_keeps_the_users_words() {
        let pin = |image: &str| ImageRef::parse(image).unwrap().pinned(DIGEST).to_string();
        assert_eq!(pin("nginx"), format!("nginx:latest@{DIGEST}"));
        assert_eq!(pin("h:5000/a/b:1"), format!("h:5000/a/b:1@{DIGEST}"));
        assert_eq!(pin("h:5000/a/b"), format!("h:5000/a/b:latest@{DIGEST}"));
        assert_eq!(pin(&format!("a:1@{DIGEST}")), format!("a:1@{DIGEST}"));
        assert_eq!(pin(&format!("a@{DIGEST}")), format!("a@{DIGEST}"));
    }

    #[test]
    fn malformed_references_are_named() {
        assert_eq!(
            ImageRef::parse("").unwrap_err().to_string(),
            "ContainerSpec: image reference must be provided"
        );
        for text in [
            "NGINX",
            "nginx:",
            "nginx:a b",
            "ngi nx",
            ":tag",
            "a//b",
            "/a",
            "a/",
            "a..b",
            "a___b",
            "nginx@sha256:123",
            "nginx@md5:00",
            &format!("nginx@sha512:{}", "0".repeat(128)),
            "host:99999/a",
            "host:/a",
            "10.9W0.254:5000/a",
            "10.9.0.256/a",
            "a.0x1/a",
            "-a",
            "a@",
            &"a".repeat(256),
            // With docker.io/library before it.
            &"a".repeat(240),
            &"a".repeat(64),
        ] {
            let error = ImageRef::parse(text).unwrap_err().to_string();
            assert_eq!(
                error,
                format!(
                    "ContainerSpec: {:?} is not a valid repository/tag",
                    text.chars().take(255).collect::<String>()
                )
            );
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in any::<String>()) {
            let _ = ImageRef::parse(&text);
        }

        #[test]
        fn what_is_accepted_prints_as_it_was_given(text in "[a-z0-9A-F.:/@\\[\\]_-]{0,40}") {
            if let Ok(image) = ImageRef::parse(&text) {
                prop_assert_eq!(image.to_string(), text);
                let whole = ImageRef::parse(&image.whole()).unwrap();
                prop_assert_eq!(whole.whole(), image.whole());
            }
        }
    }
}
