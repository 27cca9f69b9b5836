//! Services: what a user wants to run.

use std::collections::HashSet;
use std::sync::Arc;

use swarm_proto::id::random_id;
use swarm_proto::image::ImageRef;
use swarm_proto::v1::{
    CreateServiceRequest, CreateServiceResponse, GetServiceRequest, ListServicesRequest,
    ListServicesResponse, ObjectKind, PortConfig, RemoveServiceRequest, RemoveServiceResponse,
    Service, ServiceSpec, ServiceStatus, TaskState, TaskStatus, UpdateServiceRequest, object,
    service_mode,
};
use swarm_store::State;
use tonic::Status;

use super::filter::{NameMatch, any_of, check, passes};
use super::page::Page;
use super::{
    Control, bounded, create, error, expecting, found, redact, remove, update, validate,
    version_of, written,
};

impl Control {
    pub(super) async fn get_service(&self, request: GetServiceRequest) -> Result<Service, Status> {
        let state = self.state().await?;
        let id = service_id(&state, &request.r#ref)?;
        found(state.service(&id), "service", &id).map(shown)
    }

    pub(super) async fn list_services(
        &self,
        request: ListServicesRequest,
    ) -> Result<ListServicesResponse, Status> {
        check(request.filters.as_ref(), &[("mode", request.modes.len())])?;
        if let Some(unknown) = request
            .modes
            .iter()
            .find(|mode| !["replicated", "global"].contains(&mode.as_str()))
        {
            return Err(Status::invalid_argument(format!(
                "invalid filter 'mode={}'",
                unknown.escape_debug()
            )));
        }
        let page = Page::of(request.page_size, &request.page_token)?;
        let state = self.state().await?;
        let found = state.services_after(page.after());
        let found = found.filter(|service| listed(service, &request));
        let shown = found.map(|service| {
            let mut shown = Service::clone(service);
            redact::service(&mut shown);
            if request.with_status {
                shown.status = Some(status(&state, service));
            }
            shown
        });
        let (mut services, next_page_token) = page.take(shown, |service| &service.id);
        services.sort_by(|a, b| (name(a), &a.id).cmp(&(name(b), &b.id)));
        bounded(ListServicesResponse {
            services,
            next_page_token,
        })
    }

    pub(super) async fn create_service(
        &self,
        request: CreateServiceRequest,
    ) -> Result<CreateServiceResponse, Status> {
        let mut spec = request
            .spec
            .ok_or_else(|| Status::invalid_argument("the service's spec is missing"))?;
        let annotations = spec.annotations.get_or_insert_default();
        if annotations.name.is_empty() {
            annotations.name = unused_name(&*self.state().await?);
        }
        validate::service_spec(&spec).map_err(error::invalid)?;
        let state = self.state().await?;
        resolve_networks(&state, &mut spec)?;
        let id = random_id();
        check_ports(&state, &id, &spec)?;
        let new = Service {
            id: id.clone(),
            spec: Some(spec),
            ..Service::default()
        };
        let state = self
            .write(vec![create(object::Object::Service(new))])
            .await?;
        Ok(CreateServiceResponse {
            service: Some(shown(written(state.service(&id), "service", &id)?)),
            warnings: Vec::new(),
        })
    }

    pub(super) async fn update_service(
        &self,
        request: UpdateServiceRequest,
    ) -> Result<Service, Status> {
        let mut spec = request
            .spec
            .ok_or_else(|| Status::invalid_argument("the service's spec is missing"))?;
        validate::service_spec(&spec).map_err(error::invalid)?;
        let known = |state: &State| {
            state.service(&request.service_id).is_some_and(|old| {
                version_of(old.meta.as_ref()) == request.version
                    && same_surroundings(old.spec.as_ref(), &spec)
            })
        };
        let state = self.state_with(known).await?;
        let id = service_id(&state, &request.service_id)?;
        let old = found(state.service(&id), "service", &id)?;
        if version_of(old.meta.as_ref()) != request.version {
            return Err(error::out_of_sequence());
        }
        if spec_name(&spec) != name(&old) {
            return Err(Status::unimplemented("renaming services is not supported"));
        }
        if is_global(Some(&spec)) != is_global(old.spec.as_ref()) {
            return Err(Status::unimplemented("service mode change is not allowed"));
        }
        keep_credentials(old.spec.as_ref(), &mut spec);
        resolve_networks(&state, &mut spec)?;
        check_ports(&state, &id, &spec)?;
        let new = Service {
            spec: Some(spec),
            // Apply keeps the one before; no need to send it along.
            previous_spec: None,
            meta: expecting(request.version),
            ..old
        };
        let state = self
            .write(vec![update(object::Object::Service(new))])
            .await?;
        written(state.service(&id), "service", &id).map(shown)
    }

    pub(super) async fn remove_service(
        &self,
        request: RemoveServiceRequest,
    ) -> Result<RemoveServiceResponse, Status> {
        let state = self.state().await?;
        let id = service_id(&state, &request.r#ref)?;
        self.write(vec![remove(ObjectKind::Service, &id, 0)])
            .await?;
        Ok(RemoveServiceResponse { id })
    }
}

fn service_id(state: &State, reference: &str) -> Result<String, Status> {
    state
        .resolve(ObjectKind::Service, reference)
        .map_err(error::resolve)
}

fn shown(mut service: Service) -> Service {
    redact::service(&mut service);
    service
}

/// The service's name.
pub(super) fn name(service: &Service) -> &str {
    service.spec.as_ref().map_or("", spec_name)
}

fn spec_name(spec: &ServiceSpec) -> &str {
    spec.annotations
        .as_ref()
        .map_or("", |annotations| annotations.name.as_str())
}

fn is_global(spec: Option<&ServiceSpec>) -> bool {
    let mode = spec
        .and_then(|spec| spec.mode.as_ref())
        .and_then(|mode| mode.mode.as_ref());
    matches!(mode, Some(service_mode::Mode::Global(_)))
}

fn listed(service: &Service, request: &ListServicesRequest) -> bool {
    let labels = service
        .spec
        .as_ref()
        .and_then(|spec| spec.annotations.as_ref())
        .map(|annotations| &annotations.labels);
    let mode = match is_global(service.spec.as_ref()) {
        true => "global",
        false => "replicated",
    };
    passes(
        request.filters.as_ref(),
        NameMatch::Prefix,
        &service.id,
        name(service),
        labels,
    ) && any_of(&request.modes, |wanted| wanted == mode)
}

/// How many tasks run, of how many that should.
fn status(state: &State, service: &Arc<Service>) -> ServiceStatus {
    let (mut running, mut desired) = (0, 0);
    for task in state.tasks_of_service(&service.id) {
        if task.desired_state() != TaskState::Running {
            continue;
        }
        desired += 1;
        let observed = task.status.as_ref().map(TaskStatus::state);
        running += u64::from(observed == Some(TaskState::Running));
    }
    let mode = service
        .spec
        .as_ref()
        .and_then(|spec| spec.mode.as_ref())
        .and_then(|mode| mode.mode.as_ref());
    let desired_tasks = match mode {
        Some(service_mode::Mode::Global(_)) => desired,
        Some(service_mode::Mode::Replicated(replicated)) => replicated.replicas.unwrap_or(1),
        None => 1,
    };
    ServiceStatus {
        running_tasks: running,
        desired_tasks,
    }
}

/// A name for a service that was given none, as Docker does it: "wiggly_yak".
fn unused_name(state: &State) -> String {
    // A number too when most short ones are taken.
    let drawn = (0..16).filter_map(|attempt| {
        let name = petname::petname(2, "_")?;
        Some(match attempt {
            0..8 => name,
            _ => format!("{name}{}", rand::random_range(0..1_000_000)),
        })
    });
    let mut unused = drawn.filter(|name| state.service_by_name(name).is_none());
    unused.next().unwrap_or_else(random_id)
}

/// Names of networks become IDs, each of which may be there once.
fn resolve_networks(state: &State, spec: &mut ServiceSpec) -> Result<(), Status> {
    let Some(task) = &mut spec.task else {
        return Ok(());
    };
    let mut seen = HashSet::new();
    for network in &mut task.networks {
        let id = state
            .resolve(ObjectKind::Network, &network.target)
            .map_err(error::resolve)?;
        if !seen.insert(id.clone()) {
            return Err(Status::invalid_argument(format!(
                "network {} is given more than once",
                network.target
            )));
        }
        network.target = id;
    }
    Ok(())
}

/// Whether a new spec asks nothing of other objects that the old one has not asked: the same
/// networks by their IDs, the same host ports. Then no other object has to be looked at.
fn same_surroundings(old: Option<&ServiceSpec>, new: &ServiceSpec) -> bool {
    let networks = |spec: &ServiceSpec| -> Vec<String> {
        let task = spec.task.as_ref();
        let networks = task.map_or(&[][..], |task| &task.networks);
        networks.iter().map(|n| n.target.clone()).collect()
    };
    old.is_some_and(|old| {
        networks(old) == networks(new)
            && host_ports(old) == host_ports(new)
            && is_everywhere(old) == is_everywhere(new)
    })
}

/// An update without credentials keeps those that are stored, unless the image
/// moves to a registry that they are not for.
fn keep_credentials(old: Option<&ServiceSpec>, new: &mut ServiceSpec) {
    let old = old
        .and_then(|spec| spec.task.as_ref())
        .and_then(|task| task.container.as_ref());
    let new = new.task.as_mut().and_then(|task| task.container.as_mut());
    if let (Some(old), Some(new)) = (old, new)
        && new.pull_auth.is_none()
    {
        let registry = |image| ImageRef::parse(image).map(|image| image.registry().to_owned());
        if registry(&old.image) == registry(&new.image) {
            new.pull_auth.clone_from(&old.pull_auth);
        }
    }
}

/// Refuses a host port that can never be free: one of two services holds it on
/// every node. Where both may be placed apart, the scheduler sees to it.
fn check_ports(state: &State, id: &str, spec: &ServiceSpec) -> Result<(), Status> {
    let wanted = host_ports(spec);
    if wanted.is_empty() {
        return Ok(());
    }
    let everywhere = is_everywhere(spec);
    for other in state.services().filter(|other| other.id != id) {
        let Some(other_spec) = &other.spec else {
            continue;
        };
        if !everywhere && !is_everywhere(other_spec) {
            continue;
        }
        let taken = host_ports(other_spec);
        if let Some((port, _)) = wanted.iter().find(|port| taken.contains(port)) {
            return Err(Status::failed_precondition(format!(
                "port '{port}' is already in use by service '{}' ({}) as a host-published port",
                name(other),
                other.id
            )));
        }
    }
    Ok(())
}

/// Published ports with their protocols. Only mode=host passes the border.
fn host_ports(spec: &ServiceSpec) -> Vec<(u32, i32)> {
    let ports: &[PortConfig] = spec.endpoint.as_ref().map_or(&[], |e| &e.ports);
    ports
        .iter()
        .filter(|port| port.published_port != 0)
        .map(|port| (port.published_port, port.protocol))
        .collect()
}

fn is_everywhere(spec: &ServiceSpec) -> bool {
    let unconstrained = spec
        .task
        .as_ref()
        .and_then(|task| task.placement.as_ref())
        .is_none_or(|placement| placement.constraints.is_empty() && placement.platforms.is_empty());
    is_global(Some(spec)) && unconstrained
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::{
        ContainerSpec, EndpointSpec, GlobalMode, NetworkAttachmentConfig, Placement, PublishMode,
        RegistryAuth, ReplicatedMode, ServiceMode,
    };
    use swarm_store::Consensus as _;
    use swarm_store::testing::{create, network, report, task};
    use tonic::Code;

    use super::super::testing::{Bench, service_spec};
    use super::*;

    fn container(spec: &mut ServiceSpec) -> &mut ContainerSpec {
        spec.task.as_mut().unwrap().container.as_mut().unwrap()
    }

    fn on(spec: &mut ServiceSpec, networks: &[&str]) {
        spec.task.as_mut().unwrap().networks = networks
            .iter()
            .map(|target| NetworkAttachmentConfig {
                target: (*target).to_owned(),
                ..Default::default()
            })
            .collect();
    }

    fn global(spec: &mut ServiceSpec) {
        spec.mode = Some(ServiceMode {
            mode: Some(service_mode::Mode::Global(GlobalMode {})),
        });
    }

    #[tokio::test]
    async fn a_service_without_a_name_is_given_one() {
        let bench = Bench::new();
        let mut names = HashSet::new();
        for _ in 0..20 {
            let service = bench.create_service(service_spec("")).await.unwrap();
            let name = service.spec.unwrap().annotations.unwrap().name;
            assert!(name.contains('_'), "{name}");
            assert!(names.insert(name));
        }
    }

    fn publish(spec: &mut ServiceSpec, ports: &[u32]) {
        spec.endpoint = Some(EndpointSpec {
            ports: ports
                .iter()
                .map(|port| PortConfig {
                    target_port: 80,
                    published_port: *port,
                    publish_mode: PublishMode::Host.into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        });
    }

    async fn refused(bench: &Bench, spec: ServiceSpec, code: Code, message: &str) {
        let before = bench.objects();
        let status = bench.create_service(spec).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, message));
        assert_eq!(bench.objects(), before, "something is half-made");
    }

    #[tokio::test]
    async fn a_service_is_created_with_the_ids_of_its_networks() {
        let bench = Bench::new();
        bench.write([create(network("n1", "my-net", "10.0.1.0/24"))]);
        let mut spec = service_spec("web");
        on(&mut spec, &["my-net"]);
        let service = bench.create_service(spec).await.unwrap();
        assert_eq!(service.spec.unwrap().task.unwrap().networks[0].target, "n1");
        let again = GetServiceRequest {
            r#ref: "web".to_owned(),
        };
        assert_eq!(
            bench.control.get_service(again).await.unwrap().id,
            service.id
        );
    }

    #[tokio::test]
    async fn what_is_wrong_with_a_service_is_said_and_nothing_is_made() {
        use Code::{AlreadyExists, InvalidArgument, NotFound, Unimplemented};
        let bench = Bench::new();
        bench.write([create(network("n1", "my-net", "10.0.1.0/24"))]);
        bench.create_service(service_spec("web")).await.unwrap();

        let mut spec = service_spec("api");
        on(&mut spec, &["missing"]);
        refused(&bench, spec, NotFound, "network missing not found").await;

        let mut spec = service_spec("api");
        on(&mut spec, &["n1", "my-net"]);
        let twice = "network my-net is given more than once";
        refused(&bench, spec, InvalidArgument, twice).await;

        let mut spec = service_spec("api");
        container(&mut spec).image = "UPPER/case image".to_owned();
        let image = "ContainerSpec: \"UPPER/case image\" is not a valid repository/tag";
        refused(&bench, spec, InvalidArgument, image).await;

        let mut spec = service_spec("api");
        spec.task.as_mut().unwrap().placement = Some(Placement {
            constraints: vec!["nonsense".to_owned()],
            ..Default::default()
        });
        let before = bench.objects();
        let status = bench.create_service(spec).await.unwrap_err();
        assert_eq!(status.code(), InvalidArgument);
        assert!(status.message().contains("nonsense"));
        assert_eq!(bench.objects(), before);

        let mut spec = service_spec("api");
        publish(&mut spec, &[8080, 8080]);
        let duplicate = "EndpointSpec: duplicate published ports provided: 8080/tcp";
        refused(&bench, spec, InvalidArgument, duplicate).await;

        let mut spec = service_spec("api");
        publish(&mut spec, &[8080]);
        spec.endpoint.as_mut().unwrap().ports[0].publish_mode = PublishMode::Ingress.into();
        let ingress =
            "publishing port 8080 on every node (mode=ingress) comes later; mode=host works now";
        refused(&bench, spec, Unimplemented, ingress).await;

        let taken = "name conflicts with an existing object: service web already exists";
        refused(&bench, service_spec("web"), AlreadyExists, taken).await;

        let dns = "name must be valid as a DNS name component";
        refused(&bench, service_spec("not_dns!"), InvalidArgument, dns).await;
    }

    #[tokio::test]
    async fn a_host_port_that_is_held_on_every_node_is_taken() {
        let bench = Bench::new();
        let mut spec = service_spec("web");
        publish(&mut spec, &[8080]);
        bench.create_service(spec.clone()).await.unwrap();
        // Another replicated service may be placed beside it.
        spec.annotations.as_mut().unwrap().name = "api".to_owned();
        bench.create_service(spec).await.unwrap();

        let mut everywhere = service_spec("agent");
        global(&mut everywhere);
        publish(&mut everywhere, &[9100]);
        let holder = bench.create_service(everywhere).await.unwrap();
        let mut spec = service_spec("late");
        publish(&mut spec, &[9100]);
        let message = format!(
            "port '9100' is already in use by service 'agent' ({}) as a host-published port",
            holder.id
        );
        refused(&bench, spec, Code::FailedPrecondition, &message).await;
    }

    #[tokio::test]
    async fn an_update_needs_the_version_and_keeps_name_and_mode() {
        let bench = Bench::new();
        let service = bench.create_service(service_spec("web")).await.unwrap();
        let version = version_of(service.meta.as_ref());
        let update = |version, spec| {
            bench.control.update_service(UpdateServiceRequest {
                service_id: service.id.clone(),
                version,
                spec: Some(spec),
            })
        };
        let before = bench.objects();
        let stale = update(version - 1, service_spec("web")).await.unwrap_err();
        assert_eq!(
            (stale.code(), stale.message()),
            (Code::Aborted, "update out of sequence")
        );
        let renamed = update(version, service_spec("www")).await.unwrap_err();
        assert_eq!(
            (renamed.code(), renamed.message()),
            (Code::Unimplemented, "renaming services is not supported")
        );
        let mut other_mode = service_spec("web");
        global(&mut other_mode);
        let changed = update(version, other_mode).await.unwrap_err();
        assert_eq!(
            (changed.code(), changed.message()),
            (Code::Unimplemented, "service mode change is not allowed")
        );
        assert_eq!(bench.objects(), before);
        let mut more = service_spec("web");
        more.mode = Some(ServiceMode {
            mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
                replicas: Some(3),
            })),
        });
        let updated = update(version, more.clone()).await.unwrap();
        assert_eq!(updated.spec, Some(more));
        assert_eq!(updated.previous_spec, Some(service_spec("web")));
    }

    #[tokio::test]
    async fn credentials_are_kept_for_their_registry_and_never_shown() {
        let bench = Bench::new();
        let auth = RegistryAuth {
            username: "me".to_owned(),
            password: "hunter2".to_owned(),
            ..Default::default()
        };
        let mut spec = service_spec("web");
        container(&mut spec).image = "reg:5000/web:1".to_owned();
        container(&mut spec).pull_auth = Some(auth.clone());
        let mut shown = bench.create_service(spec).await.unwrap();
        let stored = |id: &str| {
            let state = bench.consensus.store().state();
            let service = state.service(id).unwrap().clone();
            let spec = service.spec.clone().unwrap();
            spec.task.unwrap().container.clone().unwrap().pull_auth
        };
        for (image, kept) in [
            ("reg:5000/web:2", Some(auth.clone())),
            ("other:5000/web", None),
        ] {
            assert!(!format!("{shown:?}").contains("hunter2"));
            let mut spec = shown.spec.clone().unwrap();
            container(&mut spec).image = image.to_owned();
            shown = bench
                .control
                .update_service(UpdateServiceRequest {
                    service_id: shown.id.clone(),
                    version: version_of(shown.meta.as_ref()),
                    spec: Some(spec),
                })
                .await
                .unwrap();
            assert_eq!(stored(&shown.id), kept);
        }
        let listed = bench
            .control
            .list_services(ListServicesRequest::default())
            .await
            .unwrap();
        assert!(!format!("{listed:?}").contains("hunter2"));
        let state = bench.consensus.store().state();
        assert!(format!("{:?}", state.service(&shown.id)).contains("hunter2"));
    }

    #[tokio::test]
    async fn lists_are_sorted_filtered_and_count_tasks() {
        let bench = Bench::new();
        let web = bench.create_service(service_spec("web")).await.unwrap();
        let mut agent = service_spec("agent");
        global(&mut agent);
        bench.create_service(agent).await.unwrap();
        bench.write([create(task("t1", &web.id, &[]))]);
        bench.write([report("t1", TaskState::Running, 1)]);
        let list = |request| bench.control.list_services(request);
        let all = list(ListServicesRequest {
            with_status: true,
            ..Default::default()
        })
        .await
        .unwrap()
        .services;
        let names: Vec<&str> = all.iter().map(name).collect();
        assert_eq!(names, ["agent", "web"]);
        let counts = all[1].status.unwrap();
        assert_eq!((counts.running_tasks, counts.desired_tasks), (1, 1));
        let globals = list(ListServicesRequest {
            modes: vec!["global".to_owned()],
            ..Default::default()
        })
        .await
        .unwrap();
        assert_eq!(globals.services.len(), 1);
        let unknown = list(ListServicesRequest {
            modes: vec!["cron".to_owned()],
            ..Default::default()
        })
        .await
        .unwrap_err();
        assert_eq!(unknown.message(), "invalid filter 'mode=cron'");
    }

    #[tokio::test]
    async fn a_service_that_is_missing_is_named() {
        let bench = Bench::new();
        let missing = bench
            .control
            .remove_service(RemoveServiceRequest {
                r#ref: "missing".to_owned(),
            })
            .await
            .unwrap_err();
        assert_eq!(
            (missing.code(), missing.message()),
            (Code::NotFound, "service missing not found")
        );
        let web = bench.create_service(service_spec("web")).await.unwrap();
        let removed = bench
            .control
            .remove_service(RemoveServiceRequest {
                r#ref: "web".to_owned(),
            })
            .await
            .unwrap();
        assert_eq!(removed.id, web.id);
        assert!(bench.consensus.store().state().service(&web.id).is_none());
    }
}
