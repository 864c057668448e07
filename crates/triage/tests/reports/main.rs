//! Reports of every class and architecture, written after the formats in the kernel's sources, and
//! what must not change what is found in them: how the log came, how much of it, and which build.

#[cfg(test)]
mod hostile;
#[cfg(test)]
#[path = "../evaluation/random.rs"]
mod random;

/// The logs and the line with what is expected of each.
#[cfg(test)]
fn logs() -> impl Iterator<Item = (&'static str, &'static str)> {
    include_str!("logs.txt")
        .split("=== ")
        .skip(1)
        .filter_map(|part| part.split_once('\n'))
}

/// The first log of a class.
#[cfg(test)]
fn log_of(class: &str) -> &'static str {
    logs()
        .find(|(head, _)| head.starts_with(class))
        .map_or("", |(_, log)| log)
}

#[cfg(test)]
mod tests {
    use std::fmt::{Arguments, Write as _};

    use triage::{Findings, Report, Scanner, scan};

    use crate::{log_of, logs};

    fn line_to(log: &mut String, line: Arguments<'_>) {
        writeln!(log, "{line}").expect("a string takes all");
    }

    fn crash(findings: &Findings) -> &Report {
        findings.crash().expect("the log holds a crash")
    }

    #[track_caller]
    fn same_signature(name: &str, one: &Findings, other: &Findings) {
        let (one, other) = (crash(one), crash(other));
        assert_eq!(
            one.signature, other.signature,
            "{name}: {} {}",
            one.title, other.title
        );
    }

    #[test]
    fn every_class_and_architecture_is_told() {
        for (head, log) in logs() {
            let fields: Vec<&str> = head.split(" | ").collect();
            let findings = scan(log.as_bytes());
            let report = findings
                .crash()
                .unwrap_or_else(|| panic!("{head}: nothing found"));
            let class = serde_json::to_value(report.class).unwrap();
            let told = [
                class.as_str().unwrap_or(""),
                &report.title,
                report.function.as_deref().unwrap_or("-"),
                report.module.as_deref().unwrap_or("-"),
            ];
            assert_eq!(told.as_slice(), fields, "{report:#?}");
            assert!(report.signature.is_some(), "{head}");
        }
    }

    #[test]
    fn the_parts_of_an_oops_are_told() {
        let findings = scan(log_of("page-fault").as_bytes());
        let report = crash(&findings);
        assert_eq!(report.task.as_deref(), Some("frobd"));
        assert_eq!((report.pid, report.cpu), (Some(812), Some(3)));
        assert_eq!(report.taint.as_deref(), Some("GOE"));
        assert_eq!(report.release.as_deref(), Some("6.1.0-56-amd64"));
        assert_eq!(report.offset, Some(0x24));
        assert_eq!(report.panic.as_deref(), Some("Fatal exception"));
        assert!(
            report
                .code
                .as_deref()
                .is_some_and(|code| code.contains("<48>"))
        );
        let is_user = |name: &str| report.registers.iter().any(|(known, _)| known == name);
        assert!(!is_user("R15"), "a register of user mode");
        let rbx = report.registers.iter().find(|(name, _)| name == "RBX");
        assert_eq!(
            rbx.map(|(_, value)| value.as_str()),
            Some("ffff9a5b41a3c000")
        );
        let loaded = logs().find(|(_, log)| log.contains("Kdump: loaded"));
        let loaded = scan(loaded.map_or("", |(_, log)| log).as_bytes());
        assert_eq!(crash(&loaded).task.as_deref(), Some("frobd"));
        let doubtful: Vec<&str> = report
            .trace()
            .iter()
            .filter(|frame| !frame.reliable)
            .map(|frame| frame.function())
            .collect();
        assert_eq!(doubtful, ["__die_body"]);
    }

    #[test]
    fn the_signature_does_not_depend_on_how_the_log_came() {
        for (head, log) in logs() {
            let plain = scan(log.as_bytes());
            let mut dmesg = String::new();
            let mut callers = String::new();
            let mut journal = String::new();
            let mut records = String::new();
            for (number, line) in log.lines().enumerate() {
                line_to(&mut dmesg, format_args!("<4>[   12.{number:06}] {line}\r"));
                line_to(
                    &mut callers,
                    format_args!("[   12.{number:06}][  T812] {line}"),
                );
                line_to(
                    &mut callers,
                    format_args!("[   12.{number:06}][    C0] eth0: link is up"),
                );
                line_to(
                    &mut journal,
                    format_args!("Nov 23 10:00:00 host kernel: {line}"),
                );
                let escaped = line.replace('\t', "\\x09");
                line_to(
                    &mut records,
                    format_args!("4,{number},12{number:06},-,caller=T812;{escaped}"),
                );
            }
            for other in [&dmesg, &callers, &journal, &records] {
                same_signature(head, &plain, &scan(other.as_bytes()));
            }
            let mut pieces = Scanner::new();
            for piece in dmesg.as_bytes().chunks(7) {
                pieces.push(piece);
            }
            same_signature(head, &plain, &pieces.finish());
        }
    }

    #[test]
    fn the_signature_does_not_depend_on_the_build() {
        for (head, log) in logs() {
            let rebuilt = log
                .replace(".isra.0+", ".constprop.0.isra.7+")
                .replace(".cold+", "+")
                .replace("frob_ioctl+0x", "frob_ioctl.part.0+0x1")
                .replace("+0x1", "+0xa1")
                .replace("ffffffff8", "ffffffffa")
                .replace("6.1.0", "6.1.9");
            same_signature(head, &scan(log.as_bytes()), &scan(rebuilt.as_bytes()));
        }
    }

    #[test]
    fn a_log_that_ends_early_keeps_its_signature() {
        // What stands behind the frames that count: registers, modules, the panic.
        let log = log_of("page-fault");
        let cut = log.find("RIP: 0033").expect("the user's registers");
        same_signature("cut", &scan(log.as_bytes()), &scan(&log.as_bytes()[..cut]));
    }

    #[test]
    fn later_reports_are_consequences_and_reboots_begin_anew() {
        let mut log = String::new();
        for (number, line) in log_of("warning")
            .lines()
            .chain(log_of("page-fault").lines())
            .enumerate()
        {
            line_to(&mut log, format_args!("[  100.{number:06}] {line}"));
        }
        log.push_str("[    0.000000] Linux version 6.1.0\n");
        for line in log_of("kasan").lines() {
            line_to(&mut log, format_args!("[    5.000000] {line}"));
        }
        let findings = scan(log.as_bytes());
        let roles: Vec<(String, u32)> = findings
            .reports
            .iter()
            .map(|report| (format!("{:?} {:?}", report.role, report.class), report.boot))
            .collect();
        assert_eq!(
            roles,
            [
                ("Cause Warning".to_owned(), 0),
                ("Consequence PageFault".to_owned(), 0),
                ("Cause Kasan".to_owned(), 1),
            ]
        );
    }

    #[test]
    fn what_is_no_crash_is_a_notice() {
        let log = "EXT4-fs error (device sda1): ext4_lookup:1855: inode #2: comm ls: deleted inode\n\
                   blk_update_request: I/O error, dev sda, sector 100 op 0x0:(READ) flags 0x0\n\
                   EDAC MC0: 1 CE memory read error on CPU_SrcID#0\n\
                   frobd invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0\n\
                   Out of memory: Killed process 77 (frobd) total-vm:1kB\n\
                   EXT4-fs (sda1): mounted filesystem with ordered data mode\n";
        let findings = scan(log.as_bytes());
        assert!(findings.crash().is_none());
        let classes: Vec<String> = findings
            .reports
            .iter()
            .map(|report| format!("{:?} {}", report.class, report.count))
            .collect();
        assert_eq!(
            classes,
            ["Filesystem 1", "Block 1", "Hardware 1", "OutOfMemory 2"]
        );
    }

    #[test]
    fn two_cpus_that_crash_at_once_are_told_apart_by_their_callers() {
        let one = log_of("kasan");
        let other = log_of("hung-task");
        let mut log = String::new();
        let mut others = other.lines();
        for line in one.lines() {
            line_to(&mut log, format_args!("[   12.000000][   T99] {line}"));
            if let Some(line) = others.next() {
                line_to(&mut log, format_args!("[   12.000000][   T35] {line}"));
            }
        }
        let findings = scan(log.as_bytes());
        let titles: Vec<&str> = findings
            .reports
            .iter()
            .map(|report| report.title.as_str())
            .collect();
        assert_eq!(
            titles,
            [
                "INFO: task hung in frob_flush",
                "KASAN: slab-use-after-free Write in frob_copy"
            ]
        );
    }

    #[test]
    fn nothing_is_not_signed() {
        let findings = scan(b"Kernel panic - not syncing: Fatal exception\n");
        assert_eq!(crash(&findings).signature, None);
        let findings = scan(b"BUG: KASAN: use-after-free in \n");
        assert_eq!(crash(&findings).signature, None);
    }
}
