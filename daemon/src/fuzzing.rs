//! Entry points for fuzzing: the settings file, the membership file, addresses as users write them.
//!
//! Each function panics when a rule is broken; `seeds` gives inputs that are valid. Only in
//! builds with the feature `fuzzing`.

use std::net::IpAddr;

use crate::address::{LocalAddress, advertise, listen};
use crate::config::File;
use crate::settings::Settings;

/// The first byte chooses what the text is.
pub fn daemon_config(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(rest) else {
        return;
    };
    match kind % 3 {
        0 => settings_file(text),
        1 => membership(text),
        _ => addresses(text),
    }
}

fn settings_file(text: &str) {
    match File::parse(text) {
        Ok(file) => {
            assert!(file.log_max_files != Some(0));
            assert!(file.log_max_size.is_none_or(|size| size >= 64 << 10));
            if let Some(parent) = &file.cgroup_parent {
                assert!(parent.starts_with('/') && !parent.split('/').any(|part| part == ".."));
            }
        }
        Err(problems) => assert!(!problems.is_empty()),
    }
}

fn membership(text: &str) {
    if let Ok(settings) = Settings::parse(text) {
        let written = serde_json::to_string(&settings).expect("just read");
        assert_eq!(Settings::parse(&written), Ok(settings));
    }
}

fn addresses(text: &str) {
    let addr = |text: &str| text.parse::<IpAddr>().expect("an address");
    let local = [("eth0", "10.0.0.5"), ("eth1", "2001:db8::1")].map(|(name, text)| LocalAddress {
        interface: name.to_owned(),
        addr: addr(text),
    });
    if let Ok(found) = advertise(text, &local) {
        assert!(!found.ip().is_unspecified());
        // What it means is itself an address that means the same.
        assert_eq!(advertise(&found.to_string(), &[]), Ok(found));
    }
    if let Ok(found) = listen(text, &local) {
        assert_eq!(listen(&found.to_string(), &[]), Ok(found));
    }
}

/// Valid inputs.
pub mod seeds {
    /// For [`super::daemon_config`].
    #[must_use]
    pub fn daemon_config() -> Vec<Vec<u8>> {
        [
            "\0insecure-registries = [\"10.0.0.1:5000\"]\noci-runtime = \"/usr/bin/runc\"\n\
             cgroup-parent = \"/swarm\"\nlog-max-size = 65536\nlog-max-files = 3\n\
             [engine-labels]\ndisk = \"ssd\"\n",
            "\u{1}{\"format\":1,\"advertise_addr\":\"10.0.0.1:2377\",\"listen_addr\":\"0.0.0.0:2377\",\
             \"data_path_addr\":\"10.0.0.1\",\"remotes\":[\"10.0.0.2:2377\"]}",
            "\u{2}eth0:2377",
            "\u{2}[2001:db8::2]:99",
            "\u{2}10.1.2.3",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
    }
}
