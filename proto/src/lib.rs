//! The one object model: generated messages, identifiers, task states, defaults.
//!
//! Everything that is stored, replicated, sent or shown is one of these types.
//! Touches neither network, disk nor clock.

mod assignments;
pub mod codec;
pub mod defaults;
pub mod id;
pub mod image;
#[cfg(feature = "museum")]
pub mod museum;
pub mod names;
mod shared;
pub mod task_state;

/// Messages and services generated from `proto/swarm/v1/*.proto`.
#[allow(missing_docs, clippy::all)] // generated: the comments are in the .proto files
pub mod v1 {
    tonic::include_proto!("swarm.v1");
}

/// Encoded descriptors of all files, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/swarm_descriptor.bin"));

pub use assignments::{ChangesError, pack};
pub use id::{ClusterId, NetworkId, NodeId, ServiceId, SessionId, Siblings, TaskId};
pub use shared::Shared;

// Nothing in these is equal to all but itself, as a float may be. With that known, two `Arc`s of one object are
// compared without a look at it: of two states, most objects are the same ones.
impl Eq for v1::Node {}
impl Eq for v1::Task {}
impl Eq for v1::Network {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;
    use prost_types::field_descriptor_proto::Type;

    #[test]
    fn what_is_said_to_equal_itself_has_no_floats() {
        let set = FileDescriptorSet::decode(super::FILE_DESCRIPTOR_SET).expect("ours");
        let described = |name: &str| {
            let mut all = set.file.iter().flat_map(|file| {
                let package = format!(".{}", file.package());
                let messages = file.message_type.iter();
                messages.map(move |message| (format!("{package}.{}", message.name()), message))
            });
            all.find(|(full, _)| full == name)
                .map(|(_, message)| message)
        };
        let mut seen = BTreeSet::new();
        let mut floats = |root: &str| {
            let mut to_see = vec![root.to_owned()];
            let mut found = Vec::new();
            while let Some(name) = to_see.pop() {
                // Maps and what is nested in a message: neither is a message of ours in a field's type otherwise.
                let Some(message) = described(&name).filter(|_| seen.insert(name.clone())) else {
                    continue;
                };
                let nested = message
                    .nested_type
                    .iter()
                    .flat_map(|entry| entry.field.iter());
                for field in message.field.iter().chain(nested) {
                    match field.r#type() {
                        Type::Float | Type::Double => {
                            found.push(format!("{name}.{}", field.name()))
                        }
                        Type::Message => to_see.push(field.type_name().to_owned()),
                        _ => {}
                    }
                }
            }
            found
        };
        for root in [".swarm.v1.Node", ".swarm.v1.Task", ".swarm.v1.Network"] {
            assert_eq!(floats(root), Vec::<String>::new());
        }
        // It would be found.
        assert_eq!(floats(".swarm.v1.Service").len(), 1);
        assert!(seen.contains(".swarm.v1.ContainerSpec"), "{seen:?}");
    }
}
