//! Where messages are forwarded to: the tables `[[forward]]` of the configuration file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Error, Result, bail, ensure};
use proto::console::Format;
use serde::{Deserialize, Deserializer, de};

use crate::key::HostName;

/// Targets of one server.
pub const TARGETS_MAX: usize = 8;
/// MiB of one target's spool that can be asked for.
const SPOOL_MIB_MAX: u64 = 1 << 20;
/// Certificates of those that the system trusts, on Debian and its kin.
const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";

/// One target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its name in reports, and of its spool.
    pub name: HostName,
    /// Where it is and how it is spoken to.
    pub to: Destination,
    /// How syslog messages look.
    pub format: Format,
    /// Records of this level and graver ones.
    pub level: u8,
    /// Bytes that may wait on disk.
    pub spool_bytes: u64,
    /// The directory of its spool, instead of one in the dump directory.
    pub spool: Option<PathBuf>,
    /// Who it is trusted by, PEM.
    pub ca: PathBuf,
    /// Our certificate and its key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in its certificate.
    pub server_name: String,
    /// Header lines of requests to a collector.
    pub headers: BTreeMap<String, String>,
}

/// How a target is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Syslog, a datagram a message (RFC 5426).
    Udp,
    /// Syslog, octet counting (RFC 6587).
    Tcp,
    /// Syslog over TLS (RFC 5425).
    Tls,
    /// OpenTelemetry, OTLP/HTTP.
    Http,
    /// The same over TLS.
    Https,
}

/// `tls://logs.example.com:6514`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// How.
    pub way: Way,
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The path of a collector.
    pub path: String,
}

/// [`Settings`] as they stand in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    name: String,
    to: String,
    format: Option<String>,
    level: Option<u8>,
    spool_mib: Option<u64>,
    spool: Option<PathBuf>,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    server_name: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Settings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = Table::deserialize(deserializer)?;
        Self::of(table).map_err(|error| de::Error::custom(format!("{error:#}")))
    }
}

impl Settings {
    fn of(table: Table) -> Result<Self> {
        let name = HostName::new(&table.name).context("the target's name is wrong")?;
        let to: Destination = table.to.parse()?;
        let secure = to.way.is_secure();
        let collector = matches!(to.way, Way::Http | Way::Https);
        ensure!(
            secure || (table.ca.is_none() && table.certificate.is_none() && table.key.is_none()),
            "{name} has certificates but is not spoken to over TLS: use tls:// or https://"
        );
        ensure!(
            collector || table.headers.is_empty(),
            "{name} has headers but is a syslog server: they are for http:// and https://"
        );
        check_headers(&table.headers)?;
        let format = match table.format.as_deref() {
            None | Some("5424") => Format::Rfc5424,
            Some("3164") => Format::Rfc3164,
            Some(other) => bail!("format {other:?} of {name} is neither \"5424\" nor \"3164\""),
        };
        let level = table.level.unwrap_or(7);
        ensure!(level <= 7, "level {level} of {name} is not 0 to 7");
        let spool_mib = table.spool_mib.unwrap_or(256);
        ensure!(
            (1..=SPOOL_MIB_MAX).contains(&spool_mib),
            "spool_mib {spool_mib} of {name} is not 1 to {SPOOL_MIB_MAX}"
        );
        let identity = match (table.certificate, table.key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => bail!("{name} has a certificate or a key, but it takes both"),
        };
        Ok(Self {
            server_name: table.server_name.unwrap_or_else(|| to.host.clone()),
            name,
            to,
            format,
            level,
            spool_bytes: spool_mib << 20,
            spool: table.spool,
            ca: table.ca.unwrap_or_else(|| SYSTEM_CA.into()),
            identity,
            headers: table.headers,
        })
    }
}

/// A header line must not become two.
fn check_headers(headers: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in headers {
        let token = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        ensure!(
            !name.is_empty() && name.chars().all(token),
            "header {name:?} has characters that no name has"
        );
        ensure!(
            value.chars().all(|c| c.is_ascii_graphic() || c == ' '),
            "the value of header {name:?} is not printable ASCII"
        );
    }
    Ok(())
}

impl Way {
    const ALL: [(&'static str, Self, u16); 5] = [
        ("udp", Self::Udp, 514),
        ("tcp", Self::Tcp, 514),
        ("tls", Self::Tls, 6514),
        ("http", Self::Http, 4318),
        ("https", Self::Https, 4318),
    ];

    /// It is spoken over TLS.
    #[must_use]
    pub fn is_secure(self) -> bool {
        matches!(self, Self::Tls | Self::Https)
    }

    fn scheme(self) -> &'static str {
        let mut all = Self::ALL.into_iter();
        all.find_map(|(scheme, way, _)| (way == self).then_some(scheme))
            .unwrap_or_default()
    }
}

impl FromStr for Destination {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = || {
            format!(
                "{text:?} is none of udp://HOST:514, tcp://HOST:514, tls://HOST:6514 (syslog), \
                http://HOST:4318/v1/logs, https://HOST:4318/v1/logs (OpenTelemetry)"
            )
        };
        let (scheme, rest) = text.split_once("://").with_context(known)?;
        let mut ways = Way::ALL.into_iter();
        let (_, way, default_port) = ways.find(|way| way.0 == scheme).with_context(known)?;
        let (place, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        // An IPv6 address is in brackets, so that its colons are not taken for a port's.
        let (host, port) = match place
            .strip_prefix('[')
            .and_then(|rest| rest.split_once(']'))
        {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').with_context(known)?)),
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        let port = port.map_or(Ok(default_port), str::parse);
        let port = port.ok().filter(|&port| port > 0).with_context(known)?;
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
        ensure!(!host.is_empty() && host.chars().all(legal), known());
        let is_collector = matches!(way, Way::Http | Way::Https);
        ensure!(is_collector || path.is_empty(), known());
        ensure!(path.chars().all(|c| c.is_ascii_graphic()), known());
        let path = match path {
            "" | "/" => "/v1/logs",
            path => path,
        };
        Ok(Self {
            way,
            host: host.to_owned(),
            port,
            path: if is_collector { path } else { "" }.to_owned(),
        })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (open, close) = if self.host.contains(':') {
            ("[", "]")
        } else {
            ("", "")
        };
        let Self {
            way,
            host,
            port,
            path,
        } = self;
        write!(f, "{}://{open}{host}{close}:{port}{path}", way.scheme())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_read_back_with_their_default_ports() {
        for (text, expected) in [
            ("udp://logs", "udp://logs:514"),
            ("tcp://10.0.0.1:1514", "tcp://10.0.0.1:1514"),
            ("tls://logs.example.com", "tls://logs.example.com:6514"),
            ("http://[::1]", "http://[::1]:4318/v1/logs"),
            ("https://c:4319/otel/v1/logs", "https://c:4319/otel/v1/logs"),
        ] {
            let destination: Destination = text.parse().unwrap();
            assert_eq!(destination.to_string(), expected);
            assert_eq!(expected.parse::<Destination>().unwrap(), destination);
        }
        for text in [
            "",
            "logs:514",
            "ftp://logs",
            "udp://",
            "udp://logs:0",
            "udp://logs:70000",
            "tcp://logs/path",
            "udp://a b",
            "http://c/\r\nHost: x",
            "udp://[::1]x",
        ] {
            assert!(text.parse::<Destination>().is_err(), "{text}");
        }
    }
}
