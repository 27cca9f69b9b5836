//! The progress of `service create`, `update` and `scale`: follows the cluster's
//! events until the service has converged and stayed so for a while.
//!
//! [`Progress`] is pure: events in, lines out. [`wait`] feeds and draws it.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::time::Duration;

use swarm_proto::v1::{
    Object, ObjectKind, Service, Task, TaskState, UpdateState, WatchAction, WatchEvent,
    WatchMessage, WatchRequest, object,
};
use swarm_proto::{defaults, task_state};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use super::spec;
use crate::daemon::Daemon;
use crate::failure::{Failure, Result};
use crate::output;
use crate::tasks::{trouble, up_to_date};

/// Up to so many slots have a bar of their own.
const BARS_MAX: u64 = 20;
const BAR: usize = 50;
/// Characters of an error.
const ERROR_SHOWN: usize = 75;
/// Default of `--update-monitor`.
const MONITOR: Duration = Duration::from_secs(5);
/// A watch that was lost (a manager stops, the leader changes) is opened again for so long.
const RETRY_FOR: Duration = Duration::from_secs(30);
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// States that a task passes on its way, in order.
const WAY: [TaskState; 9] = [
    TaskState::New,
    // Docker's "allocated", which has no counterpart, keeps its place in the bar.
    TaskState::New,
    TaskState::Pending,
    TaskState::Assigned,
    TaskState::Accepted,
    TaskState::Preparing,
    TaskState::Ready,
    TaskState::Starting,
    TaskState::Running,
];

/// What is known of one service.
#[derive(Debug)]
struct Progress {
    /// Nothing older than this version counts.
    version: u64,
    id: String,
    service: Option<Service>,
    tasks: BTreeMap<String, Task>,
    removed: bool,
}

/// What to show, and whether there is anything left to wait for.
#[derive(Debug, Default, PartialEq, Eq)]
struct View {
    /// Lines by name, in order.
    lines: Vec<(String, String)>,
    converged: bool,
}

impl Progress {
    fn new(service: &Service) -> Self {
        Self {
            version: super::version(service),
            id: service.id.clone(),
            service: None,
            tasks: BTreeMap::new(),
            removed: false,
        }
    }

    fn take(&mut self, event: WatchEvent) {
        let gone = event.action() == WatchAction::Remove;
        match event.object.and_then(|Object { object }| object) {
            Some(object::Object::Service(service)) if service.id == self.id => {
                self.removed |= gone;
                if super::version(&service) >= self.version {
                    self.service = Some(service);
                }
            }
            Some(object::Object::Task(task)) if task.service_id == self.id => {
                if gone {
                    self.tasks.remove(&task.id);
                } else {
                    self.tasks.insert(task.id.clone(), task);
                }
            }
            _ => {}
        }
    }

    /// How long it must stay converged.
    fn monitor(&self) -> Duration {
        let update = self
            .service
            .as_ref()
            .and_then(|service| service.spec.as_ref()?.update);
        let monitor = update.and_then(|update| update.monitor);
        monitor.map_or(MONITOR, |monitor| {
            Duration::try_from(monitor).unwrap_or_default()
        })
    }

    /// What stops the wait.
    fn end(&self) -> std::result::Result<(), String> {
        if self.removed {
            return Err(format!("service {} was removed", self.id));
        }
        let update = self
            .service
            .as_ref()
            .and_then(|service| service.update_status.as_ref());
        match update {
            Some(update) if update.state() == UpdateState::Paused && self.of_this_spec(update) => {
                Err(format!("service update paused: {}", update.message))
            }
            _ => Ok(()),
        }
    }

    fn of_this_spec(&self, update: &swarm_proto::v1::UpdateStatus) -> bool {
        let spec_version = self
            .service
            .as_ref()
            .and_then(|service| service.spec_version);
        update.spec_version.is_none() || update.spec_version == spec_version
    }

    fn view(&self) -> View {
        let Some(service) = &self.service else {
            return View::default();
        };
        let wanted = service.spec.as_ref().map_or(Some(1), spec::replicas);
        // Each place (slot or node) with its newest wanted task.
        let mut places: BTreeMap<(u64, &str), &Task> = BTreeMap::new();
        let live: Vec<_> = self.tasks.values().filter(|task| is_live(task)).collect();
        for &task in &live {
            let place = place(task);
            let newer = places
                .get(&place)
                .is_none_or(|old| created(task) > created(old));
            if newer {
                places.insert(place, task);
            }
        }
        let total = wanted.unwrap_or(places.len() as u64);
        if wanted.is_none() && total == 0 {
            let text = "overall progress: waiting for new tasks".to_owned();
            return View {
                lines: vec![("overall".to_owned(), text)],
                converged: false,
            };
        }
        let running = places
            .values()
            .filter(|task| state(task) == TaskState::Running && up_to_date(task, service))
            .count() as u64;
        let mut lines = vec![(
            "overall".to_owned(),
            format!("overall progress: {running} out of {total} tasks"),
        )];
        if total <= BARS_MAX {
            match wanted {
                Some(total) => {
                    for slot in 1..=total {
                        let text = self.bar(service, places.get(&(slot, "")).copied(), (slot, ""));
                        lines.push((format!("{slot}"), format!("{slot}/{total}: {text}")));
                    }
                }
                None => {
                    for ((_, node), task) in &places {
                        let text = self.bar(service, Some(task), (0, node));
                        lines.push((
                            (*node).to_owned(),
                            format!("{}: {text}", output::short(node)),
                        ));
                    }
                }
            }
        }
        let updating = service.update_status.as_ref().is_some_and(|update| {
            update.state() == UpdateState::Updating && self.of_this_spec(update)
        });
        View {
            lines,
            converged: running == total && live.len() as u64 == total && !updating,
        }
    }

    fn bar(&self, service: &Service, task: Option<&Task>, at: (u64, &str)) -> String {
        let error = match task {
            Some(task) if state(task) == TaskState::Running => String::new(),
            Some(task) if !trouble(task).is_empty() => trouble(task),
            // It waits for its turn after one that has failed.
            _ => self
                .tasks
                .values()
                .filter(|old| place(old) == at && !is_live(old) && up_to_date(old, service))
                .max_by_key(|old| created(old))
                .map(trouble)
                .unwrap_or_default(),
        };
        if !error.is_empty() {
            return error.chars().take(ERROR_SHOWN).collect();
        }
        let Some(task) = task else {
            return String::new();
        };
        let state = state(task);
        let rank = WAY
            .iter()
            .rposition(|step| *step == state)
            .map_or(WAY.len(), |place| {
                if state == TaskState::New {
                    1
                } else {
                    place + 1
                }
            });
        let done = BAR * rank / WAY.len();
        format!(
            "{:<9} [{}>{}]",
            task_state::name(state),
            "=".repeat(done),
            " ".repeat(BAR - done)
        )
    }
}

fn state(task: &Task) -> TaskState {
    task.status
        .as_ref()
        .map_or(TaskState::New, |status| status.state())
}

/// The cluster wants it, and it has not ended.
fn is_live(task: &Task) -> bool {
    task.desired_state() <= TaskState::Running && !task_state::is_terminal(state(task))
}

fn place(task: &Task) -> (u64, &str) {
    (task.slot, if task.slot == 0 { &task.node_id } else { "" })
}

fn created(task: &Task) -> (i64, i32, u64) {
    let meta = task.meta.unwrap_or_default();
    let at = meta.created_at.unwrap_or_default();
    (at.seconds, at.nanos, meta.version.unwrap_or_default().index)
}

/// Lines that are drawn again in place on a terminal, and one after the other elsewhere.
struct Screen {
    terminal: Option<usize>,
    quiet: bool,
    drawn: Vec<(String, String)>,
}

impl Screen {
    fn new(quiet: bool) -> Self {
        let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        Self {
            terminal: std::io::stdout().is_terminal().then(|| width.unwrap_or(80)),
            quiet,
            drawn: Vec::new(),
        }
    }

    fn draw(&mut self, name: &str, text: &str) -> Result {
        if self.quiet {
            return Ok(());
        }
        let place = self.drawn.iter().position(|(known, _)| known == name);
        if let Some(place) = place
            && self.drawn[place].1 == text
        {
            return Ok(());
        }
        match (self.terminal, place) {
            (None, _) => {
                if !text.is_empty() {
                    output::line(text)?;
                }
            }
            (Some(width), None) => output::line(&cut(text, width))?,
            (Some(width), Some(place)) => {
                let up = self.drawn.len() - place;
                output::print(&format!(
                    "\x1b[{up}A\x1b[2K\r{}\r\x1b[{up}B",
                    cut(text, width)
                ))?;
            }
        }
        match place {
            Some(place) => text.clone_into(&mut self.drawn[place].1),
            None => self.drawn.push((name.to_owned(), text.to_owned())),
        }
        Ok(())
    }
}

fn cut(text: &str, width: usize) -> String {
    text.chars().take(width.saturating_sub(1)).collect()
}

/// Shows the service's progress until it has converged and stayed so. `shown` is what
/// the user calls it; `quiet` waits without a word. Ctrl-C ends the wait, not the work.
pub async fn wait(daemon: &Daemon, service: &Service, shown: &str, quiet: bool) -> Result {
    tokio::select! {
        done = follow(daemon, service, shown, Screen::new(quiet)) => done,
        _ = tokio::signal::ctrl_c() => {
            output::line("Operation continuing in background.")?;
            output::line(&format!("Use `swarm service ps {shown}` to check progress."))
        }
    }
}

async fn follow(daemon: &Daemon, service: &Service, shown: &str, mut screen: Screen) -> Result {
    let mut since: Option<Instant> = None;
    loop {
        let mut progress = Progress::new(service);
        let mut stream = open(daemon, &service.id).await?;
        // Nothing is known before the snapshot is complete.
        let mut complete = false;
        loop {
            if complete {
                progress.end().map_err(Failure::Plain)?;
                let view = progress.view();
                for (name, text) in &view.lines {
                    screen.draw(name, text)?;
                }
                let monitor = progress.monitor();
                match (view.converged, since) {
                    (true, Some(since)) if since.elapsed() >= monitor => {
                        let text = format!("verify: Service {shown} converged");
                        return screen.draw("verify", &text);
                    }
                    (true, _) => {
                        let began = *since.get_or_insert_with(Instant::now);
                        let left = monitor.saturating_sub(began.elapsed()).as_secs_f64().ceil();
                        // Elsewhere than on a terminal the seconds are not counted down.
                        let seconds = if screen.terminal.is_some() {
                            left
                        } else {
                            monitor.as_secs_f64()
                        };
                        let text = format!(
                            "verify: Waiting {seconds} seconds to verify that tasks are stable..."
                        );
                        screen.draw("verify", &text)?;
                    }
                    (false, Some(_)) => {
                        since = None;
                        screen.draw("verify", "verify: Detected task failure")?;
                    }
                    (false, None) => {}
                }
            }
            // While it is to stay converged: at the next full second, for the countdown.
            let tick =
                since.map(|since| since + Duration::from_secs(since.elapsed().as_secs() + 1));
            let message = tokio::select! {
                message = stream.message() => message,
                () = tokio::time::sleep_until(tick.unwrap_or_else(Instant::now)), if tick.is_some() => continue,
            };
            match message {
                Ok(Some(WatchMessage {
                    events,
                    snapshot_done,
                    ..
                })) => {
                    complete |= snapshot_done;
                    events.into_iter().for_each(|event| progress.take(event));
                }
                // The manager has gone, or we were too slow: from the start.
                Ok(None) => break,
                Err(status) if retryable(&status) => break,
                Err(status) => return Err(status.into()),
            }
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn open(daemon: &Daemon, id: &str) -> Result<Streaming<WatchMessage>> {
    let request = WatchRequest {
        kinds: vec![ObjectKind::Service.into(), ObjectKind::Task.into()],
        ids: Vec::new(),
        service_ids: vec![id.to_owned()],
        resume_from: 0,
    };
    let began = Instant::now();
    loop {
        match daemon.control().watch(request.clone()).await {
            Ok(stream) => return Ok(stream.into_inner()),
            Err(status) if retryable(&status) && began.elapsed() < RETRY_FOR => {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            Err(status) => return Err(status.into()),
        }
    }
}

fn retryable(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::OutOfRange | Code::Unknown | Code::Aborted
    )
}

// The heartbeat says how long a manager may be gone before anybody minds; the wait for one is longer.
const _: () = assert!(
    RETRY_FOR.as_secs() > defaults::HEARTBEAT.as_secs() * defaults::HEARTBEATS_MISSED as u64
);

#[cfg(test)]
mod tests {
    use swarm_proto::v1::{
        GlobalMode, Meta, ServiceMode, ServiceSpec, TaskStatus, UpdateStatus, Version, service_mode,
    };

    use super::*;

    fn service(version: u64, replicas: Option<u64>) -> Service {
        let mut spec = ServiceSpec::default();
        match replicas {
            Some(replicas) => spec::set_replicas(&mut spec, replicas).unwrap(),
            None => {
                spec.mode = Some(ServiceMode {
                    mode: Some(service_mode::Mode::Global(GlobalMode {})),
                });
            }
        }
        Service {
            id: "s".to_owned(),
            meta: Some(Meta {
                version: Some(Version { index: version }),
                ..Meta::default()
            }),
            spec: Some(spec),
            spec_version: Some(Version { index: version }),
            ..Service::default()
        }
    }

    fn task(id: &str, slot: u64, spec_version: u64, state: TaskState) -> Task {
        Task {
            id: id.to_owned(),
            service_id: "s".to_owned(),
            slot,
            meta: Some(Meta {
                version: Some(Version {
                    index: id.len() as u64,
                }),
                ..Meta::default()
            }),
            status: Some(TaskStatus {
                state: state.into(),
                ..TaskStatus::default()
            }),
            desired_state: TaskState::Running.into(),
            spec_version: Some(Version {
                index: spec_version,
            }),
            ..Task::default()
        }
    }

    fn event(action: WatchAction, object: object::Object) -> WatchEvent {
        WatchEvent {
            action: action.into(),
            object: Some(Object {
                object: Some(object),
            }),
        }
    }

    fn progress(service: Service, tasks: Vec<Task>) -> Progress {
        let mut progress = Progress::new(&service);
        progress.take(event(
            WatchAction::Snapshot,
            object::Object::Service(service),
        ));
        for task in tasks {
            progress.take(event(WatchAction::Create, object::Object::Task(task)));
        }
        progress
    }

    fn texts(view: &View) -> Vec<&str> {
        view.lines.iter().map(|(_, text)| text.as_str()).collect()
    }

    #[test]
    fn bars_are_drawn_as_people_know_them() {
        let progress = progress(
            service(5, Some(2)),
            vec![
                task("a", 1, 5, TaskState::Running),
                task("b", 2, 5, TaskState::Preparing),
            ],
        );
        let view = progress.view();
        assert_eq!(
            texts(&view),
            [
                "overall progress: 1 out of 2 tasks",
                "1/2: running   [==================================================>]",
                "2/2: preparing [=================================>                 ]",
            ]
        );
        assert!(!view.converged);
    }

    #[test]
    fn a_service_has_converged_when_all_run_and_nothing_else_does() {
        let mut two = progress(
            service(5, Some(2)),
            vec![
                task("a", 1, 5, TaskState::Running),
                task("b", 2, 5, TaskState::Running),
            ],
        );
        assert!(two.view().converged);
        // A third one that is still there after a scale-down.
        two.take(event(
            WatchAction::Create,
            object::Object::Task(task("c", 3, 5, TaskState::Running)),
        ));
        assert!(!two.view().converged);
        two.take(event(
            WatchAction::Remove,
            object::Object::Task(task("c", 3, 5, TaskState::Running)),
        ));
        assert!(two.view().converged);
        assert!(progress(service(5, Some(0)), vec![]).view().converged);
    }

    #[test]
    fn tasks_of_the_old_spec_do_not_count() {
        let mut old = task("a", 1, 4, TaskState::Running);
        old.spec = Some(
            swarm_proto::v1::TaskSpec {
                force_update: 1,
                ..Default::default()
            }
            .into(),
        );
        let progress = progress(service(5, Some(1)), vec![old]);
        assert!(!progress.view().converged);
    }

    #[test]
    fn an_update_that_goes_on_has_not_converged() {
        let mut updating = service(5, Some(1));
        updating.update_status = Some(UpdateStatus {
            state: UpdateState::Updating.into(),
            ..UpdateStatus::default()
        });
        let running = progress(updating, vec![task("a", 1, 5, TaskState::Running)]);
        assert!(!running.view().converged);
    }

    #[test]
    fn an_error_takes_the_place_of_the_bar() {
        let mut failed = task("a", 1, 5, TaskState::Failed);
        failed.status.as_mut().unwrap().err = "No such image: nope:1".to_owned();
        failed.desired_state = TaskState::Shutdown.into();
        let progress = progress(
            service(5, Some(1)),
            vec![failed, task("bb", 1, 5, TaskState::New)],
        );
        assert_eq!(texts(&progress.view())[1], "1/1: No such image: nope:1");
    }

    #[test]
    fn an_older_state_of_the_service_is_not_taken_for_the_new_one() {
        let mut progress = Progress::new(&service(5, Some(1)));
        progress.take(event(
            WatchAction::Snapshot,
            object::Object::Service(service(4, Some(0))),
        ));
        assert!(!progress.view().converged);
    }

    #[test]
    fn a_global_service_waits_for_its_first_task() {
        let mut global = progress(service(5, None), vec![]);
        assert_eq!(
            texts(&global.view()),
            ["overall progress: waiting for new tasks"]
        );
        let mut one = task("a", 0, 5, TaskState::Running);
        one.node_id = "node1234567890abcdef".to_owned();
        global.take(event(WatchAction::Create, object::Object::Task(one)));
        let view = global.view();
        assert!(texts(&view)[1].starts_with("node12345678: running"));
        assert!(view.converged);
    }

    #[test]
    fn many_replicas_have_one_line() {
        let progress = progress(service(5, Some(21)), vec![]);
        assert_eq!(
            texts(&progress.view()),
            ["overall progress: 0 out of 21 tasks"]
        );
    }

    #[test]
    fn a_paused_update_and_a_removed_service_end_the_wait() {
        let mut paused = service(5, Some(1));
        paused.update_status = Some(UpdateStatus {
            state: UpdateState::Paused.into(),
            message: "task t failed".to_owned(),
            ..UpdateStatus::default()
        });
        let paused = progress(paused, vec![]);
        assert_eq!(
            paused.end(),
            Err("service update paused: task t failed".to_owned())
        );
        let mut removed = progress(service(5, Some(1)), vec![]);
        removed.take(event(
            WatchAction::Remove,
            object::Object::Service(service(5, Some(1))),
        ));
        assert!(removed.end().is_err());
    }
}
