//! The leader's loop around the scheduler.

use swarm_proto::v1::{object, store_action};
use swarm_store::{Event, State};

use super::Scheduler;
use crate::leader::{Feed, LoopContext, Proposed, Turn, weight};

/// Places pending tasks until the term ends. Wakes with every change, takes in all
/// that are there, then decides: no debounce, and one pass for a burst.
pub(crate) async fn run(context: LoopContext) {
    let mut feed = Feed::new(&context);
    let mut scheduler = Scheduler::new(feed.state());
    let mut turn = Turn::default();
    loop {
        let groups = scheduler.decide(feed.state(), context.now());
        turn.spent(groups.iter().flatten().map(weight).sum()).await;
        if !groups.is_empty() {
            let Proposed { refused, failed } = tokio::select! {
                () = context.cancel.cancelled() => return,
                proposed = context.propose_groups(groups) => proposed,
            };
            if let Some(error) = failed {
                if !context.settle(&error).await {
                    return;
                }
                feed = Feed::new(&context);
                scheduler = Scheduler::new(feed.state());
                continue;
            }
            // What was refused has changed meanwhile: the change is on its way here. So it is
            // for an assignment that apply has left out.
            for action in refused.into_iter().flatten() {
                match action.action {
                    Some(store_action::Action::AssignTasks(decided)) => {
                        for assignment in decided.assignments {
                            scheduler.take_back(feed.state(), &assignment.task_id);
                        }
                    }
                    Some(store_action::Action::Update(object)) => {
                        if let Some(object::Object::Task(task)) = object.object {
                            scheduler.take_back(feed.state(), &task.id);
                        }
                    }
                    _ => {}
                }
            }
        }
        let fed = tokio::select! {
            biased;
            () = context.cancel.cancelled() => return,
            fed = feed.next(&context) => fed,
            () = tokio::task::yield_now(), if scheduler.was_cut() => continue,
        };
        let Some(changes) = fed else { return };
        let observe = |_: &State, events: &[Event]| scheduler.observe(events);
        turn.each(&changes, observe).await;
    }
}
