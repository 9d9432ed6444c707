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
    // A single address within a larger network stays refused there, and the rest of it is of use.
    let reached = FORBIDDEN.iter().find(|forbidden| {
        let is_range = forbidden.prefix_len() < forbidden.max_prefix_len();
        forbidden.contains(&network) || (is_range && network.contains(*forbidden))
    });
    let is_single = network.prefix_len() == network.max_prefix_len();
    match reached {
        Some(forbidden) => Err(BadList::Forbidden(shown(), *forbidden)),
        // One that carries such an address within it.
        None if is_single && reach(network.addr()) == Reach::Forbidden => {
            Err(BadList::Forbidden(shown(), network))
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap_or_else(|_| panic!("{text}"))
    }

    fn allowing(networks: &str, hosts: &str) -> Policy {
        Policy {
            networks: AllowedNetworks::parse(networks).unwrap(),
            hosts: AllowedHosts::parse(hosts).unwrap(),
        }
    }

    /// First and last address of what is not public in IPv4, from the registry of special addresses.
    const V4_RANGES: &[(&str, &str, Reach)] = &[
        ("0.0.0.0", "0.255.255.255", Reach::Forbidden),
        ("10.0.0.0", "10.255.255.255", Reach::Private),
        ("100.64.0.0", "100.100.100.199", Reach::Private),
        ("100.100.100.200", "100.100.100.200", Reach::Forbidden),
        ("100.100.100.201", "100.127.255.255", Reach::Private),
        ("127.0.0.0", "127.255.255.255", Reach::Private),
        ("168.63.129.16", "168.63.129.16", Reach::Forbidden),
        ("169.254.0.0", "169.254.255.255", Reach::Forbidden),
        ("172.16.0.0", "172.31.255.255", Reach::Private),
        ("192.0.0.0", "192.0.0.191", Reach::Private),
        ("192.0.0.192", "192.0.0.192", Reach::Forbidden),
        ("192.0.0.193", "192.0.0.255", Reach::Private),
        ("192.0.2.0", "192.0.2.255", Reach::Private),
        ("192.88.99.0", "192.88.99.255", Reach::Private),
        ("192.168.0.0", "192.168.255.255", Reach::Private),
        ("198.18.0.0", "198.19.255.255", Reach::Private),
        ("198.51.100.0", "198.51.100.255", Reach::Private),
        ("203.0.113.0", "203.0.113.255", Reach::Private),
        ("224.0.0.0", "239.255.255.255", Reach::Forbidden),
        ("240.0.0.0", "255.255.255.254", Reach::Private),
        ("255.255.255.255", "255.255.255.255", Reach::Forbidden),
    ];

    fn by_ranges(address: Ipv4Addr) -> Reach {
        let within = V4_RANGES.iter().find(|(first, last, _)| {
            let bound = |text: &str| text.parse::<Ipv4Addr>().unwrap();
            (bound(first)..=bound(last)).contains(&address)
        });
        within.map_or(Reach::Public, |(_, _, reach)| *reach)
    }

    #[test]
    fn ipv4_ranges_end_where_the_registry_says() {
        for (first, last, _) in V4_RANGES {
            for edge in [first, last] {
                let edge = u32::from(edge.parse::<Ipv4Addr>().unwrap());
                for near in [edge.wrapping_sub(1), edge, edge.wrapping_add(1)] {
                    let near = Ipv4Addr::from(near);
                    assert_eq!(reach(near.into()), by_ranges(near), "{near}");
                }
            }
        }
    }

    #[test]
    fn ipv6_is_public_where_it_is_handed_out_and_nowhere_else() {
        for (text, expected) in [
            ("2606:4700:4700::1111", Reach::Public),
            ("2001:4860:4860::8888", Reach::Public),
            ("2400:cb00::1", Reach::Public),
            ("3ffe::1", Reach::Public),
            ("::1", Reach::Private),
            ("100::1", Reach::Private),
            ("2001:1::1", Reach::Private),
            ("2001:2::1", Reach::Private),
            ("2001:20::1", Reach::Private),
            ("2001:db8::1", Reach::Private),
            ("3fff::1", Reach::Private),
            ("3fff:fff:ffff::1", Reach::Private),
            ("3fff:1000::1", Reach::Public),
            ("4000::1", Reach::Private),
            ("5f00::1", Reach::Private),
            ("1fff::1", Reach::Private),
            ("64:ff9a::1", Reach::Private),
            ("64:ff9b:2::1", Reach::Private),
            ("fc00::1", Reach::Private),
            ("fd12:3456::1", Reach::Private),
            ("fec0::1", Reach::Private),
            ("::", Reach::Forbidden),
            ("fd00:ec2::254", Reach::Forbidden),
            ("fd00:ec2::23", Reach::Forbidden),
            ("fd00:ec2::255", Reach::Private),
            ("fd20:ce::254", Reach::Forbidden),
            ("fe80::1", Reach::Forbidden),
            ("febf::1", Reach::Forbidden),
            ("ff02::1", Reach::Forbidden),
            ("ffff::1", Reach::Forbidden),
        ] {
            assert_eq!(reach(ip(text)), expected, "{text}");
        }
    }

    /// Every way to put an IPv4 address into an IPv6 one.
    fn wrapped(v4: Ipv4Addr) -> Vec<(&'static str, Ipv6Addr)> {
        let [a, b, c, d] = v4.octets();
        let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let (mid, [_, last]) = (u16::from_be_bytes([b, c]), low.to_be_bytes());
        let v6 = |s: [u16; 8]| Ipv6Addr::from(s);
        vec![
            ("mapped", v6([0, 0, 0, 0, 0, 0xffff, high, low])),
            ("compatible", v6([0, 0, 0, 0, 0, 0, high, low])),
            ("translated", v6([0, 0, 0, 0, 0xffff, 0, high, low])),
            ("NAT64", v6([0x64, 0xff9b, 0, 0, 0, 0, high, low])),
            ("local NAT64 /96", v6([0x64, 0xff9b, 1, 0, 0, 0, high, low])),
            ("local NAT64 /64", v6([0x64, 0xff9b, 1, 7, a.into(), mid, u16::from(last) << 8, 0])),
            ("local NAT64 /56", v6([0x64, 0xff9b, 1, 0x700 | u16::from(a), b.into(), low, 0, 0])),
            ("local NAT64 /48", v6([0x64, 0xff9b, 1, high, c.into(), u16::from(last) << 8, 0, 0])),
            ("6to4", v6([0x2002, high, low, 1, 0, 0, 0, 1])),
            ("Teredo client", v6([0x2001, 0, 0x0808, 0x0808, 0, 0, !high, !low])),
            ("Teredo server", v6([0x2001, 0, high, low, 0, 0, 0xf7f7, 0xf7f7])),
            ("ISATAP", v6([0x2606, 1, 2, 3, 0, 0x5efe, high, low])),
            ("ISATAP, global", v6([0x2606, 1, 2, 3, 0x200, 0x5efe, high, low])),
        ]
    }

    #[test]
    fn what_is_always_refused_is_so_in_every_wrapping() {
        for (first, last, expected) in V4_RANGES {
            for v4 in [first, last].map(|text| text.parse::<Ipv4Addr>().unwrap()) {
                // `::` and `::1` are no wrapped 0.0.0.0 and 0.0.0.1, and 0.x is what empty bits read as.
                let shadowed = |how: &str| {
                    v4.octets()[0] == 0 && (how == "compatible" || how.starts_with("local"))
                };
                for (how, v6) in wrapped(v4).into_iter().filter(|(how, _)| !shadowed(how)) {
                    assert!(reach(v6.into()) >= *expected, "{v4} {how}: {v6}");
                }
            }
        }
    }

    fn any_network() -> impl Strategy<Value = IpNet> {
        let of = |(bits, prefix): (u32, u8)| {
            IpNet::from(Ipv4Net::new(bits.into(), prefix).unwrap()).trunc()
        };
        (any::<u32>(), 8_u8..=32).prop_map(of)
    }

    proptest! {
        #[test]
        fn any_ipv4_address_is_judged_as_the_registry_says(bits in any::<u32>()) {
            let v4 = Ipv4Addr::from(bits);
            prop_assert_eq!(reach(v4.into()), by_ranges(v4));
        }

        #[test]
        fn wrapping_never_makes_an_address_better(bits in 0x0100_0000_u32..) {
            let v4 = Ipv4Addr::from(bits);
            for (how, v6) in wrapped(v4) {
                prop_assert!(reach(v6.into()) >= by_ranges(v4), "{v4} {how}: {v6}");
            }
            prop_assert_eq!(reach(wrapped(v4)[0].1.into()), by_ranges(v4));
        }

        #[test]
        fn of_ipv6_nothing_is_public_outside_of_what_is_handed_out(bits in any::<u128>()) {
            let v6 = Ipv6Addr::from(bits);
            let handed_out = bits >> 125 == 1 || bits >> 32 == 0x64_ff9b << 64;
            prop_assert!(handed_out || reach(v6.into()) != Reach::Public, "{v6}");
        }

        #[test]
        fn an_allowed_network_opens_itself_and_nothing_else(network in any_network(), bits in any::<u32>()) {
            let Ok(networks) = AllowedNetworks::parse(&network.to_string()) else { return Ok(()) };
            let policy = Policy { networks, ..Default::default() };
            let inside = match network.network() {
                IpAddr::V4(first) => u32::from(first) | (bits & u32::MAX.checked_shr(network.prefix_len().into()).unwrap_or(0)),
                IpAddr::V6(_) => bits,
            };
            for v4 in [bits, inside].map(Ipv4Addr::from) {
                let expected = match by_ranges(v4) {
                    Reach::Public => true,
                    Reach::Private => network.contains(&IpAddr::V4(v4)),
                    Reach::Forbidden => false,
                };
                prop_assert_eq!(policy.admits("h", v4.into()), expected, "{} in {}", v4, network);
            }
        }
    }

    #[test]
    fn an_address_within_another_must_be_allowed_as_well() {
        let policy = allowing("10.1.0.0/16, fd12::/48", "none");
        for (address, admitted) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("64:ff9b::10.1.2.3", true),
            ("64:ff9b::10.2.2.3", false),
            ("2002:a01:203::1", false), // 6to4 itself is not allowed
            ("fd12::10.1.2.3", true),
            ("fd12:0:1::1", false),
            ("127.0.0.1", false),
            ("::1", false),
            ("8.8.8.8", true),
        ] {
            assert_eq!(policy.admits("h", ip(address)), admitted, "{address}");
        }
        let tunnels = allowing("10.1.0.0/16, 2002:a01::/32", "none");
        assert!(tunnels.admits("h", ip("2002:a01:203::1")));
        assert!(!allowing("2002:a01::/32", "none").admits("h", ip("2002:a01:203::1")));
    }

    #[test]
    fn an_allowed_host_may_be_private_and_never_metadata() {
        let policy = allowing("none", "reservation-api, *.svc.cluster.local, Ünïcode.example.");
        for (host, admitted) in [
            ("reservation-api", true),
            ("RESERVATION-API", true),
            ("reservation-api.", true),
            ("a.reservation-api", false),
            ("xreservation-api", false),
            ("reservation-api.evil.example", false),
            ("a.svc.cluster.local", true),
            ("a.b.svc.cluster.local.", true),
            ("svc.cluster.local", false),
            (".svc.cluster.local", false),
            ("xsvc.cluster.local", false),
            ("a.svc.cluster.local.evil.example", false),
            ("xn--ncode-cta3g.example", true),
            ("", false),
        ] {
            for private in ["10.0.0.1", "127.0.0.1", "fd12::1", "::1"] {
                assert_eq!(policy.admits(host, ip(private)), admitted, "{host} {private}");
            }
            for forbidden in ["169.254.169.254", "0.0.0.0", "::", "fd00:ec2::254", "fe80::1"] {
                assert!(!policy.admits(host, ip(forbidden)), "{host} {forbidden}");
            }
            assert!(policy.admits(host, ip("8.8.8.8")), "{host}");
        }
    }

    #[test]
    fn lists_that_open_nothing_or_too_much_are_refused() {
        for (networks, why) in [
            ("10.0.0.0/8,169.254.169.254/32", "169.254.169.254"),
            ("169.254.0.0/16", "169.254.0.0/16"),
            ("168.0.0.0/5", "169.254.0.0/16"),
            ("0.0.0.0/0", "0.0.0.0/8"),
            ("::/0", "IPv4"),
            ("fe80::/64", "fe80::/10"),
            ("100.100.100.200", "100.100.100.200/32"),
            ("fd00:ec2::254", "fd00:ec2::254/128"),
            ("64:ff9b::a9fe:a9fe", "64:ff9b::a9fe:a9fe/128"),
            ("224.0.0.251", "224.0.0.0/4"),
            ("::ffff:10.0.0.0/104", "IPv4"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("10.0.0.0/33", "no network"),
            ("10.0.0/8", "no network"),
            ("localhost", "no network"),
            ("10.0.0.0/8,", "no network"),
            ("none,10.0.0.0/8", "no network"),
        ] {
            let told = AllowedNetworks::parse(networks).unwrap_err().to_string();
            assert!(told.contains(why), "{networks}: {told}");
        }
        for networks in ["none", "100.64.0.0/10", "fd00::/8", "10.0.0.1", " ::1 , 127.0.0.0/8 "] {
            AllowedNetworks::parse(networks).unwrap_or_else(|bad| panic!("{networks}: {bad}"));
        }
        for hosts in ["*", "*.", "a b", "a:80", "http://a", "a,,b", "a/b", "*.*.a", "u@h", "."] {
            let told = AllowedHosts::parse(hosts).unwrap_err();
            assert!(matches!(told, BadList::NoHostName(_)), "{hosts}: {told}");
        }
        for hosts in ["10.0.0.1", "[::1]", "0x7f.1", "2130706433"] {
            let told = AllowedHosts::parse(hosts).unwrap_err();
            assert!(matches!(told, BadList::Address(_)), "{hosts}: {told}");
        }
        let many = vec!["a"; ENTRIES_MAX + 1].join(",");
        assert_eq!(AllowedHosts::parse(&many), Err(BadList::TooLong));
        AllowedHosts::parse(&many[2..]).unwrap();
    }
}
