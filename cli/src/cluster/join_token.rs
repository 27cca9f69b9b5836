//! `swarm join-token`

use swarm_proto::v1::{GetJoinTokensRequest, NodeRole, RotateJoinTokenRequest};

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;

/// Manage join tokens
#[derive(clap::Args, Debug)]
pub struct JoinToken {
    /// Only display token
    #[arg(short, long)]
    quiet: bool,
    /// Rotate join token
    #[arg(long)]
    rotate: bool,
    /// Role of the nodes that join with it
    #[arg(value_name = "worker|manager")]
    role: String,
}

/// Prints the token of a role, after a rotation if wanted.
pub async fn run(flags: JoinToken, daemon: &Daemon) -> Result {
    let role = match flags.role.as_str() {
        "worker" => NodeRole::Worker,
        "manager" => NodeRole::Manager,
        other => return Err(format!("unknown role {other}").into()),
    };
    let mut control = daemon.control();
    let answer = if flags.rotate {
        let request = RotateJoinTokenRequest { role: role.into() };
        control.rotate_join_token(request).await?
    } else {
        control.get_join_tokens(GetJoinTokensRequest {}).await?
    };
    let tokens = answer.into_inner();
    let token = match role {
        NodeRole::Worker => tokens.worker,
        NodeRole::Manager => tokens.manager,
    };
    if flags.quiet {
        return output::line(&token);
    }
    if flags.rotate {
        output::line(&format!(
            "Successfully rotated {} join token.\n",
            flags.role
        ))?;
    }
    let info = daemon.info().await?;
    output::line(&format!(
        "To add a {} to this swarm, run the following command:\n\n    swarm join --token {token} {}\n",
        flags.role, info.advertise_addr
    ))
}
