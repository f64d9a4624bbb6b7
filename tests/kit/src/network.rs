//! A network on this machine whose places can be cut off from each other: network namespaces, each with a cable to one bridge.
//!
//! The servers and the test itself are at the bridge's own addresses. A cut is made in a place's own namespace, by its packet
//! filter or its cable, and touches nothing else on the machine. Needs root, `ip` and `nft`.
//!
//! Invariant: names carry the process id and a number; everything goes when the [`Network`] is dropped, or by the guard of
//! [`crate::scratch`] if it can't be.

use std::{
    fmt,
    io::Write as _,
    net::Ipv4Addr,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::scratch::{Laid, watch_network};

/// Networks are tried in so many subnets of 10.0.0.0/8 before it is given up.
const SUBNETS_MAX: u32 = 16;
/// Addresses of the bridge, for servers.
const SERVERS: std::ops::RangeInclusive<u8> = 1..=4;
const FIRST_PLACE: u8 = 10;
const PLACES_MAX: u8 = 200;
const WITHOUT_NETWORK: &str = "this test lays a network of its own: it needs root, and the packages iproute2 and nftables \
                               (scripts/setup-test.sh brings them)";

static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// A bridge, and what hangs on it.
pub struct Network {
    bridge: String,
    /// Its first two numbers after the 10.
    subnet: [u8; 2],
    number: u32,
    places: AtomicU32,
}

/// What does not come through any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Everything: the cable is out. Connections hang.
    Cable,
    /// Packets in both directions vanish.
    Both,
    /// What comes in vanishes.
    In,
    /// What goes out vanishes.
    Out,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cable => "cable out",
            Self::Both => "packets lost",
            Self::In => "packets lost on the way in",
            Self::Out => "packets lost on the way out",
        })
    }
}

impl Network {
    /// Lays a network without places.
    ///
    /// # Errors
    /// When this machine does not allow it.
    pub fn lay() -> Result<Self> {
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let bridge = format!("fmb{pid}-{number}");
        watch_network(&Laid::Link(&bridge))?;
        ip(&["link", "add", &bridge, "type", "bridge"]).context(WITHOUT_NETWORK)?;
        // From here on dropping it takes it down.
        let mut network = Self { bridge, subnet: [0; 2], number, places: AtomicU32::new(0) };
        network.subnet = network.free_subnet(pid)?;
        for server in SERVERS {
            let address = format!("{}/24", network.address(server));
            ip(&["address", "add", &address, "dev", &network.bridge])?;
        }
        ip(&["link", "set", &network.bridge, "up"])?;
        Ok(network)
    }

    /// One that no route of this machine leads to yet.
    fn free_subnet(&self, pid: u32) -> Result<[u8; 2]> {
        for n in 0..SUBNETS_MAX {
            let [_, _, second, third] = (pid * 31 + self.number * 7 + n).to_be_bytes();
            let subnet = [128 | second >> 1, third];
            let routes = ip(&["-4", "route", "show", "root", &format!("10.{}.{}.0/24", subnet[0], subnet[1])])?;
            if routes.stdout.is_empty() {
                return Ok(subnet);
            }
        }
        bail!("no subnet of 10.128.0.0/9 is free")
    }

    fn address(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.subnet[0], self.subnet[1], host)
    }

    /// The address for a server, from 0 to 3, in this process's own namespace.
    ///
    /// # Panics
    /// With another number.
    #[must_use]
    pub fn server(&self, number: u8) -> Ipv4Addr {
        assert!(SERVERS.contains(&(number + 1)), "there are {} servers' addresses", SERVERS.count());
        self.address(number + 1)
    }

    /// Another place on the network.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn place(&self) -> Result<Place> {
        let number = u8::try_from(self.places.fetch_add(1, Ordering::Relaxed)).ok().filter(|n| *n < PLACES_MAX);
        let number = number.with_context(|| format!("a network has at most {PLACES_MAX} places"))?;
        let (pid, of) = (std::process::id(), self.number);
        let namespace = format!("floodmark-{pid}-{of}-{number}");
        let cable = format!("fmv{pid}-{of}{number:x}");
        watch_network(&Laid::Namespace(&namespace))?;
        watch_network(&Laid::Link(&cable))?;
        ip(&["netns", "add", &namespace])?;
        let place = Place { address: self.address(FIRST_PLACE + number), namespace, cable };
        let inside = ["peer", "name", "eth0", "netns", &place.namespace];
        ip(&[&["link", "add", &place.cable, "type", "veth"], &inside[..]].concat())?;
        ip(&["link", "set", &place.cable, "master", &self.bridge, "up"])?;
        place.ip(&["address", "add", &format!("{}/24", place.address), "dev", "eth0"])?;
        for device in ["lo", "eth0"] {
            place.ip(&["link", "set", device, "up"])?;
        }
        Ok(place)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.bridge]);
    }
}

/// A place on a network. Ends, with every process in it, when dropped.
pub struct Place {
    namespace: String,
    /// The end of its cable at the bridge.
    cable: String,
    address: Ipv4Addr,
}

impl Place {
    /// Its address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The words before a command that let it run here. The process keeps its id.
    #[must_use]
    pub fn prefix(&self) -> Vec<String> {
        ["ip", "netns", "exec", &self.namespace].map(str::to_owned).to_vec()
    }

    /// Cuts this place off from these addresses, or from all if there are none. Earlier cuts stay.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut(&self, cut: Cut, from: &[Ipv4Addr]) -> Result<()> {
        let (inwards, outwards) = match cut {
            Cut::Cable => return ip(&["link", "set", &self.cable, "down"]).map(drop),
            Cut::Both => (true, true),
            Cut::In => (true, false),
            Cut::Out => (false, true),
        };
        let mut rules = String::from(
            "table ip cuts {\n  chain in { type filter hook input priority 0; }\n  chain out { type filter hook output priority 0; }\n}\n",
        );
        for (chain, word, device) in [("in", "saddr", "iif"), ("out", "daddr", "oif")]
            .iter()
            .zip([inwards, outwards])
            .filter(|c| c.1)
            .map(|c| *c.0)
        {
            if from.is_empty() {
                rules += &format!("add rule ip cuts {chain} {device} != lo drop\n");
            }
            for address in from {
                rules += &format!("add rule ip cuts {chain} ip {word} {address} drop\n");
            }
        }
        self.filter(&rules)
    }

    /// Takes back all cuts.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn heal(&self) -> Result<()> {
        self.filter("flush ruleset\n")?;
        ip(&["link", "set", &self.cable, "up"]).map(drop)
    }

    fn filter(&self, rules: &str) -> Result<()> {
        let prefix = self.prefix();
        let mut nft = Command::new(&prefix[0])
            .args(&prefix[1..])
            .args(["nft", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start nft")?;
        nft.stdin.take().context("nft has no input")?.write_all(rules.as_bytes())?;
        let output = nft.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft in {}: {said}; {WITHOUT_NETWORK}", self.namespace);
        Ok(())
    }

    fn ip(&self, words: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.namespace], words].concat()).map(drop)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let pids = ip(&["netns", "pids", &self.namespace]).map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        for pid in pids.unwrap_or_default().lines().filter_map(|l| l.trim().parse().ok()) {
            // One that has ended meanwhile is gone.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = ip(&["netns", "del", &self.namespace]);
        let _ = ip(&["link", "del", &self.cable]);
    }
}

fn ip(words: &[&str]) -> Result<Output> {
    let output = Command::new("ip").args(words).stdin(Stdio::null()).output().context("start ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", words.join(" "), said.trim());
    Ok(output)
}
