//! `netdump send` and `netdump serve` as processes: what is sent arrives, page by page.

#[cfg(test)]
mod proxy;
#[cfg(test)]
#[path = "../serve/server.rs"]
#[expect(dead_code, reason = "the server's own tests use more of it")]
mod server;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::SocketAddr;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use dump::{
        Compression, Cpu, Format, Machine, PAGE_SIZE, Page, PageState, Pfn, RamRange, Reader,
        Writer,
    };
    use serde_json::Value;

    use crate::proxy;
    use crate::server::{Place, session};

    /// Ranges of RAM of the core files: first page and pages.
    const RAM: [(u64, u64); 2] = [(1, 158), (256, 3000)];

    /// What page `pfn` holds: zeros, noise, text, or nothing.
    fn page(pfn: u64) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        let mut state = pfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut noise = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        };
        match pfn / 7 % 4 {
            0 => {}
            1 => page.fill_with(noise),
            _ => page.fill_with(|| b'a' + noise() % 3),
        }
        page
    }

    fn is_excluded(format: Format, pfn: u64) -> bool {
        format != Format::Elf && (700..720).contains(&pfn)
    }

    fn is_unreadable(format: Format, pfn: u64) -> bool {
        format != Format::Elf && pfn == 901
    }

    fn pfns() -> impl Iterator<Item = u64> {
        RAM.iter().flat_map(|&(first, pages)| first..first + pages)
    }

    fn machine() -> Machine {
        let cpu = |number: u32| Cpu {
            number,
            pid: number + 1,
            registers: Some(std::array::from_fn(|at| {
                u64::from(number) << 32 | at as u64
            })),
            crashed: number == 1,
        };
        Machine {
            ram: RAM
                .map(|(first, pages)| RamRange {
                    first: Pfn(first),
                    pages,
                })
                .to_vec(),
            vmcoreinfo: b"OSRELEASE=6.1.0-test\nPAGESIZE=4096\nNUMBER(phys_base)=4096\n".to_vec(),
            cpus: vec![cpu(0), cpu(1)],
            node: "db7".to_owned(),
            release: "6.1.0-test".to_owned(),
            version: "#1 SMP test".to_owned(),
            crash_time_s: 1_790_000_000,
            page_offset: 0xffff_8880_0000_0000,
            kernel_image: Some(RamRange {
                first: Pfn(1000),
                pages: 40,
            }),
            filter: 0,
        }
    }

    fn core_file(place: &Place, format: Format) -> PathBuf {
        let path = place.keys().with_file_name("core");
        let mut writer = Writer::create(&path, machine(), format).unwrap();
        for pfn in pfns() {
            let bytes = page(pfn);
            let page = if is_excluded(format, pfn) {
                Page::Excluded
            } else if is_unreadable(format, pfn) {
                Page::Unreadable
            } else {
                Page::Data(&bytes)
            };
            writer.page(Pfn(pfn), page).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    fn command(place: &Place, source: &str, server: SocketAddr, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_netdump"));
        command.args(["send", source, "--json", "--server", &server.to_string()]);
        command
            .arg("--key")
            .arg(place.keys().join("web1"))
            .args(more);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The report of a sender that must have succeeded.
    fn report(output: &Output) -> Value {
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn assert_same(crash: &Path, format: Format) {
        assert_eq!(session(crash)["state"], "complete", "{}", session(crash));
        let mut image = Reader::open(&crash.join("vmcore")).unwrap();
        let (sent, got) = (machine(), image.machine().clone());
        assert_eq!(
            (
                got.ram,
                got.vmcoreinfo,
                got.cpus,
                got.node,
                got.release,
                got.version
            ),
            (
                sent.ram,
                sent.vmcoreinfo,
                sent.cpus,
                sent.node,
                sent.release,
                sent.version
            )
        );
        assert_eq!(got.crash_time_s, sent.crash_time_s);
        let mut bytes = [0; PAGE_SIZE];
        for pfn in pfns() {
            let state = image.read_page(Pfn(pfn), &mut bytes).unwrap();
            let expected = if is_excluded(format, pfn) {
                PageState::Excluded
            } else if is_unreadable(format, pfn) {
                PageState::Unreadable
            } else {
                PageState::Data
            };
            assert_eq!(state, expected, "page {pfn}");
            if state == PageState::Data {
                assert!(bytes == page(pfn), "page {pfn}");
            }
        }
    }

    #[test]
    fn a_core_file_arrives_as_it_is() {
        let kdump = Format::Kdump(Compression::Zstd { level: 1 });
        for format in [Format::Elf, kdump, Format::Kdump(Compression::None)] {
            let (place, _) = Place::new();
            let server = place.serve(&[]);
            let core = core_file(&place, format);
            let core = core.to_str().unwrap();
            let sent = report(&command(&place, core, server.address, &[]).output().unwrap());
            assert_eq!(
                (&sent["complete"], &sent["action"]),
                (&1.into(), &"reboot".into())
            );
            assert_eq!(sent["memory_bytes"], pfns().count() * PAGE_SIZE);
            server.wait_for("complete");
            assert_same(&place.crashes()[0], format);
            server.stop();
        }
    }

    #[test]
    fn small_packets_and_a_lossy_link_bring_it_too() {
        let (place, _) = Place::new();
        let server = place.serve(&[]);
        let core = core_file(&place, Format::Elf);
        let link = proxy::start(server.address, 10);
        let more = ["--mtu", "576"];
        let sent = command(&place, core.to_str().unwrap(), link.address, &more).output();
        let sent = report(&sent.unwrap());
        assert!(sent["resent"].as_u64().unwrap() > 100, "{sent}");
        assert!(link.lost() > 100, "the link lost {}", link.lost());
        server.wait_for("complete");
        assert_same(&place.crashes()[0], Format::Elf);
    }

    #[test]
    fn a_server_that_is_killed_and_restarted_gets_all_of_it() {
        let (place, _) = Place::new();
        let server = place.serve(&[]);
        let address = server.address;
        let core = core_file(&place, Format::Elf);
        let mut sender = command(&place, core.to_str().unwrap(), address, &["--rate", "4"]);
        let sender = sender.spawn().unwrap();
        let give_up = Instant::now() + Duration::from_secs(20);
        let spooled = || {
            let crash = place.crashes().pop()?;
            Some(fs::metadata(crash.join("spool")).ok()?.len())
        };
        while spooled().is_none_or(|bytes| bytes < 500_000) {
            assert!(Instant::now() < give_up, "{:?} bytes came", spooled());
            std::thread::sleep(Duration::from_millis(10));
        }
        server.kill();
        std::thread::sleep(Duration::from_millis(300));
        let server = place.serve_at(&address.to_string(), &[]);
        let sent = report(&sender.wait_with_output().unwrap());
        assert_eq!(sent["complete"], 1);
        server.wait_for("complete");
        assert_eq!(place.crashes().len(), 1, "the spool was gone on with");
        assert_same(&place.crashes()[0], Format::Elf);
    }

    #[test]
    fn many_sessions_at_once_all_arrive() {
        let (place, _) = Place::new();
        let server = place.serve(&[]);
        let more = ["--sessions", "16"];
        let sent = command(&place, "synthetic:2M", server.address, &more).output();
        let sent = report(&sent.unwrap());
        assert_eq!(
            (&sent["sessions"], &sent["complete"]),
            (&16.into(), &16.into())
        );
        for _ in 0..16 {
            server.wait_for("complete");
        }
        assert_eq!(place.crashes().len(), 16);
        assert!(
            place
                .crashes()
                .iter()
                .all(|crash| crash.join("vmcore").exists())
        );
    }

    #[test]
    fn a_server_that_wants_no_pages_is_a_failure() {
        let (place, _) = Place::new();
        let server = place.serve(&["--verdict", "log-only"]);
        let output = command(&place, "synthetic:1M", server.address, &[])
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(error.contains("took no pages"), "{error}");
    }

    #[test]
    fn a_failure_is_one_line_and_an_exit_code() {
        let (place, _) = Place::new();
        let nobody = "127.0.0.1:9".parse().unwrap();
        let check = |source: &str, expected: &str| {
            let output = command(&place, source, nobody, &["--give-up", "1"])
                .output()
                .unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(
                (output.status.code(), error.lines().count()),
                (Some(1), 1),
                "{error}"
            );
            assert!(error.contains(expected), "{error}");
        };
        check("synthetic:1M", "never answered within 1 s");
        check("/nonexistent", "/nonexistent");
        check(env!("CARGO_BIN_EXE_netdump"), "not a core file");
    }
}
