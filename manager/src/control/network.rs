//! Overlay networks, and who is on them.

use std::collections::BTreeMap;
use std::sync::Arc;

use swarm_proto::id::random_id;
use swarm_proto::names::task_name;
use swarm_proto::v1::{
    CreateNetworkRequest, GetNetworkRequest, ListNetworksRequest, ListNetworksResponse, Network,
    NetworkDetail, NetworkPeer, NetworkService, NetworkTask, Node, ObjectKind,
    RemoveNetworkRequest, RemoveNetworkResponse, Service, Task, object,
};
use swarm_store::State;
use tonic::Status;

use super::filter::{NameMatch, any_of, check, passes};
use super::page::Page;
use super::{Control, bounded, create, error, found, remove, service, validate, written};

impl Control {
    pub(super) async fn get_network(
        &self,
        request: GetNetworkRequest,
    ) -> Result<NetworkDetail, Status> {
        let state = self.state().await?;
        let id = network_id(&state, &request.r#ref)?;
        let network = Some(found(state.network(&id), "network", &id)?);
        if !request.verbose {
            return Ok(NetworkDetail {
                network,
                ..NetworkDetail::default()
            });
        }
        let mut tasks_of: BTreeMap<&str, Vec<&Arc<Task>>> = BTreeMap::new();
        for task in state.tasks_on_network(&id) {
            tasks_of.entry(&task.service_id).or_default().push(task);
        }
        let mut users: BTreeMap<&str, &Arc<Service>> = state
            .services_on_network(&id)
            .map(|service| (service.id.as_str(), service))
            .collect();
        // A service that has left the network may still have tasks there.
        for service_id in tasks_of.keys() {
            if let Some(service) = state.service(service_id) {
                users.insert(&service.id, service);
            }
        }
        let mut services: Vec<NetworkService> = users
            .into_values()
            .map(|service| {
                let tasks = tasks_of.remove(service.id.as_str()).unwrap_or_default();
                on_network(&state, &id, service, &tasks)
            })
            .collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        bounded(NetworkDetail {
            network,
            services,
            peers: peers(&state, &id),
        })
    }

    pub(super) async fn list_networks(
        &self,
        request: ListNetworksRequest,
    ) -> Result<ListNetworksResponse, Status> {
        check(
            request.filters.as_ref(),
            &[("driver", request.drivers.len())],
        )?;
        let page = Page::of(request.page_size, &request.page_token)?;
        let state = self.state().await?;
        let found = state.networks_after(page.after());
        let found = found.filter(|network| listed(network, &request));
        let (mut networks, next_page_token) = page
            .take(found.map(|network| Network::clone(network)), |network| {
                &network.id
            });
        networks.sort_by(|a, b| (name(a), &a.id).cmp(&(name(b), &b.id)));
        bounded(ListNetworksResponse {
            networks,
            next_page_token,
        })
    }

    pub(super) async fn create_network(
        &self,
        request: CreateNetworkRequest,
    ) -> Result<Network, Status> {
        let mut spec = request
            .spec
            .ok_or_else(|| Status::invalid_argument("the network's spec is missing"))?;
        let mtu = validate::network_spec(&spec).map_err(error::invalid)?;
        "overlay".clone_into(&mut spec.driver);
        let id = random_id();
        let new = Network {
            id: id.clone(),
            spec: Some(spec),
            mtu,
            ..Network::default()
        };
        let state = self
            .write(vec![create(object::Object::Network(new))])
            .await?;
        written(state.network(&id), "network", &id)
    }

    pub(super) async fn remove_network(
        &self,
        request: RemoveNetworkRequest,
    ) -> Result<RemoveNetworkResponse, Status> {
        let state = self.state().await?;
        let id = network_id(&state, &request.r#ref)?;
        self.write(vec![remove(ObjectKind::Network, &id, 0)])
            .await?;
        Ok(RemoveNetworkResponse { id })
    }
}

fn network_id(state: &State, reference: &str) -> Result<String, Status> {
    state
        .resolve(ObjectKind::Network, reference)
        .map_err(error::resolve)
}

fn name(network: &Network) -> &str {
    network
        .spec
        .as_ref()
        .and_then(|spec| spec.annotations.as_ref())
        .map_or("", |annotations| annotations.name.as_str())
}

fn listed(network: &Network, request: &ListNetworksRequest) -> bool {
    let spec = network.spec.as_ref();
    let labels = spec
        .and_then(|spec| spec.annotations.as_ref())
        .map(|annotations| &annotations.labels);
    passes(
        request.filters.as_ref(),
        NameMatch::Substring,
        &network.id,
        name(network),
        labels,
    ) && any_of(&request.drivers, |driver| {
        spec.is_some_and(|spec| spec.driver == *driver)
    })
}

fn on_network(
    state: &State,
    network_id: &str,
    of: &Service,
    tasks: &[&Arc<Task>],
) -> NetworkService {
    let endpoint = of.endpoint.as_ref();
    let vip = endpoint
        .into_iter()
        .flat_map(|endpoint| &endpoint.virtual_ips)
        .find(|vip| vip.network_id == network_id)
        .map_or("", |vip| without_prefix(&vip.addr));
    let mut tasks: Vec<(u64, NetworkTask)> = tasks
        .iter()
        .map(|task| {
            let addr = task
                .networks
                .iter()
                .find(|attachment| attachment.network_id == network_id)
                .and_then(|attachment| attachment.addresses.first());
            let shown = NetworkTask {
                task_id: task.id.clone(),
                name: task_name(task),
                addr: addr.map_or("", |addr| without_prefix(addr)).to_owned(),
                node_id: task.node_id.clone(),
                vtep: state
                    .node(&task.node_id)
                    .map_or("", |node| vtep(node))
                    .to_owned(),
            };
            (task.slot, shown)
        })
        .collect();
    tasks.sort_by(|(a_slot, a), (b_slot, b)| (a_slot, &a.name).cmp(&(b_slot, &b.name)));
    NetworkService {
        service_id: of.id.clone(),
        name: service::name(of).to_owned(),
        vip: vip.to_owned(),
        ports: endpoint.map_or_else(Vec::new, |endpoint| endpoint.ports.clone()),
        tasks: tasks.into_iter().map(|(_, task)| task).collect(),
    }
}

/// The nodes that hold the network, because a task on it is theirs.
fn peers(state: &State, network_id: &str) -> Vec<NetworkPeer> {
    let nodes: BTreeMap<&str, &Arc<Node>> = state
        .tasks_on_network(network_id)
        .filter_map(|task| state.node(&task.node_id))
        .map(|node| (node.id.as_str(), node))
        .collect();
    let mut peers: Vec<NetworkPeer> = nodes
        .into_values()
        .map(|node| NetworkPeer {
            node_id: node.id.clone(),
            hostname: node
                .description
                .as_ref()
                .map_or_else(String::new, |description| description.hostname.clone()),
            addr: vtep(node).to_owned(),
        })
        .collect();
    peers.sort_by(|a, b| (&a.hostname, &a.node_id).cmp(&(&b.hostname, &b.node_id)));
    peers
}

fn vtep(node: &Node) -> &str {
    node.description
        .as_ref()
        .map_or("", |description| description.data_path_addr.as_str())
}

fn without_prefix(addr: &str) -> &str {
    addr.split_once('/').map_or(addr, |(addr, _)| addr)
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::{Annotations, Filters, IpamOptions, IpamPool, NetworkSpec};
    use swarm_store::Consensus as _;
    use swarm_store::testing::{self, create};
    use tonic::Code;

    use super::super::testing::Bench;
    use super::super::validate::MTU_OPTION;
    use super::*;

    fn spec(name: &str, subnets: &[&str]) -> NetworkSpec {
        NetworkSpec {
            annotations: Some(Annotations {
                name: name.to_owned(),
                ..Default::default()
            }),
            ipam: Some(IpamOptions {
                configs: subnets
                    .iter()
                    .map(|subnet| IpamPool {
                        subnet: (*subnet).to_owned(),
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    async fn make(bench: &Bench, spec: NetworkSpec) -> Result<Network, Status> {
        bench
            .control
            .create_network(CreateNetworkRequest { spec: Some(spec) })
            .await
    }

    async fn refused(bench: &Bench, spec: NetworkSpec, code: Code, message: &str) {
        let before = bench.objects();
        let status = make(bench, spec).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, message));
        assert_eq!(bench.objects(), before, "something is half-made");
    }

    #[tokio::test]
    async fn a_network_gets_its_driver_and_mtu() {
        let bench = Bench::new();
        let mut wanted = spec("net", &["10.50.1.0/24"]);
        wanted
            .driver_opts
            .insert(MTU_OPTION.to_owned(), "1400".to_owned());
        let network = make(&bench, wanted).await.unwrap();
        assert_eq!(network.mtu, 1400);
        assert_eq!(network.spec.as_ref().unwrap().driver, "overlay");
        assert_eq!(
            network.subnets[0].pool.as_ref().unwrap().subnet,
            "10.50.1.0/24"
        );
    }

    #[tokio::test]
    async fn what_is_wrong_with_a_network_is_said_and_nothing_is_made() {
        let bench = Bench::new();
        let taken = make(&bench, spec("taken", &["10.50.0.0/24"]))
            .await
            .unwrap();
        let cidr = "invalid subnet foo: invalid CIDR block notation";
        refused(&bench, spec("n", &["foo"]), Code::InvalidArgument, cidr).await;
        let bits = "invalid subnet 10.50.1.5/24: it should be 10.50.1.0/24";
        refused(
            &bench,
            spec("n", &["10.50.1.5/24"]),
            Code::InvalidArgument,
            bits,
        )
        .await;
        let two = "multiple overlapping subnet configuration is not supported";
        let both = spec("n", &["10.60.0.0/16", "10.60.1.0/24"]);
        refused(&bench, both, Code::InvalidArgument, two).await;
        let name = "network with name taken already exists";
        refused(&bench, spec("taken", &[]), Code::AlreadyExists, name).await;

        let before = bench.objects();
        let overlap = make(&bench, spec("n", &["10.50.0.128/25"]))
            .await
            .unwrap_err();
        assert_eq!(overlap.code(), Code::FailedPrecondition);
        assert!(
            overlap.message().contains("taken") || overlap.message().contains(&taken.id),
            "{}",
            overlap.message()
        );
        assert_eq!(bench.objects(), before);
    }

    #[tokio::test]
    async fn a_network_in_use_is_not_removed_and_its_user_is_named() {
        let bench = Bench::new();
        let network = make(&bench, spec("net", &[])).await.unwrap();
        bench.write([create(testing::service("s1", "web", &[&network.id]))]);
        let remove = || {
            bench.control.remove_network(RemoveNetworkRequest {
                r#ref: "net".to_owned(),
            })
        };
        let before = bench.objects();
        let refused = remove().await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert_eq!(refused.message(), "network net is in use by service web");
        assert_eq!(bench.objects(), before);
        bench.write([testing::remove(ObjectKind::Service, "s1")]);
        assert_eq!(remove().await.unwrap().id, network.id);
        let missing = remove().await.unwrap_err();
        assert_eq!(
            (missing.code(), missing.message()),
            (Code::NotFound, "network net not found")
        );
    }

    #[tokio::test]
    async fn the_detail_names_services_tasks_and_peers() {
        let bench = Bench::new();
        let network = make(&bench, spec("net", &["10.50.1.0/24"])).await.unwrap();
        bench.write([
            create(testing::node("w1", "10.9.0.2")),
            create(testing::service("s1", "web", &[&network.id])),
        ]);
        let task = Task {
            node_id: "w1".to_owned(),
            service_annotations: Some(
                Annotations {
                    name: "web".to_owned(),
                    ..Default::default()
                }
                .into(),
            ),
            ..testing::task("t1", "s1", &[&network.id])
        };
        bench.write([create(task)]);
        let detail = bench
            .control
            .get_network(GetNetworkRequest {
                r#ref: "net".to_owned(),
                verbose: true,
            })
            .await
            .unwrap();
        let service = &detail.services[0];
        assert_eq!(service.name, "web");
        assert!(service.vip.starts_with("10.50.1.") && !service.vip.contains('/'));
        let task = &service.tasks[0];
        assert_eq!(
            (task.name.as_str(), task.vtep.as_str()),
            ("web.1.t1", "10.9.0.2")
        );
        assert!(task.addr.starts_with("10.50.1.") && !task.addr.contains('/'));
        assert_eq!(detail.peers.len(), 1);
        assert_eq!(
            (
                detail.peers[0].hostname.as_str(),
                detail.peers[0].addr.as_str()
            ),
            ("w1", "10.9.0.2")
        );
    }

    #[tokio::test]
    async fn lists_are_sorted_by_name_and_names_match_anywhere() {
        let bench = Bench::new();
        for name in ["b-net", "a-net", "other"] {
            make(&bench, spec(name, &[])).await.unwrap();
        }
        let list = async |request| -> Vec<String> {
            let networks = bench.control.list_networks(request).await.unwrap().networks;
            networks.iter().map(|n| name(n).to_owned()).collect()
        };
        assert_eq!(
            list(ListNetworksRequest::default()).await,
            ["a-net", "b-net", "other"]
        );
        let named = ListNetworksRequest {
            filters: Some(Filters {
                names: vec!["-net".to_owned()],
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(list(named).await, ["a-net", "b-net"]);
        assert_eq!(bench.consensus.store().state().networks().count(), 3);
    }
}
