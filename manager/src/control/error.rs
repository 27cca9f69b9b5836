//! From what went wrong inside to the gRPC status that control.proto promises.

use swarm_proto::v1::rejection::Code;
use swarm_store::state::ResolveError;
use swarm_store::{ProposeError, ReadError};
use tonic::Status;

use super::validate::Invalid;

const NO_LEADER: &str = "The swarm does not have a leader. It's possible that too few managers are online. \
     Make sure more than half of the managers are online.";

/// A write that was refused or whose outcome is not known.
pub(super) fn propose(error: ProposeError) -> Status {
    let rejection = match error {
        ProposeError::Rejected(rejection) => rejection,
        ProposeError::NoLeader(reason) => return no_leader(&reason),
        ProposeError::Unknown(_) => return Status::unknown(error.to_string()),
        ProposeError::TooLarge { .. } => return Status::resource_exhausted(error.to_string()),
        ProposeError::Denied(_) | ProposeError::Stopping => {
            return Status::unavailable(error.to_string());
        }
    };
    let code = rejection.code();
    let message = rejection.message;
    match code {
        Code::OutOfSequence => out_of_sequence(),
        Code::NotFound => Status::not_found(message),
        Code::AlreadyExists | Code::NameTaken => Status::already_exists(message),
        Code::PoolExhausted => Status::resource_exhausted(message),
        Code::SubnetOverlap | Code::InUse | Code::PortTaken => Status::failed_precondition(message),
        Code::Invalid => Status::invalid_argument(message),
        Code::StaleTerm => Status::unavailable(message),
        Code::Unspecified => Status::internal(message),
    }
}

pub(super) fn out_of_sequence() -> Status {
    Status::aborted("update out of sequence")
}

/// A linearizable read that could not be done.
pub(super) fn read(error: ReadError) -> Status {
    match error {
        ReadError::NoLeader(reason) => no_leader(&reason),
        ReadError::Stopping => Status::unavailable(error.to_string()),
    }
}

fn no_leader(reason: &str) -> Status {
    Status::unavailable(format!("{NO_LEADER} ({reason})"))
}

/// A reference that names no object, or several.
pub(super) fn resolve(error: ResolveError) -> Status {
    match error {
        ResolveError::NotFound { .. } => Status::not_found(error.to_string()),
        ResolveError::Ambiguous { .. } => Status::invalid_argument(error.to_string()),
    }
}

/// A request that is refused at the border.
pub(super) fn invalid(error: Invalid) -> Status {
    match error {
        Invalid::Argument(message) => Status::invalid_argument(message),
        Invalid::Unsupported(message) => Status::unimplemented(message),
    }
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::Rejection;
    use tonic::Code as Grpc;

    use super::*;

    #[test]
    fn refusals_of_apply_have_the_promised_codes() {
        for (code, expected) in [
            (Code::OutOfSequence, Grpc::Aborted),
            (Code::NotFound, Grpc::NotFound),
            (Code::NameTaken, Grpc::AlreadyExists),
            (Code::PoolExhausted, Grpc::ResourceExhausted),
            (Code::SubnetOverlap, Grpc::FailedPrecondition),
            (Code::InUse, Grpc::FailedPrecondition),
            (Code::Invalid, Grpc::InvalidArgument),
        ] {
            let status = propose(ProposeError::Rejected(Rejection {
                code: code.into(),
                message: "because".to_owned(),
                action: 0,
            }));
            assert_eq!(status.code(), expected, "{code:?}");
        }
    }

    #[test]
    fn without_a_leader_the_caller_may_try_again() {
        let status = propose(ProposeError::NoLeader("no quorum".to_owned()));
        assert_eq!(status.code(), Grpc::Unavailable);
        assert!(
            status
                .message()
                .starts_with("The swarm does not have a leader.")
        );
    }
}
