//! The machine against a model of a node that crashes at any point.

use proptest::prelude::*;

use super::*;

/// What outlives the agent, and what the managers were told.
#[derive(Debug, Default)]
struct Node {
    saved: TaskRecord,
    container: Option<ContainerState>,
    sandbox: bool,
    starts: u32,
    told: Vec<i32>,
    forgotten: bool,
}

struct Life {
    machine: Machine,
    /// Steps begun and not yet come back.
    flying: Vec<Action>,
}

const ENDED: Exit = Exit {
    code: 143,
    oom_killed: false,
};

/// Of a task on a network.
fn wish(desired: i32) -> Wish {
    Wish {
        desired,
        removed: false,
        networked: true,
        withdrawn: false,
    }
}

fn failure() -> Failure {
    Failure {
        code: "test",
        text: "broken by the test".to_owned(),
    }
}

impl Node {
    fn running(&self) -> bool {
        matches!(self.container, Some(ContainerState::Running { .. }))
    }

    fn begin(&mut self, desired: i32) -> Life {
        let id = TaskId::from("a");
        let wish = wish(desired);
        let mut machine = Machine::new(id, wish, &self.saved, self.container.clone());
        // Reconciling removes what nobody claims.
        self.sandbox &= machine.has_sandbox();
        let flying = machine.steps();
        let mut life = Life {
            machine,
            flying: Vec::new(),
        };
        self.take(&mut life, flying);
        life
    }

    fn take(&mut self, life: &mut Life, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Report(status) => self.tell(&status),
                other => life.flying.push(other),
            }
        }
    }

    fn tell(&mut self, status: &TaskStatus) {
        if terminal(status) {
            assert!(!self.sandbox, "address given back while it is in use");
            assert!(!self.running(), "ended while its container runs");
        }
        let ended = self.told.iter().find(|s| **s > TaskState::Running as i32);
        if let Some(ended) = ended {
            assert_eq!(*ended, status.state, "a second end");
        }
        self.told.push(status.state);
    }

    /// The effect of a step, and what comes back of it.
    fn effect(&mut self, action: &Action, machine: &Machine, fail: bool) -> Option<Event> {
        Some(match action {
            Action::Report(_) => return None,
            Action::Pull if fail => Event::PrepareFailed(Prepare::Image, failure()),
            Action::Pull => Event::ImageReady,
            Action::EnsureSandbox { patient: false } if fail => {
                Event::PrepareFailed(Prepare::Sandbox, failure())
            }
            Action::EnsureSandbox { .. } => {
                self.sandbox = true;
                Event::SandboxReady(Vec::new())
            }
            Action::CancelPrepare => return None,
            Action::Create if fail => Event::PrepareFailed(Prepare::Container, failure()),
            Action::Create => {
                assert!(self.sandbox, "a container without its sandbox");
                assert!(self.container.is_none(), "made twice");
                self.container = Some(ContainerState::Created);
                Event::Created
            }
            Action::SaveStart if fail => Event::SaveFailed(failure()),
            Action::SaveStart => {
                self.saved = machine.record();
                Event::StartSaved
            }
            Action::Start => {
                assert!(self.saved.started, "started before that was on disk");
                assert_eq!(self.container, Some(ContainerState::Created));
                self.starts += 1;
                if fail {
                    self.container = Some(ContainerState::Exited(ENDED));
                    return Some(Event::StartFailed(failure()));
                }
                self.container = Some(ContainerState::Running { pid: 1 });
                Event::Started(1)
            }
            Action::Watch => match self.container {
                Some(ContainerState::Exited(exit)) => Event::Exited(exit),
                _ => return None,
            },
            Action::CheckHealth { passed: false } if fail => Event::Unhealthy,
            Action::CheckHealth { passed: false } => Event::Healthy,
            Action::CheckHealth { passed: true } if fail => Event::Unhealthy,
            Action::CheckHealth { passed: true } => return None,
            Action::AwaitWithdrawal => Event::WaitedEnough,
            Action::Stop { .. } if fail => Event::StopStuck("test".to_owned()),
            Action::Stop { .. } => {
                if self.running() {
                    self.container = Some(ContainerState::Exited(ENDED));
                }
                Event::Stopped(ENDED)
            }
            Action::RemoveSandbox => {
                self.sandbox = false;
                Event::SandboxRemoved
            }
            Action::Finish(status) => {
                self.saved.status = Some(status.clone());
                self.saved.started = machine.record().started;
                self.tell(status);
                Event::Finished
            }
            Action::RemoveContainer => {
                self.container = None;
                Event::ContainerRemoved
            }
            Action::Forget => {
                self.forgotten = true;
                Event::Forgotten
            }
        })
    }

    /// One step comes back. False if it goes on waiting.
    fn finish(&mut self, life: &mut Life, which: usize, fail: bool) -> bool {
        let action = life.flying.remove(which);
        let waits = matches!(action, Action::Watch | Action::CheckHealth { passed: true });
        match self.effect(&action, &life.machine, fail) {
            Some(event) => {
                let actions = life.machine.on(event);
                self.take(life, actions);
                true
            }
            None if waits => {
                life.flying.insert(which, action);
                false
            }
            None => true,
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Finish {
        which: usize,
        fail: bool,
    },
    /// The agent dies; a step may have had its effect without anybody knowing.
    Crash {
        effects: Vec<bool>,
    },
    Want(i32),
    Exit(i32),
    Save,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..8usize, prop::bool::weighted(0.05))
            .prop_map(|(which, fail)| Step::Finish { which, fail }),
        2 => prop::collection::vec(any::<bool>(), 8).prop_map(|effects| Step::Crash { effects }),
        1 => prop::sample::select(vec![TaskState::Running as i32, TaskState::Shutdown as i32])
            .prop_map(Step::Want),
        1 => (0..2i32).prop_map(Step::Exit),
        2 => Just(Step::Save),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn crashes_anywhere_neither_start_twice_nor_leave_anything(
        steps in prop::collection::vec(any_step(), 0..60)
    ) {
        let mut node = Node::default();
        let mut desired = TaskState::Ready as i32;
        let mut life = node.begin(desired);
        for step in steps {
            match step {
                Step::Finish { which, fail } if !life.flying.is_empty() => {
                    let which = which % life.flying.len();
                    node.finish(&mut life, which, fail);
                }
                Step::Finish { .. } => {}
                Step::Crash { effects } => {
                    let Life { machine, flying } = life;
                    for (action, done) in flying.iter().zip(effects) {
                        let told = matches!(action, Action::Finish(_));
                        if done && !told {
                            node.effect(action, &machine, false);
                        }
                    }
                    life = node.begin(desired);
                }
                Step::Want(state) => {
                    desired = desired.max(state);
                    let event = Event::Wanted(wish(desired));
                    let actions = life.machine.on(event);
                    node.take(&mut life, actions);
                }
                Step::Exit(code) => if node.running() {
                    let exit = Exit { code, oom_killed: false };
                    node.container = Some(ContainerState::Exited(exit));
                },
                Step::Save => {
                    // Without waiting for it, the newest record reaches the disk sooner or later. A terminal
                    // one does only with its own step.
                    if !terminal(life.machine.status()) && !terminal(&node.saved.status.clone().unwrap_or_default()) {
                        node.saved = life.machine.record();
                    }
                }
            }
            prop_assert!(node.starts <= 1, "started twice");
        }
        // Whatever happened: no longer assigned, it goes without a trace.
        let actions = life.machine.on(Event::Wanted(Wish { removed: true, ..wish(desired) }));
        node.take(&mut life, actions);
        for _ in 0..100 {
            let ready = (0..life.flying.len()).any(|which| node.finish(&mut life, which, false));
            if !ready {
                break;
            }
        }
        prop_assert!(node.forgotten, "stuck with {:?} in {:?}", life.flying, life.machine);
        prop_assert!(node.container.is_none() && !node.sandbox);
        prop_assert!(node.starts <= 1);
    }
}

#[test]
fn a_container_that_does_not_stop_is_reported_and_tried_again() {
    let id = TaskId::from("a");
    let record = TaskRecord {
        status: Some(TaskStatus {
            state: TaskState::Running as i32,
            ..Default::default()
        }),
        started: true,
    };
    let running = Some(ContainerState::Running { pid: 1 });
    let shutdown = TaskState::Shutdown as i32;
    let mut machine = Machine::new(id, wish(shutdown), &record, running);
    assert_eq!(machine.steps(), [Action::AwaitWithdrawal]);
    assert_eq!(machine.steps(), []);
    let withdrawn = Wish {
        withdrawn: true,
        ..wish(shutdown)
    };
    let actions = machine.on(Event::Wanted(withdrawn));
    assert_eq!(actions, [Action::Stop { attempt: 0 }]);
    assert_eq!(machine.on(Event::WaitedEnough), []);
    let actions = machine.on(Event::StopStuck("test".to_owned()));
    assert!(matches!(&actions[0], Action::Report(status) if status.err.contains("does not stop")));
    assert_eq!(actions[1], Action::Stop { attempt: 1 });
    assert_eq!(machine.on(Event::Stopped(ENDED)), [Action::RemoveSandbox]);
}

#[test]
fn the_first_cause_of_an_end_is_the_one_reported() {
    let id = TaskId::from("a");
    let running = Some(ContainerState::Running { pid: 1 });
    let desired = TaskState::Running as i32;
    let mut machine = Machine::new(id, wish(desired), &TaskRecord::default(), running);
    machine.steps();
    machine.on(Event::SandboxReady(Vec::new()));
    machine.on(Event::Unhealthy);
    machine.on(Event::Exited(ENDED));
    machine.on(Event::Stopped(ENDED));
    let end = machine.on(Event::SandboxRemoved);
    let [Action::Finish(status)] = end.as_slice() else {
        panic!("{end:?}");
    };
    assert_eq!(status.state, TaskState::Failed as i32);
    assert_eq!(status.err, "task: unhealthy container");
}
