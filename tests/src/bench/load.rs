//! Writers that write as fast as they are answered, and what they saw: one program for all
//! systems that are compared, so that the client is the same.
//!
//! Runs in a process of its own, on a host that is not a manager, over mutual TLS to the leader.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use futures::future::join_all;
use prost::Message;
use serde::{Deserialize, Serialize};
use swarm_identity::{Identity, KeyMaterial};
use swarm_proto::codec::LeanCodec;
use swarm_proto::v1::raft_client::RaftClient;
use swarm_proto::v1::{
    Filters, ListServicesRequest, Meta, Object, ProposeRequest, Service, StoreAction, Transaction,
    Version, object, store_action,
};
use tonic::transport::Channel;

use super::api::{Api, identity_of, relabel, service};
use super::report::Samples;

/// Connections of one load, as many clients share one.
const CONNECTIONS: usize = 4;
/// Bytes that each write carries.
pub const VALUE: usize = 256;
/// Writers at the same time, at most.
pub const WRITERS_MAX: usize = 1024;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A label of a service without replicas, by `Control.UpdateService` with its version expected.
    Api,
    /// The same as a transaction, by `Raft.Propose`.
    Propose,
    /// `Put` of a key in etcd.
    Etcd,
}

/// A load.
#[derive(Clone, Debug, Args)]
pub struct LoadArgs {
    /// What is written
    #[arg(long)]
    pub kind: Kind,
    /// host:port of the leader
    #[arg(long)]
    pub addr: String,
    /// Lab host whose certificate is used, or (for etcd) a directory with cert.pem, key.pem and ca.pem
    #[arg(long)]
    pub identity: String,
    /// How many write at the same time
    #[arg(long)]
    pub writers: usize,
    /// Seconds that are measured, after half a second that is not
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
}

/// What a load saw.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Acknowledged writes of the measured time.
    pub writes: u64,
    /// With those before.
    pub total: u64,
    /// Writes that failed or were refused.
    pub errors: u64,
    /// What the first of them said.
    pub error: Option<String>,
    /// Measured seconds.
    pub seconds: f64,
    /// Milliseconds of a write: median.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// Runs a load and prints what it saw as JSON.
///
/// # Errors
/// The other side does not answer.
pub async fn run(args: LoadArgs) -> Result<()> {
    ensure!(
        (1..=WRITERS_MAX).contains(&args.writers),
        "1 to {WRITERS_MAX} writers"
    );
    let identity = match args.kind {
        Kind::Etcd => read_identity(&args.identity)?,
        Kind::Api | Kind::Propose => identity_of(&args.identity)?,
    };
    let channels: Vec<Channel> = (0..CONNECTIONS.min(args.writers))
        .map(|_| identity.channel(&args.addr))
        .collect::<Result<_, _>>()?;
    let services = match args.kind {
        Kind::Etcd => Vec::new(),
        Kind::Api | Kind::Propose => {
            services(&mut Api::over(channels[0].clone()), args.writers).await?
        }
    };
    let writers: Vec<Writer> = (0..args.writers)
        .map(|number| Writer {
            kind: args.kind,
            number,
            channel: channels[number % channels.len()].clone(),
            service: services.get(number).cloned().unwrap_or_default(),
            count: 0,
        })
        .collect();
    println!(
        "{}",
        serde_json::to_string(&measure(writers, args.seconds).await)?
    );
    Ok(())
}

async fn measure(writers: Vec<Writer>, seconds: f64) -> Seen {
    let measuring = Arc::new(AtomicBool::new(false));
    let over = Arc::new(AtomicBool::new(false));
    let (errors, total) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let tasks: Vec<_> = writers
        .into_iter()
        .map(|mut writer| {
            let (measuring, over) = (measuring.clone(), over.clone());
            let (errors, total) = (errors.clone(), total.clone());
            tokio::spawn(async move {
                let mut times: Vec<f64> = Vec::new();
                let mut said = None;
                while !over.load(Ordering::Relaxed) {
                    let counts = measuring.load(Ordering::Relaxed);
                    let start = Instant::now();
                    match writer.write().await {
                        Ok(()) => {
                            total.fetch_add(1, Ordering::Relaxed);
                            if counts {
                                times.push(start.elapsed().as_secs_f64() * 1e3);
                            }
                        }
                        Err(error) => {
                            errors.fetch_add(1, Ordering::Relaxed);
                            said.get_or_insert(format!("{error:#}"));
                        }
                    }
                }
                (times, said)
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let start = Instant::now();
    measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    over.store(true, Ordering::Relaxed);
    let seconds = start.elapsed().as_secs_f64();
    let mut all = Samples::default();
    let mut error = None;
    for (times, said) in join_all(tasks).await.into_iter().flatten() {
        times.into_iter().for_each(|time| all.push(time));
        error = error.or(said);
    }
    Seen {
        writes: all.len() as u64,
        total: total.load(Ordering::Relaxed),
        errors: errors.load(Ordering::Relaxed),
        error,
        seconds,
        p50: all.p50(),
        p99: all.quantile(0.99),
        max: all.max(),
    }
}

struct Writer {
    kind: Kind,
    number: usize,
    channel: Channel,
    service: Service,
    count: u64,
}

impl Writer {
    async fn write(&mut self) -> Result<()> {
        self.count += 1;
        let value = format!("{:0VALUE$}", self.count);
        match self.kind {
            Kind::Api => {
                relabel(&mut self.service, value)?;
                self.service = Api::over(self.channel.clone())
                    .update(&self.service)
                    .await?;
            }
            Kind::Propose => {
                relabel(&mut self.service, value)?;
                // Apply keeps the one before by itself.
                self.service.previous_spec = None;
                let object = object::Object::Service(self.service.clone());
                let action = store_action::Action::Update(Object {
                    object: Some(object),
                });
                let request = ProposeRequest {
                    transaction: Some(Transaction {
                        actions: vec![StoreAction {
                            action: Some(action),
                        }],
                        proposed_at: Some(std::time::SystemTime::now().into()),
                        ..Transaction::default()
                    }),
                    leader_term: 0,
                };
                let mut client = RaftClient::new(self.channel.clone());
                let answer = client.propose(request).await?.into_inner();
                if let Some(rejection) = answer.rejection {
                    bail!(rejection.message);
                }
                self.service.meta.get_or_insert_with(Meta::default).version = Some(Version {
                    index: answer.index,
                });
            }
            Kind::Etcd => {
                let request = PutRequest {
                    key: format!("bench/{:04}", self.number).into_bytes(),
                    value: value.into_bytes(),
                };
                etcd_call::<_, PutResponse>(&self.channel, "/etcdserverpb.KV/Put", request).await?;
            }
        }
        Ok(())
    }
}

/// As many services without replicas as there are writers; those that are missing are made.
async fn services(api: &mut Api, count: usize) -> Result<Vec<Service>> {
    let request = ListServicesRequest {
        filters: Some(Filters {
            names: vec!["bench-".to_owned()],
            ..Filters::default()
        }),
        ..ListServicesRequest::default()
    };
    let mut services = api
        .control()
        .list_services(request)
        .await?
        .into_inner()
        .services;
    let known = services.len();
    for chunk in (known..count).collect::<Vec<_>>().chunks(64) {
        let made = chunk.iter().map(|number| {
            let mut api = api.clone();
            let spec = service(
                &format!("bench-{number:04}"),
                0,
                "registry.invalid/none",
                &[],
            );
            async move { api.create(spec).await }
        });
        for made in join_all(made).await {
            services.push(made?);
        }
    }
    services.truncate(count);
    Ok(services)
}

/// Certificate, key and root of a directory.
fn read_identity(dir: &str) -> Result<Arc<Identity>> {
    let read = |name: &str| {
        std::fs::read_to_string(format!("{dir}/{name}")).with_context(|| format!("{dir}/{name}"))
    };
    Ok(Identity::new(KeyMaterial {
        chain_pem: read("cert.pem")?,
        key_pem: read("key.pem")?.into(),
        root_pem: read("ca.pem")?,
    })?)
}

// etcd's API, the part that is used: etcdserverpb of etcd 3.4, by its field numbers.

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes, tag = "1")]
    key: Vec<u8>,
    #[prost(bytes, tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct PutResponse {}

/// Asks a member of etcd who leads.
#[derive(Clone, PartialEq, Message)]
struct StatusRequest {}

/// Its answer.
#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

/// Whether the member of etcd at `addr` leads.
///
/// # Errors
/// It does not answer.
pub async fn etcd_leads(addr: &str, identity: &str) -> Result<bool> {
    let channel = read_identity(identity)?.channel(addr)?;
    let path = "/etcdserverpb.Maintenance/Status";
    let asked = etcd_call::<_, StatusResponse>(&channel, path, StatusRequest {});
    let answer = tokio::time::timeout(Duration::from_secs(2), asked).await??;
    let own = answer.header.unwrap_or_default().member_id;
    Ok(own != 0 && own == answer.leader)
}

async fn etcd_call<Q, A>(channel: &Channel, path: &'static str, request: Q) -> Result<A>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await?;
    let codec: LeanCodec<Q, A> = LeanCodec::default();
    let path = http::uri::PathAndQuery::from_static(path);
    let answer = client
        .unary(tonic::Request::new(request), path, codec)
        .await?;
    Ok(answer.into_inner())
}
