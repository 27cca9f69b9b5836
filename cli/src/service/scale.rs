//! `swarm service scale`

use super::{change, progress, spec};
use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;
use crate::output::list;

/// Scale one or multiple replicated services
#[derive(clap::Args, Debug)]
pub struct Scale {
    /// Exit immediately instead of waiting for the service to converge
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    detach: std::primitive::bool,
    /// SERVICE=REPLICAS
    #[arg(required = true, value_name = "SERVICE=REPLICAS")]
    services: Vec<String>,
}

pub(crate) fn parse(text: &str) -> std::result::Result<(String, u64), String> {
    let (name, replicas) = text.split_once('=').ok_or_else(|| {
        format!("invalid scale specifier '{text}'. Expected format is <service>=<replicas>")
    })?;
    let replicas = replicas.parse().map_err(|_| {
        format!("{name}: invalid replicas value {replicas}: it must be a whole number")
    })?;
    Ok((name.to_owned(), replicas))
}

/// Changes the number of replicas of each, then waits for each.
pub async fn run(flags: Scale, daemon: &Daemon) -> Result {
    // All are read before any is changed.
    let wanted = flags
        .services
        .iter()
        .map(|text| parse(text))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let mut errors = Vec::new();
    let mut waiting = Vec::new();
    for (name, replicas) in &wanted {
        let scaled = change(daemon, name, |service| {
            let mut new = service.spec.clone().unwrap_or_default();
            spec::set_replicas(&mut new, *replicas).map_err(|()| {
                format!("{name}: scale can only be used with replicated or replicated-job mode")
            })?;
            Ok(new)
        });
        match scaled.await {
            Ok(service) => {
                output::line(&format!("{name} scaled to {replicas}"))?;
                waiting.push((service, name));
            }
            Err(failure) => errors.extend(failure.text()),
        }
    }
    if !flags.detach {
        for (service, name) in waiting {
            progress::wait(daemon, &service, name, false).await?;
        }
    }
    list::finish(&errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_a_name_and_a_number() {
        assert_eq!(parse("web=3"), Ok(("web".to_owned(), 3)));
        assert!(
            parse("web")
                .unwrap_err()
                .contains("invalid scale specifier 'web'")
        );
        assert!(parse("web=many").unwrap_err().contains("many"));
        assert!(parse("web=-1").is_err());
    }
}
