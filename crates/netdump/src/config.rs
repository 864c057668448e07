//! The server's configuration file, TOML. Everything in it has a default; what is not known is an
//! error that names the line.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::console::settings::Settings;
use crate::forward::settings::Settings as Target;
use crate::serve::signatures;

/// What the file may hold.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Hosts' logs.
    pub console: Settings,
    /// What is wanted of crashes that are known.
    pub signatures: signatures::Settings,
    /// Where their messages are forwarded to.
    pub forward: Vec<Target>,
}

impl Config {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self> {
        let show = path.display();
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {show}"))?;
        toml::from_str(&text).with_context(|| format!("the configuration {show} is wrong"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::signatures::{Level, LogOnly, Wanted};

    fn read(text: &str) -> Result<Config> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Config::read(file.path())
    }

    #[test]
    fn everything_has_a_default_and_what_is_unknown_is_named_with_its_line() {
        assert_eq!(read("").unwrap().console.days, 90);
        let text =
            "[console]\ndays = 7\nallow = ['10.0.0.0/8']\n[console.hosts]\n'10.0.0.1' = 'web1'\n";
        let console = read(text).unwrap().console;
        let address = "10.0.0.1".parse().unwrap();
        assert_eq!(console.name(address).unwrap().as_str(), "web1");
        assert!(console.allows(address) && console.days == 7);
        let text = "[signatures]\ndumps = 1\nbeyond = 31\nhardware = 'log-only'\n";
        let signatures = read(text).unwrap().signatures;
        assert_eq!(signatures.dumps, 1);
        assert_eq!(signatures.beyond, Wanted::Filter(Level(31)));
        assert_eq!(signatures.hardware, Wanted::Only(LogOnly::LogOnly));
        for (wrong, named, line) in [
            ("[signatures]\ndump = 7\n", "dump", 2),
            ("[signatures]\nbeyond = 32\n", "filter level", 2),
            ("[console]\ndayz = 7\n", "dayz", 2),
            ("[console]\nallow = ['10.0.0.1/8']\n", "bits behind", 2),
            ("[console.hosts]\n'10.0.0.1' = '../x'\n", "host name", 2),
            ("[[forward]]\nname = 'a'\ntu = 'udp://a'\n", "tu", 3),
            (
                "\n[[forward]]\nto = 'ftp://a'\nname = 'a'\n",
                "udp://HOST",
                2,
            ),
            (
                "[[forward]]\nto = 'udp://a'\nname = '../a'\n",
                "host name",
                1,
            ),
            (
                "[[forward]]\nto = 'udp://a'\nname = 'a'\nca = 'x'\n",
                "tls://",
                1,
            ),
            (
                "[[forward]]\nto = 'tls://a'\nname = 'a'\nkey = 'x'\n",
                "both",
                1,
            ),
        ] {
            let error = format!("{:#}", read(wrong).unwrap_err());
            let line = format!("line {line},");
            assert!(error.contains(named) && error.contains(&line), "{error}");
        }
    }
}
