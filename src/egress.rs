//! Which addresses webhooks may connect to: the internet, what the operator allows besides, and never
//! the machine's own surroundings. Pure: who asks has resolved the name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use url::Host;

/// Whom webhooks may reach besides the internet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub networks: AllowedNetworks,
    pub hosts: AllowedHosts,
}

impl Policy {
    /// Whether a connection to `host` may go to `address`. An address that carries others within it
    /// (a tunnel's, a translator's) is admitted when each of them is.
    pub fn admits(&self, host: &str, address: IpAddr) -> bool {
        parts(address).into_iter().all(|part| match reach_alone(part) {
            Reach::Public => true,
            Reach::Private => self.networks.contain(part) || self.hosts.contain(host),
            Reach::Forbidden => false,
        })
    }
}

/// Where an address leads; the worse, the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// To the internet.
    Public,
    /// Inside, or nowhere: refused unless allowed.
    Private,
    /// To a cloud's metadata and credentials, the own link, or a group: refused whatever is allowed.
    Forbidden,
}

/// The worst of an address and of those that it carries.
pub fn reach(address: IpAddr) -> Reach {
    let parts = parts(address);
    parts.into_iter().map(reach_alone).max().expect("the address itself is one of its parts")
}

const FORBIDDEN: &[IpNet] = &[
    v4([0, 0, 0, 0], 8),          // Linux connects 0.0.0.0 to itself
    v4([100, 100, 100, 200], 32), // metadata: Alibaba Cloud
    v4([168, 63, 129, 16], 32),   // Azure's host
    v4([169, 254, 0, 0], 16),     // link-local; metadata and credentials of most clouds
    v4([192, 0, 0, 192], 32),     // metadata: Oracle Cloud
    v4([224, 0, 0, 0], 4),        // multicast
    v4([255, 255, 255, 255], 32), // broadcast
    v6([0, 0, 0, 0, 0, 0, 0, 0], 128),
    v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23], 128), // credentials: EKS
    v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128), // metadata: AWS
    v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128), // metadata: Google Cloud
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),         // link-local
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),          // multicast
];

const PRIVATE: &[IpNet] = &[
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10), // carriers' NAT, and pods of some clusters
    v4([127, 0, 0, 0], 8),   // loopback
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),   // protocol assignments
    v4([192, 0, 2, 0], 24),   // documentation
    v4([192, 88, 99, 0], 24), // 6to4 relays
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),                   // benchmarks
    v4([198, 51, 100, 0], 24),                 // documentation
    v4([203, 0, 113, 0], 24),                  // documentation
    v4([240, 0, 0, 0], 4),                     // reserved
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23),     // protocol assignments: Teredo, benchmarks, ORCHID
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), // documentation
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),     // 6to4
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20),     // documentation
];

/// Of IPv6 only this is handed out, and NAT64 translates to public IPv4. The rest is loopback, unique
/// local, site-local, segment routing (5f00::/16) and the like, or nobody's.
const PUBLIC_V6: &[Ipv6Net] =
    &[Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3), NAT64];

const COMPATIBLE: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 96);
const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);
const TRANSLATED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96);
const NAT64: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);
const NAT64_LOCAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0), 48);
const SIX_TO_FOUR: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16);
const TEREDO: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32);

const fn v4(address: [u8; 4], prefix: u8) -> IpNet {
    let [a, b, c, d] = address;
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix))
}

const fn v6(address: [u16; 8], prefix: u8) -> IpNet {
    let [a, b, c, d, e, f, g, h] = address;
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), prefix))
}

/// Of an address in its canonical form, whatever it carries.
fn reach_alone(address: IpAddr) -> Reach {
    let among = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&address));
    if among(FORBIDDEN) {
        return Reach::Forbidden;
    }
    let handed_out = match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(v6) => PUBLIC_V6.iter().any(|network| network.contains(&v6)),
    };
    if handed_out && !among(PRIVATE) { Reach::Public } else { Reach::Private }
}

/// The canonical form of an address, and every IPv4 address within it that something on the way may
/// send the packets to.
fn parts(address: IpAddr) -> Vec<IpAddr> {
    let canonical = address.to_canonical();
    let within = match canonical {
        IpAddr::V4(_) => Vec::new(),
        IpAddr::V6(v6) => embedded(v6),
    };
    [canonical].into_iter().chain(within.into_iter().map(IpAddr::V4)).collect()
}

fn embedded(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let octets = address.octets();
    let pick = |at: [usize; 4]| Ipv4Addr::from(at.map(|n| octets[n]));
    let is_in = |network: Ipv6Net| network.contains(&address);
    let last = pick([12, 13, 14, 15]);
    if address.is_unspecified() || address.is_loopback() {
        return Vec::new();
    }
    if is_in(NAT64_LOCAL) {
        // The network chooses the layout (RFC 6052), and only it knows which. Bits that a layout leaves
        // empty would read as 0.0.0.0/8 in another.
        let layouts = [[6, 7, 9, 10], [7, 9, 10, 11], [9, 10, 11, 12], [12, 13, 14, 15]];
        return layouts.map(pick).into_iter().filter(|v4| v4.octets()[0] != 0).collect();
    }
    if is_in(SIX_TO_FOUR) {
        return vec![pick([2, 3, 4, 5])];
    }
    if is_in(TEREDO) {
        // The server, and the client with its bits turned over.
        return vec![pick([4, 5, 6, 7]), Ipv4Addr::from(!u32::from(last))];
    }
    let is_isatap = octets[8] & !0x02 == 0 && octets[9..12] == [0, 0x5e, 0xfe];
    if is_isatap || [COMPATIBLE, TRANSLATED, NAT64].into_iter().any(is_in) {
        return vec![last];
    }
    Vec::new()
}

/// Stands for an empty list: an empty value counts as not given.
pub const NONE: &str = "none";
/// More entries than anybody has written by hand.
pub const ENTRIES_MAX: usize = 64;
/// How much of a bad entry is repeated to whoever wrote it.
const SHOWN_CHARS: usize = 64;

/// Networks of private addresses that are allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedNetworks(Vec<IpNet>);

/// Names of hosts whose addresses may be private.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedHosts(Vec<AllowedHost>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum AllowedHost {
    Exactly(String),
    /// All names below this one.
    Below(String),
}

/// Why a list of networks or hosts is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadList {
    #[error("more than {ENTRIES_MAX} entries")]
    TooLong,
    #[error("{0:?} is no network")]
    NoNetwork(String),
    #[error("{0} has bits set behind its prefix: {1} is the network")]
    BitsBehindPrefix(String, IpNet),
    #[error("{0} reaches {1}, which is always refused")]
    Forbidden(String, IpNet),
    #[error("{0} holds IPv4 addresses: write them as IPv4")]
    Mapped(String),
    #[error("{0:?} is no host name")]
    NoHostName(String),
    #[error("{0} is an address: networks have a setting of their own")]
    Address(String),
}

impl AllowedNetworks {
    pub fn parse(text: &str) -> Result<Self, BadList> {
        entries(text)?.map(network).collect::<Result<_, _>>().map(Self)
    }

    fn contain(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

impl AllowedHosts {
    pub fn parse(text: &str) -> Result<Self, BadList> {
        entries(text)?.map(host).collect::<Result<_, _>>().map(Self)
    }

    fn contain(&self, host: &str) -> bool {
        let host = without_root(host).to_ascii_lowercase();
        self.0.iter().any(|allowed| match allowed {
            AllowedHost::Exactly(name) => host == *name,
            AllowedHost::Below(name) => host
                .strip_suffix(name.as_str())
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|label| !label.is_empty()),
        })
    }
}

fn entries(text: &str) -> Result<impl Iterator<Item = &str>, BadList> {
    let listed = if text.trim() == NONE { "" } else { text };
    if listed.split(',').count() > ENTRIES_MAX {
        return Err(BadList::TooLong);
    }
    let skipped = usize::from(listed.is_empty());
    Ok(listed.split(',').skip(skipped).map(str::trim))
}

fn network(entry: &str) -> Result<IpNet, BadList> {
    let shown = || shown(entry);
    let alone = entry.parse::<IpAddr>().map(IpNet::from);
    let network = alone.or_else(|_| entry.parse()).map_err(|_| BadList::NoNetwork(shown()))?;
    if network.trunc() != network {
        return Err(BadList::BitsBehindPrefix(shown(), network.trunc()));
    }
    if let IpNet::V6(v6) = network
        && (MAPPED.contains(&v6) || v6.contains(&MAPPED))
    {
        return Err(BadList::Mapped(shown()));
    }
    let is_single = network.prefix_len() == network.max_prefix_len();
    if is_single && reach(network.addr()) == Reach::Forbidden {
        return Err(BadList::Forbidden(shown(), network));
    }
    // A single address within a larger network stays refused there, and the rest of it is of use.
    let reached = FORBIDDEN.iter().find(|forbidden| {
        let is_range = forbidden.prefix_len() < forbidden.max_prefix_len();
        forbidden.contains(&network) || (is_range && network.contains(*forbidden))
    });
    match reached {
        Some(forbidden) => Err(BadList::Forbidden(shown(), *forbidden)),
        None => Ok(network),
    }
}

fn host(entry: &str) -> Result<AllowedHost, BadList> {
    let (name, is_below) = match entry.strip_prefix("*.") {
        Some(rest) => (rest, true),
        None => (entry, false),
    };
    match Host::parse(without_root(name)) {
        Ok(Host::Domain(name)) if !name.contains('*') && !name.starts_with('.') => {
            Ok(if is_below { AllowedHost::Below(name) } else { AllowedHost::Exactly(name) })
        }
        Ok(Host::Domain(_)) | Err(_) => Err(BadList::NoHostName(shown(entry))),
        Ok(Host::Ipv4(_) | Host::Ipv6(_)) => Err(BadList::Address(shown(entry))),
    }
}

/// A name with the root's dot behind it is the same name.
fn without_root(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

fn shown(entry: &str) -> String {
    entry.chars().filter(|c| !c.is_control()).take(SHOWN_CHARS).collect()
}
