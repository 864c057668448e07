//! What can be set about logs: the table `[console]` of the configuration file.

use std::collections::HashMap;
use std::net::IpAddr;
use std::str::FromStr;

use anyhow::{Context as _, Error, Result, ensure};
use serde::{Deserialize, Deserializer, de};

use super::store::name_of;
use crate::key::HostName;

/// See the module's documentation. Everything has a default.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Hosts' names by address; the address itself is the name of all others.
    pub hosts: HashMap<IpAddr, Named>,
    /// Networks whose messages are taken; all, if there is none.
    pub allow: Vec<Network>,
    /// Datagrams of one host a second; 0 is no limit.
    pub datagrams_per_second: u32,
    /// Hosts that are remembered at a time.
    pub hosts_max: usize,
    /// A part of a log ends when it is so large, in MiB.
    pub part_mib: u64,
    /// All logs of a host, in MiB; the oldest parts are removed first.
    pub host_mib: u64,
    /// Parts that are older are removed.
    pub days: u64,
}

/// A [`HostName`] of the configuration.
#[derive(Debug, Clone)]
pub struct Named(pub HostName);

/// An address and how many of its leading bits count: `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    bits: u128,
    mask: u128,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            hosts: HashMap::new(),
            allow: Vec::new(),
            datagrams_per_second: 0,
            hosts_max: 1 << 17,
            part_mib: 64,
            host_mib: 1 << 10,
            days: 90,
        }
    }
}

impl Settings {
    /// Whether messages of this address are taken.
    #[must_use]
    pub fn allows(&self, address: IpAddr) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|network| network.contains(address))
    }

    /// The name of the host with this address.
    pub fn name(&self, address: IpAddr) -> Result<HostName> {
        match self.hosts.get(&address) {
            Some(Named(name)) => Ok(name.clone()),
            None => name_of(address),
        }
    }
}

impl Network {
    fn contains(&self, address: IpAddr) -> bool {
        bits(address) & self.mask == self.bits
    }
}

/// IPv4 addresses lie within IPv6 as everywhere.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

impl FromStr for Network {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address
            .parse()
            .with_context(|| format!("network {text:?} does not begin with an address"))?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let length = length
            .map_or(Ok(all), str::parse)
            .ok()
            .filter(|&length: &u32| length <= all);
        let length =
            length.with_context(|| format!("network {text:?} has no length up to {all}"))?;
        let mask = u128::MAX.checked_shl(all - length).unwrap_or(0);
        let bits = bits(address);
        ensure!(
            bits & !mask == 0,
            "network {text:?} has bits behind its length"
        );
        Ok(Self { bits, mask })
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        HostName::new(&text).map(Self).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_begins_like_them() {
        let check = |network: &str, address: &str, expected: bool| {
            let network: Network = network.parse().unwrap();
            assert_eq!(
                network.contains(address.parse().unwrap()),
                expected,
                "{network:?} {address}"
            );
        };
        check("10.0.0.0/8", "10.200.1.1", true);
        check("10.0.0.0/8", "11.0.0.1", false);
        check("10.1.2.3", "10.1.2.3", true);
        check("10.1.2.3", "10.1.2.4", false);
        check("0.0.0.0/0", "9.9.9.9", true);
        check("0.0.0.0/0", "2001:db8::1", false);
        check("2001:db8::/32", "2001:db8::1", true);
        check("::/0", "9.9.9.9", true);
        for text in ["10.0.0.1/8", "10.0.0.0/33", "ten/8", "10.0.0.0/-1"] {
            assert!(text.parse::<Network>().is_err(), "{text}");
        }
    }
}
