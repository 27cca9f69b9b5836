//! The museum: known bugs put back, one at a time, to see that the simulation catches them.

#[cfg(feature = "museum")]
pub use with::{put_back, run};
#[cfg(not(feature = "museum"))]
pub use without::{put_back, run};

#[cfg(feature = "museum")]
mod with {
    use std::io::Write as _;
    use std::process::ExitCode;
    use std::sync::Mutex;
    use std::time::Instant;

    use swarm_proto::museum::ALL;
    pub use swarm_proto::museum::put_back_named as put_back;

    use crate::{Args, runner};

    /// Each bug, seed after seed until it is caught.
    pub fn run(args: &Args) -> ExitCode {
        let mut args = args.clone();
        let only = args.only.clone().or_else(|| args.bug.clone());
        let sound = Mutex::default();
        let chosen = |name: &str| only.as_deref().is_none_or(|only| only == name);
        let exhibits: Vec<_> = ALL.iter().filter(|exhibit| chosen(exhibit.name)).collect();
        let mut caught = 0;
        for exhibit in &exhibits {
            let began = Instant::now();
            args.bug = Some(exhibit.name.to_owned());
            let seeds = args.seeds.unwrap_or(1000);
            match runner::until_caught(&args, args.first, seeds, &sound) {
                Some((seed, reason)) => {
                    caught += 1;
                    println!(
                        "{}: caught by seed {seed} after {:.0} s: {}\n  again: {}",
                        exhibit.name,
                        began.elapsed().as_secs_f64(),
                        reason.lines().next().unwrap_or_default(),
                        runner::replay(&args, seed),
                    );
                }
                None => println!(
                    "{}: NOT caught in {} seeds, {:.0} s ({}; to be caught by: {})",
                    exhibit.name,
                    seeds,
                    began.elapsed().as_secs_f64(),
                    exhibit.what,
                    exhibit.caught_by,
                ),
            }
            let _ = std::io::stdout().flush();
        }
        println!("caught {caught} of {}", exhibits.len());
        // Nine in ten.
        if caught * 10 >= exhibits.len() * 9 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "museum"))]
mod without {
    use std::process::ExitCode;

    use crate::Args;

    /// There are none in this build.
    pub fn put_back(_: &str) -> Result<(), String> {
        Err("this build has no museum: build with --features museum".to_owned())
    }

    /// There are none in this build.
    pub fn run(_: &Args) -> ExitCode {
        eprintln!("sim: this build has no museum: build with --features museum");
        ExitCode::FAILURE
    }
}
