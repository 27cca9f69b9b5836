//! What the node remembers of its membership besides its identity: `node.json`.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The newest format this build writes, and the newest it reads.
const FORMAT: u32 = 1;

/// Where this node is, and where its managers are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    format: u32,
    /// host:port that others reach this node's API at, if it is a manager.
    pub advertise_addr: SocketAddr,
    /// What the API is bound to.
    pub listen_addr: SocketAddr,
    /// Where VXLAN packets leave from and arrive.
    pub data_path_addr: IpAddr,
    /// host:port of managers: where the node came from. The agent keeps a newer list.
    pub remotes: Vec<String>,
}

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what this build writes.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

impl Settings {
    /// Settings in this build's format.
    #[must_use]
    pub fn new(
        advertise_addr: SocketAddr,
        listen_addr: SocketAddr,
        data_path_addr: IpAddr,
        remotes: Vec<String>,
    ) -> Self {
        Self {
            format: FORMAT,
            advertise_addr,
            listen_addr,
            data_path_addr,
            remotes,
        }
    }

    /// Reads them; `None` when the node is in no swarm.
    ///
    /// # Errors
    /// The file is there but cannot be used; the error names it.
    pub fn load(data_dir: &Path) -> Result<Option<Self>, SettingsError> {
        let path = file(data_dir);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SettingsError::Io { path, source }),
        };
        match Self::parse(&text) {
            Ok(settings) => Ok(Some(settings)),
            Err(reason) => Err(SettingsError::Damaged { path, reason }),
        }
    }

    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let settings: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if settings.format > FORMAT {
            return Err(format!(
                "it has format {}, this build knows up to {FORMAT}: use a newer swarmd",
                settings.format
            ));
        }
        Ok(settings)
    }

    /// Writes them durably: a crash leaves the old file or the new one.
    ///
    /// # Errors
    /// Writing failed; the error names the file.
    pub fn save(&self, data_dir: &Path) -> Result<(), SettingsError> {
        let path = file(data_dir);
        let write = || -> std::io::Result<()> {
            let mut temporary = tempfile::NamedTempFile::new_in(data_dir)?;
            serde_json::to_writer_pretty(&mut temporary, self)?;
            temporary.flush()?;
            temporary.as_file().sync_all()?;
            temporary.persist(&path).map_err(|error| error.error)?;
            std::fs::File::open(data_dir)?.sync_all()
        };
        write().map_err(|source| SettingsError::Io {
            path: path.clone(),
            source,
        })
    }

    /// Forgets them.
    ///
    /// # Errors
    /// Removing failed; the error names the file.
    pub fn remove(data_dir: &Path) -> Result<(), SettingsError> {
        let path = file(data_dir);
        // Durably, or a power cut brings back a membership whose identity is gone.
        let removed =
            std::fs::remove_file(&path).and_then(|()| std::fs::File::open(data_dir)?.sync_all());
        match removed {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(SettingsError::Io { path, source })
            }
            _ => Ok(()),
        }
    }
}

fn file(data_dir: &Path) -> PathBuf {
    data_dir.join("node.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings::new(
            "10.0.0.1:2377".parse().unwrap(),
            "0.0.0.0:2377".parse().unwrap(),
            "10.0.0.1".parse().unwrap(),
            vec!["10.0.0.2:2377".to_owned()],
        )
    }

    #[test]
    fn what_was_saved_is_loaded_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Settings::load(dir.path()).unwrap(), None);
        settings().save(dir.path()).unwrap();
        assert_eq!(Settings::load(dir.path()).unwrap(), Some(settings()));
        Settings::remove(dir.path()).unwrap();
        Settings::remove(dir.path()).unwrap();
        assert_eq!(Settings::load(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_damaged_or_newer_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("node.json"), "{").unwrap();
        let error = Settings::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("node.json"), "{error}");
        let mut newer = settings();
        newer.format = FORMAT + 1;
        newer.save(dir.path()).unwrap();
        let error = Settings::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("newer swarmd"), "{error}");
    }
}
