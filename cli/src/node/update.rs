//! `swarm node update`

use swarm_proto::v1::{NodeAvailability, NodeRole, NodeSpec};

use super::change;
use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;

/// Update a node
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Update {
    /// Availability of the node ("active", "pause", "drain")
    #[arg(long)]
    availability: Option<String>,
    /// Role of the node ("worker", "manager")
    #[arg(long)]
    role: Option<String>,
    /// Add or update a node label ("key=value")
    #[arg(long)]
    label_add: Vec<String>,
    /// Remove a node label if exists
    #[arg(long)]
    label_rm: Vec<String>,
    /// The node
    node: String,
}

/// Reads "active", "pause" or "drain".
pub fn availability(text: &str) -> std::result::Result<NodeAvailability, String> {
    match text {
        "active" => Ok(NodeAvailability::Active),
        "pause" => Ok(NodeAvailability::Pause),
        "drain" => Ok(NodeAvailability::Drain),
        other => Err(format!(
            "invalid availability {other:?}, only active, pause and drain are supported"
        )),
    }
}

fn role(text: &str) -> std::result::Result<NodeRole, String> {
    match text {
        "worker" => Ok(NodeRole::Worker),
        "manager" => Ok(NodeRole::Manager),
        other => Err(format!(
            "invalid role {other:?}, only worker and manager are supported"
        )),
    }
}

/// Changes what is given.
pub async fn run(flags: Update, daemon: &Daemon) -> Result {
    change(daemon, &flags.node, |old| changed(old, &flags).map(Some)).await?;
    output::line(&flags.node)
}

fn changed(old: &NodeSpec, flags: &Update) -> std::result::Result<NodeSpec, String> {
    let mut spec = old.clone();
    if let Some(text) = &flags.availability {
        spec.availability = availability(text)?.into();
    }
    if let Some(text) = &flags.role {
        spec.desired_role = role(text)?.into();
    }
    let labels = &mut spec.annotations.get_or_insert_default().labels;
    for key in &flags.label_rm {
        if labels.remove(key).is_none() {
            return Err(format!("key {key} doesn't exist in node's labels"));
        }
    }
    for text in &flags.label_add {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        if key.is_empty() {
            return Err(format!("invalid label {text:?}: the key is empty"));
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_changes() {
        let flags = Update {
            availability: Some("drain".to_owned()),
            label_add: vec!["zone=b".to_owned(), "flag".to_owned()],
            ..Update::default()
        };
        let new = changed(&NodeSpec::default(), &flags).unwrap();
        assert_eq!(new.availability(), NodeAvailability::Drain);
        assert_eq!(new.desired_role(), NodeRole::Worker);
        assert_eq!(new.annotations.as_ref().unwrap().labels["zone"], "b");
        let flags = Update {
            label_rm: vec!["zone".to_owned()],
            ..Update::default()
        };
        let less = changed(&new, &flags).unwrap();
        assert_eq!(less.annotations.as_ref().unwrap().labels.len(), 1);
        assert!(changed(&less, &flags).unwrap_err().contains("zone"));
    }

    #[test]
    fn unknown_words_are_named() {
        assert!(availability("sleepy").unwrap_err().contains("sleepy"));
        assert!(role("king").unwrap_err().contains("king"));
    }
}
