//! The name server of the containers.
//!
//! A helper process per node ([`names_main`], this binary run again) holds the sockets, one pair in each
//! sandbox, and answers from tables that the agent feeds it ([`client`]). It is not in the agent's
//! session, keeps what it was told, and so goes on answering while the agent is dead, restarts or is upgraded. It
//! ends by itself once no agent is connected and no sandbox is left.

pub(super) mod answer;
pub(super) mod client;
mod server;
pub(super) mod upstream;
pub(super) mod wire;

use std::ffi::OsString;
use std::path::PathBuf;

/// Arguments of the helper.
#[derive(Debug, PartialEq, Eq)]
struct Args {
    run_dir: PathBuf,
    resolv_conf: PathBuf,
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args, String> {
    let (mut run_dir, mut resolv_conf) = (None, None);
    let mut args = args.into_iter();
    while let Some(flag) = args.next() {
        let value = args.next().map(PathBuf::from);
        match (flag.to_str(), value) {
            (Some("--run-dir"), Some(value)) => run_dir = Some(value),
            (Some("--resolv-conf"), Some(value)) => resolv_conf = Some(value),
            _ => return Err(format!("names: unexpected argument {flag:?}")),
        }
    }
    match (run_dir, resolv_conf) {
        (Some(run_dir), Some(resolv_conf)) => Ok(Args {
            run_dir,
            resolv_conf,
        }),
        _ => Err("names: --run-dir and --resolv-conf are needed; the agent starts this".into()),
    }
}

/// Runs the name server until it is told to end; the whole process is its own.
/// `args` are those after `names`. Its first connection is standard input, if that is a socket.
///
/// # Errors
/// A sentence for people, when the arguments are wrong or the socket cannot be opened.
pub fn names_main(args: impl IntoIterator<Item = OsString>) -> Result<(), String> {
    let args = parse(args)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("names: start the runtime: {error}"))?
        .block_on(server::run(args.run_dir, args.resolv_conf))
}
