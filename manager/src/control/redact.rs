//! Takes out of objects what no caller may see: keys, tokens, registry credentials.

use swarm_proto::Shared;
use swarm_proto::v1::{Cluster, Object, Service, ServiceSpec, Task, TaskSpec, object};

pub(super) fn cluster(cluster: &mut Cluster) {
    if let Some(root) = &mut cluster.root_ca {
        root.key_pem.clear();
        root.join_tokens = None;
    }
}

pub(super) fn service(service: &mut Service) {
    for spec in [&mut service.spec, &mut service.previous_spec]
        .into_iter()
        .flatten()
    {
        service_spec(spec);
    }
}

pub(super) fn task(task: &mut Task) {
    task.spec.iter_mut().for_each(task_spec);
}

pub(super) fn object(changed: &mut Object) {
    match &mut changed.object {
        Some(object::Object::Cluster(found)) => cluster(found),
        Some(object::Object::Service(found)) => service(found),
        Some(object::Object::Task(found)) => task(found),
        Some(object::Object::Node(_) | object::Object::Network(_)) | None => {}
    }
}

fn service_spec(spec: &mut ServiceSpec) {
    spec.task.iter_mut().for_each(task_spec);
}

fn task_spec(spec: &mut Shared<TaskSpec>) {
    // Only where there is something to take out: to change it is to copy it.
    let container = spec.container.as_ref();
    if container.is_some_and(|container| container.pull_auth.is_some())
        && let Some(container) = &mut spec.container
    {
        container.pull_auth = None;
    }
}
