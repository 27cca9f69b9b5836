//! Decides the steps of one task's life.
//!
//! Pure: facts and wishes come in as [`Event`]s, steps to perform go out as
//! [`Action`]s, each of which comes back as an event. `driver.rs` performs
//! them. Touches nothing and knows no clock.
//!
//! Two ways only. *Forward*: image and sandbox, then the container, then wait
//! for the wish to run, then run. *Down*, once the task is to end for whatever
//! reason: container stopped, sandbox removed, terminal status saved and
//! reported, in this order, so that nobody is given an address that is still
//! in use. A container that others may still reach over a network is stopped only when the managers
//! say that they do not any more, or after a while. An ended container is kept for its log until the task is no longer
//! assigned. What was started once is never started again.

use swarm_proto::TaskId;
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{ContainerStatus, PortConfig, Reason, Task, TaskState, TaskStatus};

use crate::local::TaskRecord;
use crate::runtime::{ContainerState, Exit};

/// Why a step failed for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Machine-readable: "image-not-found".
    pub code: &'static str,
    /// For a person.
    pub text: String,
}

/// What the managers want of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// READY, RUNNING, SHUTDOWN or REMOVE.
    pub desired: i32,
    /// It is no longer assigned at all.
    pub removed: bool,
    /// Others reach it over a network.
    pub networked: bool,
    /// Nobody sends it anything new any more.
    pub withdrawn: bool,
}

impl Wish {
    /// As the task says.
    #[must_use]
    pub fn of(task: &Task, removed: bool) -> Self {
        Self {
            desired: task.desired_state,
            removed,
            networked: !task.networks.is_empty(),
            withdrawn: task.withdrawn,
        }
    }
}

/// A fact, or a wish of the managers.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// What the managers want.
    Wanted(Wish),
    /// It was waited for that for long enough.
    WaitedEnough,
    /// The image is on this node.
    ImageReady,
    /// The sandbox is there, with host ports as bound.
    SandboxReady(Vec<PortConfig>),
    /// Making the sandbox was given up before it was begun.
    SandboxAbandoned,
    /// The container is made.
    Created,
    /// A step before the start failed for good.
    PrepareFailed(Prepare, Failure),
    /// It is on disk that the container may have been started.
    StartSaved,
    /// It could not be put on disk.
    SaveFailed(Failure),
    /// The container runs.
    Started(i32),
    /// It could not be started.
    StartFailed(Failure),
    /// The health check passed, or there is none.
    Healthy,
    /// The health check failed too often.
    Unhealthy,
    /// The container has ended.
    Exited(Exit),
    /// It was stopped.
    Stopped(Exit),
    /// It does not end, not even when killed.
    StopStuck(String),
    /// The sandbox is gone.
    SandboxRemoved,
    /// The terminal status is on disk and on its way.
    Finished,
    /// The container and its files are gone.
    ContainerRemoved,
    /// The last record of the task is gone.
    Forgotten,
}

/// The steps that prepare a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepare {
    /// Pulling the image.
    Image,
    /// Making the sandbox.
    Sandbox,
    /// Making the container.
    Container,
}

/// A step to perform.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Queue this status for the managers (and save it, without waiting).
    Report(TaskStatus),
    /// Make the image present.
    Pull,
    /// Make the sandbox once its networks are programmed. `patient`: a container relies on it; never give up.
    EnsureSandbox {
        /// Try for ever.
        patient: bool,
    },
    /// Give up a pull or the wait for networks.
    CancelPrepare,
    /// Make the container.
    Create,
    /// Put on disk that the container may have been started.
    SaveStart,
    /// Start it.
    Start,
    /// Wait for its end.
    Watch,
    /// Until [`Event::Healthy`] (if not `passed` before), then until [`Event::Unhealthy`].
    CheckHealth {
        /// It has passed before.
        passed: bool,
    },
    /// Come back with [`Event::WaitedEnough`] when others have had long enough to take the task out of balancing.
    AwaitWithdrawal,
    /// Stop it; `attempt` counts from 0.
    Stop {
        /// Earlier attempts that got stuck.
        attempt: u32,
    },
    /// Remove the sandbox.
    RemoveSandbox,
    /// Put the terminal status on disk, then queue it for the managers.
    Finish(TaskStatus),
    /// Remove the container and its files.
    RemoveContainer,
    /// Drop the last record of the task.
    Forget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Image {
    Absent,
    Pulling,
    Present,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Net {
    /// Never made.
    Absent,
    /// An earlier life of the agent may have made it.
    Unknown,
    Making,
    Made,
    Removing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cont {
    Absent,
    Making,
    Created,
    Starting,
    Running,
    Stopping,
    Exited,
    /// A step failed halfway: remove it before anything else.
    Broken,
    Removing,
}

/// One task's life.
#[derive(Clone, Debug)]
pub struct Machine {
    id: TaskId,
    wish: Wish,
    status: TaskStatus,
    started: bool,
    image: Image,
    net: Net,
    container: Cont,
    pid: i32,
    exit: Option<Exit>,
    ports: Vec<PortConfig>,
    /// The status to end with, once decided.
    ending: Option<TaskStatus>,
    /// The decision was announced to the preparing steps.
    cancelled: bool,
    saving_start: bool,
    start_saved: bool,
    watching: bool,
    checking: bool,
    awaiting_withdrawal: bool,
    stop_attempts: u32,
    finishing: bool,
    forgetting: bool,
    forgotten: bool,
}

impl Machine {
    /// A task as it is found: `record` and `container` are empty for a new one.
    #[must_use]
    pub fn new(
        id: TaskId,
        wish: Wish,
        record: &TaskRecord,
        container: Option<ContainerState>,
    ) -> Self {
        let status = record.status.clone().unwrap_or(TaskStatus {
            state: TaskState::Assigned as i32,
            ..Default::default()
        });
        let fresh = record.status.is_none() && container.is_none();
        let ended = terminal(&status);
        let mut machine = Self {
            id,
            wish,
            started: record.started,
            image: Image::Absent,
            // Reconciling has removed the sandboxes of ended tasks.
            net: if fresh || ended {
                Net::Absent
            } else {
                Net::Unknown
            },
            container: Cont::Absent,
            pid: status.container.as_ref().map_or(0, |c| c.pid),
            exit: None,
            ports: status.ports.clone(),
            ending: None,
            cancelled: false,
            saving_start: false,
            start_saved: record.started,
            watching: false,
            checking: false,
            awaiting_withdrawal: false,
            stop_attempts: 0,
            finishing: false,
            forgetting: false,
            forgotten: false,
            status,
        };
        match container {
            None if machine.started && !ended => machine.fail(
                TaskState::Failed,
                "container-lost",
                "task: its container is gone from this node".to_owned(),
            ),
            None => {}
            Some(ContainerState::Created) => {
                machine.image = Image::Present;
                machine.container = Cont::Created;
            }
            Some(ContainerState::Running { pid }) => {
                machine.image = Image::Present;
                machine.started = true;
                machine.pid = pid;
                machine.container = Cont::Running;
            }
            Some(ContainerState::Exited(exit)) => {
                machine.image = Image::Present;
                machine.started = true;
                machine.exited(exit);
            }
        }
        machine
    }

    /// The newest status.
    #[must_use]
    pub fn status(&self) -> &TaskStatus {
        &self.status
    }

    /// What must be on disk of it.
    #[must_use]
    pub fn record(&self) -> TaskRecord {
        TaskRecord {
            status: Some(self.status.clone()),
            #[cfg(not(feature = "museum"))]
            started: self.started,
            #[cfg(feature = "museum")]
            started: self.started
                && !swarm_proto::museum::on(swarm_proto::museum::Bug::StartForgotten),
        }
    }

    /// Nothing is left to do for ever.
    #[must_use]
    pub fn is_forgotten(&self) -> bool {
        self.forgotten
    }

    /// A sandbox is, or may be, there.
    #[must_use]
    pub fn has_sandbox(&self) -> bool {
        self.net != Net::Absent
    }

    /// The container's first process runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.container, Cont::Running | Cont::Stopping)
    }

    /// Takes an event in; returns the steps that follow.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Wanted(wish) => {
                // Wishes only rise, however an old manager may see it.
                self.wish = Wish {
                    desired: self.wish.desired.max(wish.desired),
                    withdrawn: self.wish.withdrawn || wish.withdrawn,
                    ..wish
                };
            }
            Event::WaitedEnough => self.wish.withdrawn = true,
            Event::ImageReady => self.image = Image::Present,
            Event::SandboxReady(ports) => {
                self.net = Net::Made;
                self.ports = ports;
            }
            Event::SandboxAbandoned => self.net = Net::Absent,
            Event::Created => self.container = Cont::Created,
            Event::PrepareFailed(step, failure) => {
                match step {
                    Prepare::Image => self.image = Image::Absent,
                    // It undid what it began; being sure costs nothing.
                    Prepare::Sandbox => self.net = Net::Unknown,
                    Prepare::Container => self.container = Cont::Broken,
                }
                self.fail(TaskState::Rejected, failure.code, failure.text);
            }
            Event::StartSaved => {
                self.saving_start = false;
                self.start_saved = true;
            }
            Event::SaveFailed(failure) => {
                self.saving_start = false;
                self.fail(TaskState::Failed, failure.code, failure.text);
            }
            Event::Started(pid) => {
                self.pid = pid;
                self.container = Cont::Running;
            }
            Event::StartFailed(failure) => {
                self.container = Cont::Broken;
                self.fail(TaskState::Failed, failure.code, failure.text);
            }
            Event::Healthy => {
                self.checking = false;
                if self.ending.is_none() && self.status.state < TaskState::Running as i32 {
                    return self.run_and_go_on();
                }
                self.status.healthy = true;
            }
            Event::Unhealthy => {
                let text = "task: unhealthy container".to_owned();
                self.fail(TaskState::Failed, "unhealthy", text);
            }
            Event::Exited(exit) if self.container == Cont::Stopping => self.exit = Some(exit),
            Event::Exited(exit) => self.exited(exit),
            Event::Stopped(exit) => {
                self.exit.get_or_insert(exit);
                self.container = Cont::Exited;
            }
            Event::StopStuck(text) => {
                if self.exit.is_some() {
                    self.container = Cont::Exited;
                } else {
                    self.stop_attempts += 1;
                    self.container = Cont::Running;
                    self.status.err = format!("task: its container does not stop: {text}");
                    self.status.reason = Some(reason("stop-stuck", &self.id, &self.status.err));
                    let mut actions = vec![Action::Report(self.status.clone())];
                    actions.extend(self.steps());
                    return actions;
                }
            }
            Event::SandboxRemoved => self.net = Net::Absent,
            Event::Finished => {
                self.finishing = false;
                if let Some(ending) = &self.ending {
                    self.status = ending.clone();
                }
            }
            Event::ContainerRemoved => self.container = Cont::Absent,
            Event::Forgotten => self.forgotten = true,
        }
        self.steps()
    }

    fn run_and_go_on(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.status.healthy = true;
        self.report(TaskState::Running, "started", &mut actions);
        actions.extend(self.steps());
        actions
    }

    /// The steps that follow from what is known now.
    pub fn steps(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        let unwanted = self.wish.removed || self.wish.desired >= TaskState::Shutdown as i32;
        if unwanted && self.ending.is_none() && !terminal(&self.status) {
            self.ending = Some(TaskStatus {
                state: TaskState::Shutdown as i32,
                message: "shutdown".to_owned(),
                ..Default::default()
            });
        }
        if self.ending.is_some() || terminal(&self.status) {
            self.go_down(&mut actions);
        } else {
            self.go_forward(&mut actions);
        }
        actions
    }

    fn go_forward(&mut self, actions: &mut Vec<Action>) {
        self.report(TaskState::Accepted, "accepted", actions);
        self.report(TaskState::Preparing, "preparing", actions);
        if self.container == Cont::Absent && self.image == Image::Absent {
            self.image = Image::Pulling;
            actions.push(Action::Pull);
        }
        if matches!(self.net, Net::Absent | Net::Unknown) {
            self.net = Net::Making;
            actions.push(Action::EnsureSandbox {
                patient: self.container == Cont::Running,
            });
        }
        if self.container == Cont::Running && !self.watching {
            self.watching = true;
            actions.push(Action::Watch);
        }
        if self.net != Net::Made {
            return;
        }
        match self.container {
            Cont::Absent if self.image == Image::Present => {
                self.container = Cont::Making;
                actions.push(Action::Create);
            }
            Cont::Created => {
                self.report(TaskState::Ready, "ready to start", actions);
                if self.wish.desired >= TaskState::Running as i32 {
                    self.start(actions);
                }
            }
            Cont::Running if !self.checking => {
                self.checking = true;
                actions.push(Action::CheckHealth {
                    passed: self.status.state >= TaskState::Running as i32,
                });
            }
            _ => {}
        }
    }

    fn start(&mut self, actions: &mut Vec<Action>) {
        self.report(TaskState::Starting, "starting", actions);
        if self.start_saved {
            self.container = Cont::Starting;
            actions.push(Action::Start);
        } else if !self.saving_start {
            self.started = true;
            self.saving_start = true;
            actions.push(Action::SaveStart);
        }
    }

    fn go_down(&mut self, actions: &mut Vec<Action>) {
        if !self.cancelled && (self.image == Image::Pulling || self.net == Net::Making) {
            self.cancelled = true;
            actions.push(Action::CancelPrepare);
        }
        match self.container {
            Cont::Making | Cont::Starting | Cont::Stopping | Cont::Removing => return,
            Cont::Running if self.may_still_be_reached() => {
                if !self.awaiting_withdrawal {
                    self.awaiting_withdrawal = true;
                    actions.push(Action::AwaitWithdrawal);
                }
                return;
            }
            Cont::Running => {
                self.container = Cont::Stopping;
                actions.push(Action::Stop {
                    attempt: self.stop_attempts,
                });
                return;
            }
            Cont::Broken => {
                self.container = Cont::Removing;
                actions.push(Action::RemoveContainer);
                return;
            }
            Cont::Absent | Cont::Created | Cont::Exited => {}
        }
        match self.net {
            Net::Making | Net::Removing => return,
            Net::Made | Net::Unknown => {
                self.net = Net::Removing;
                actions.push(Action::RemoveSandbox);
                return;
            }
            Net::Absent => {}
        }
        if self.finishing || self.saving_start {
            return;
        }
        if !terminal(&self.status) {
            let ending = self.final_status();
            self.ending = Some(ending.clone());
            self.finishing = true;
            actions.push(Action::Finish(ending));
            return;
        }
        if self.wish.removed && !self.forgetting {
            if self.container == Cont::Absent {
                self.forgetting = true;
                actions.push(Action::Forget);
            } else {
                self.container = Cont::Removing;
                actions.push(Action::RemoveContainer);
            }
        }
    }

    /// It runs well and is to end: others may not know yet. What fails is stopped at once, and so is what
    /// nobody speaks of any more.
    fn may_still_be_reached(&self) -> bool {
        self.wish.networked
            && !self.wish.withdrawn
            && !self.wish.removed
            && self.status.state == TaskState::Running as i32
            && self
                .ending
                .as_ref()
                .is_some_and(|ending| ending.state == TaskState::Shutdown as i32)
    }

    fn final_status(&self) -> TaskStatus {
        let mut status = self.ending.clone().unwrap_or_default();
        if self.started {
            let exit = self.exit.unwrap_or(Exit {
                code: 0,
                oom_killed: false,
            });
            status.container = Some(ContainerStatus {
                container_id: self.id.to_string(),
                pid: 0,
                exit_code: exit.code,
                oom_killed: exit.oom_killed,
            });
        }
        status
    }

    fn exited(&mut self, exit: Exit) {
        self.exit = Some(exit);
        self.container = Cont::Exited;
        let unwanted = self.wish.removed || self.wish.desired >= TaskState::Shutdown as i32;
        if unwanted || self.ending.is_some() || terminal(&self.status) {
            return;
        }
        if exit.code == 0 {
            self.ending = Some(TaskStatus {
                state: TaskState::Complete as i32,
                message: "finished".to_owned(),
                ..Default::default()
            });
            return;
        }
        let code = if exit.oom_killed {
            "out-of-memory"
        } else {
            "non-zero-exit"
        };
        let text = format!("task: non-zero exit ({})", exit.code);
        self.fail(TaskState::Failed, code, text);
    }

    /// The first failure decides.
    fn fail(&mut self, state: TaskState, code: &str, text: String) {
        if self.ending.is_some() || terminal(&self.status) {
            return;
        }
        self.ending = Some(TaskStatus {
            state: state as i32,
            message: self.status.message.clone(),
            reason: Some(reason(code, &self.id, &text)),
            err: text,
            ..Default::default()
        });
    }

    fn report(&mut self, state: TaskState, message: &str, actions: &mut Vec<Action>) {
        if self.status.state >= state as i32 {
            return;
        }
        self.status.state = state as i32;
        self.status.message = message.to_owned();
        if state >= TaskState::Ready {
            self.status.ports = self.ports.clone();
        }
        if state >= TaskState::Running {
            self.status.container = Some(ContainerStatus {
                container_id: self.id.to_string(),
                pid: self.pid,
                ..Default::default()
            });
        }
        actions.push(Action::Report(self.status.clone()));
    }
}

fn terminal(status: &TaskStatus) -> bool {
    TaskState::try_from(status.state).is_ok_and(is_terminal)
}

fn reason(code: &str, task: &TaskId, text: &str) -> Reason {
    Reason {
        code: code.to_owned(),
        object: format!("task {task}"),
        message: text.to_owned(),
        since: None,
    }
}

#[cfg(test)]
mod tests;
