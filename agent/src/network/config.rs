//! What the real dataplane is told when it is made.

use std::path::PathBuf;

use ipnet::Ipv4Net;

/// Settings of [`super::kernel::KernelDataplane`].
#[derive(Clone, Debug)]
pub struct DataplaneConfig {
    /// Namespace files and the name server's socket live below it; not kept across a reboot.
    pub run_dir: PathBuf,
    /// Subnets for the gateway bridge, in order of preference: the first that no route of the host overlaps.
    pub gateway_pools: Vec<Ipv4Net>,
    /// This binary (or one like it), run as `names_exe names …` for the name server:
    /// it must hand those arguments to [`super::names::names_main`].
    pub names_exe: PathBuf,
    /// The host's name servers.
    pub resolv_conf: PathBuf,
    /// Namespace file that counts as the host's; `None` = the one this process runs in.
    pub host_netns: Option<PathBuf>,
}

impl DataplaneConfig {
    /// The defaults of a node: 172.18.0.0/16 and its neighbours for the gateway bridge.
    #[must_use]
    pub fn new(run_dir: PathBuf, names_exe: PathBuf) -> Self {
        let mut gateway_pools: Vec<Ipv4Net> = (18..32)
            .map(|n| Ipv4Net::new_assert([172, n, 0, 0].into(), 16))
            .collect();
        gateway_pools
            .extend((0..16).map(|n| Ipv4Net::new_assert([192, 168, n * 16, 0].into(), 20)));
        Self {
            run_dir,
            gateway_pools,
            names_exe,
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            host_netns: None,
        }
    }
}
