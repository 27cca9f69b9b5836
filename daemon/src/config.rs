//! The daemon's settings: command line and `/etc/swarm/swarmd.toml`.
//!
//! Everything is parsed and every bad value reported before anything starts.

use std::path::{Path, PathBuf};

use clap::Parser;
use nix::unistd::{AccessFlags, access};
use serde::Deserialize;

/// The node process: agent always, manager when the node has that role.
#[derive(Clone, Debug, Parser)]
#[command(name = "swarmd", version)]
pub struct Args {
    /// What the node must not lose: identity, raft log, images, containers
    #[arg(long, default_value = "/var/lib/swarm", env = "SWARM_DATA_DIR")]
    pub data_dir: PathBuf,
    /// What may go at a reboot: sockets and namespaces
    #[arg(long, default_value = "/run/swarm", env = "SWARM_RUN_DIR")]
    pub run_dir: PathBuf,
    /// Settings; a file that is absent is an empty one
    #[arg(long, default_value = "/etc/swarm/swarmd.toml", env = "SWARM_CONFIG")]
    pub config: PathBuf,
    /// Log as JSON, a line each
    #[arg(long)]
    pub log_json: bool,
}

/// What the file may say.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct File {
    /// Registries (host:port) that are spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// "builtin" (default), or the path of crun or runc.
    pub oci_runtime: Option<String>,
    /// Cgroup that the containers' cgroups are made in; default "/swarm".
    pub cgroup_parent: Option<String>,
    /// Size at which a container's log file is rotated, in bytes; default 10 MiB.
    pub log_max_size: Option<u64>,
    /// Log files kept per container; default 5.
    pub log_max_files: Option<u32>,
    /// Labels of this node, for constraints `engine.labels.x`.
    pub engine_labels: std::collections::HashMap<String, String>,
}

/// A settings file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It has values that make no sense: all of them, one a line.
    #[error("{path}: {problems}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// One a line.
        problems: String,
    },
}

impl File {
    /// Reads the file; an absent one is empty.
    ///
    /// # Errors
    /// It cannot be read, or has bad values: all of them are named.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text)
                .and_then(Self::checked)
                .map_err(|problems| ConfigError::Invalid {
                    path: path.to_owned(),
                    problems,
                }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// What only this machine can tell: tasks would find out one by one.
    fn checked(self) -> Result<Self, String> {
        if let Some(runtime) = self
            .oci_runtime
            .as_deref()
            .filter(|path| *path != "builtin")
        {
            access(runtime, AccessFlags::X_OK)
                .map_err(|error| format!("oci-runtime: {runtime}: {}", error.desc()))?;
        }
        Ok(self)
    }

    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut problems = Vec::new();
        for registry in &file.insecure_registries {
            if registry.is_empty() || registry.contains('/') {
                problems.push(format!(
                    "insecure-registries: {registry:?} is not host or host:port"
                ));
            }
        }
        if let Some(runtime) = &file.oci_runtime
            && runtime != "builtin"
            && !runtime.starts_with('/')
        {
            problems.push(format!(
                "oci-runtime: {runtime:?} is neither \"builtin\" nor an absolute path"
            ));
        }
        if let Some(parent) = &file.cgroup_parent
            && (!parent.starts_with('/') || parent.split('/').any(|part| part == ".."))
        {
            problems.push(format!("cgroup-parent: {parent:?} is not an absolute path"));
        }
        if file.log_max_size.is_some_and(|size| size < 64 << 10) {
            problems.push("log-max-size: less than 64 KiB".to_owned());
        }
        if file.log_max_files == Some(0) {
            problems.push("log-max-files: at least one file is needed".to_owned());
        }
        if problems.is_empty() {
            Ok(file)
        } else {
            Err(problems.join("\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_has_the_defaults() {
        assert_eq!(File::parse("").unwrap(), File::default());
    }

    #[test]
    fn every_bad_value_is_reported() {
        let problems = File::parse(
            "insecure-registries = [\"http://a/\"]\noci-runtime = \"crun\"\ncgroup-parent = \"x\"\nlog-max-files = 0\n",
        )
        .unwrap_err();
        assert_eq!(problems.lines().count(), 4, "{problems}");
    }

    #[test]
    fn a_runtime_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swarmd.toml");
        let text = |runtime: &str| format!("oci-runtime = \"{runtime}\"\n");
        std::fs::write(&path, text("/nowhere/crun")).unwrap();
        let error = File::load(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("oci-runtime: /nowhere/crun: No such file or directory"),
            "{error}"
        );
        std::fs::write(&path, text("/bin/sh")).unwrap();
        assert!(File::load(&path).is_ok());
    }

    #[test]
    fn an_unknown_key_is_refused() {
        assert!(File::parse("insecure-registry = []").is_err());
    }
}
