//! Which addresses may be connected to.
//!
//! Decision: what IANA's registries of special-purpose addresses do not list as globally reachable is refused, and so is
//! every IPv6 form that carries an IPv4 address inside (mapped, compatible, translated, 6to4, Teredo, ISATAP), whatever
//! that address is: a gateway would deliver to it. Of IPv6 only `2000::/3` is in use as public space; the
//! rest is refused as a whole.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// How far an address reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Anyone's.
    Public,
    /// This machine's or a private network's.
    Inside,
    /// Nothing to fetch media from, ever.
    Never,
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> Ipv4Addr {
    Ipv4Addr::new(a, b, c, d)
}

const INSIDE_V4: [(Ipv4Addr, u32); 5] = [
    (v4(127, 0, 0, 0), 8),
    (v4(10, 0, 0, 0), 8),
    (v4(172, 16, 0, 0), 12),
    (v4(192, 168, 0, 0), 16),
    // Between a provider and its customers.
    (v4(100, 64, 0, 0), 10),
];

const NEVER_V4: [(Ipv4Addr, u32); 11] = [
    // "This" network; 0.0.0.0 reaches this machine.
    (v4(0, 0, 0, 0), 8),
    // Link-local: where clouds hand out credentials.
    (v4(169, 254, 0, 0), 16),
    // Protocol assignments, among them another cloud's metadata.
    (v4(192, 0, 0, 0), 24),
    // Documentation.
    (v4(192, 0, 2, 0), 24),
    (v4(198, 51, 100, 0), 24),
    (v4(203, 0, 113, 0), 24),
    // Relays of 6to4.
    (v4(192, 88, 99, 0), 24),
    // Benchmarks.
    (v4(198, 18, 0, 0), 15),
    // A cloud's own services behind an address of public form.
    (v4(168, 63, 129, 16), 32),
    // Multicast.
    (v4(224, 0, 0, 0), 4),
    // Reserved, and broadcast.
    (v4(240, 0, 0, 0), 4),
];

const fn v6(a: u16, b: u16, c: u16) -> Ipv6Addr {
    Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0)
}

const INSIDE_V6: [(Ipv6Addr, u32); 2] = [(Ipv6Addr::LOCALHOST, 128), (v6(0xfc00, 0, 0), 7)];

const PUBLIC_V6: (Ipv6Addr, u32) = (v6(0x2000, 0, 0), 3);

const NEVER_V6: [(Ipv6Addr, u32); 4] = [
    // Protocol assignments: Teredo, benchmarks, ORCHID.
    (v6(0x2001, 0, 0), 23),
    // Documentation.
    (v6(0x2001, 0xdb8, 0), 32),
    (v6(0x3fff, 0, 0), 20),
    // 6to4: an IPv4 address inside.
    (v6(0x2002, 0, 0), 16),
];

fn within_v4(ip: Ipv4Addr, (net, bits): (Ipv4Addr, u32)) -> bool {
    ip.to_bits() >> (32 - bits) == net.to_bits() >> (32 - bits)
}

fn within_v6(ip: Ipv6Addr, (net, bits): (Ipv6Addr, u32)) -> bool {
    ip.to_bits() >> (128 - bits) == net.to_bits() >> (128 - bits)
}

/// ISATAP: an interface identifier that says "the last 32 bits are an IPv4 address".
fn is_isatap(ip: Ipv6Addr) -> bool {
    let part = ip.segments();
    part[5] == 0x5efe && part[4] & !0x0200 == 0
}

/// How far `ip` reaches.
pub(super) fn reach(ip: IpAddr) -> Reach {
    match ip {
        IpAddr::V4(ip) if INSIDE_V4.iter().any(|net| within_v4(ip, *net)) => Reach::Inside,
        IpAddr::V4(ip) if NEVER_V4.iter().any(|net| within_v4(ip, *net)) => Reach::Never,
        IpAddr::V4(_) => Reach::Public,
        IpAddr::V6(ip) if INSIDE_V6.iter().any(|net| within_v6(ip, *net)) => Reach::Inside,
        IpAddr::V6(ip) if !within_v6(ip, PUBLIC_V6) => Reach::Never,
        IpAddr::V6(ip) if is_isatap(ip) => Reach::Never,
        IpAddr::V6(ip) if NEVER_V6.iter().any(|net| within_v6(ip, *net)) => Reach::Never,
        IpAddr::V6(_) => Reach::Public,
    }
}

/// Whether to connect to `address`.
pub(super) fn allowed(address: SocketAddr, allow_private: bool) -> bool {
    // A zone belongs to a link of this machine.
    if matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0) {
        return false;
    }
    match reach(address.ip()) {
        Reach::Public => true,
        Reach::Inside => allow_private,
        Reach::Never => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_addresses() {
        let table = [
            (
                Reach::Public,
                "1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 \
                 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.167.255.255 192.169.0.0 192.0.1.0 \
                 198.17.255.255 198.20.0.0 223.255.255.255 168.63.129.17 2606:4700::1111 2a00:1450:4001::1 \
                 2001:4860:4860::8888 2001:200::1 2003::1 3ffe::1",
            ),
            (
                Reach::Inside,
                "127.0.0.1 127.0.0.0 127.255.255.255 127.1.2.3 10.0.0.0 10.255.255.255 172.16.0.0 172.31.255.255 \
                 192.168.0.0 192.168.255.255 100.64.0.0 100.127.255.255 100.100.100.200 ::1 fc00::1 fd00:ec2::254 \
                 fdff:ffff::1",
            ),
            (
                Reach::Never,
                "0.0.0.0 0.1.2.3 169.254.0.0 169.254.169.254 169.254.255.255 192.0.0.192 192.0.2.1 198.51.100.7 \
                 203.0.113.255 192.88.99.1 198.18.0.0 198.19.255.255 168.63.129.16 224.0.0.1 239.255.255.255 240.0.0.1 \
                 255.255.255.255 :: ::2 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:8.8.8.8 \
                 ::ffff:a9fe:a9fe 64:ff9b::7f00:1 64:ff9b::8.8.8.8 64:ff9b:1::1 100::1 100:0:0:1::1 2001::1 \
                 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: \
                 2002:808:808:: 3fff::1 3fff:fff::1 5f00::1 4000::1 fe80::1 fe80::1234:5678 fec0::1 ff02::1 ff0e::1 \
                 2a00:1450::5efe:7f00:1 2a00:1450::200:5efe:808:808",
            ),
        ];
        for (wanted, addresses) in table {
            for text in addresses.split_whitespace() {
                assert_eq!(reach(text.parse().unwrap()), wanted, "{text}");
            }
        }
    }

    #[test]
    fn private_addresses_by_option_and_zones_never() {
        let at = |text: &str, private| allowed(text.parse().unwrap(), private);
        assert!(at("8.8.8.8:80", false) && at("[2606:4700::1]:443", false));
        assert!(!at("127.0.0.1:80", false) && at("127.0.0.1:80", true));
        assert!(!at("[::1]:80", false) && at("[::1]:80", true));
        assert!(!at("169.254.169.254:80", true));
        assert!(!at("0.0.0.0:80", true));
        assert!(!at("[::ffff:127.0.0.1]:80", true));
        assert!(!at("[2606:4700::1%2]:80", true));
    }
}
