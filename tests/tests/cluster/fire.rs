//! A cluster under fire answers as if there were one copy of its state; a busy one raises no alarm.

use std::time::Duration;

use anyhow::{Result, ensure};
use swarm_tests::cluster::Cluster;
use swarm_tests::fire::{alarms, run};

#[test]
fn whatever_happens_the_api_is_linearizable() -> Result<()> {
    let mut cluster = Cluster::up(3, 3)?;
    let options = run::Options {
        ops: 100_000,
        hold: Duration::from_millis(1500),
        ..run::Options::default()
    };
    let summary = run::run(&mut cluster, &options)?.verdict()?;
    eprintln!("{summary}");
    ensure!(
        summary.answered >= summary.refused + summary.unknown,
        "most operations were not answered:\n{summary}"
    );
    Ok(())
}

#[test]
fn a_busy_cluster_raises_no_false_alarm_and_misses_no_true_one() -> Result<()> {
    let mut cluster = Cluster::up(5, 3)?;
    let options = alarms::Options {
        busy: Duration::from_secs(20),
        stalled: Duration::from_secs(8),
        ..alarms::Options::default()
    };
    let report = alarms::run(&mut cluster, &options)?.verdict()?;
    eprintln!("{report}");
    Ok(())
}
