//! The figures on the development logs, which lie outside the repository.

#![cfg(test)]

mod evaluation;

use evaluation::{Case, Dress, folder, load, measure};

/// What must hold, below what was measured, so that a change of rules shows.
const DETECTION_MIN: f64 = 0.98;
const CULPRIT_MIN: f64 = 0.90;
const PAIR_F1_MIN: f64 = 0.70;
/// A hundredth of the datagrams is lost, and with it some first lines and culprits.
const NETCONSOLE_CULPRIT_MIN: f64 = 0.85;

#[test]
#[ignore = "needs the oops corpus: set NETDUMP_OOPS_CORPUS and run with --ignored"]
fn development_logs_are_read_as_they_should() {
    let all = load(&folder());
    assert!(!all.is_empty(), "no logs in {}", folder().display());
    let clean: Vec<&Case> = all.iter().filter(|case| !case.is_corrupted()).collect();
    let plain = measure(&clean, Dress::Plain);
    println!("{}\n{}", plain.table(), plain.misses);
    assert!(plain.detection() >= DETECTION_MIN);
    assert!(plain.culprit() >= CULPRIT_MIN);
    assert!(plain.family >= PAIR_F1_MIN);
    assert_eq!(plain.alarms, 0);
    let wrapped = measure(&clean, Dress::Netconsole);
    println!("{}\n{}", wrapped.table(), wrapped.misses);
    assert!(wrapped.detection() >= DETECTION_MIN);
    assert!(wrapped.culprit() >= NETCONSOLE_CULPRIT_MIN);
    assert_eq!(wrapped.alarms, 0);
}
