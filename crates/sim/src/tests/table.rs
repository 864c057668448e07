//! How long a dump takes over a grid of loss and round trip, as a table in the repository: a slower
//! protocol is a visible change. `UPDATE_SNAPSHOTS=1 cargo test -p sim` writes it anew.

use std::fmt::Write;
use std::path::Path;

use super::{complete, with};
use crate::Options;

#[test]
fn time_over_loss_and_round_trip() {
    let mut table =
        String::from("loss permille | round trip us | time us | packets | sent again\n");
    for loss in [0, 1, 10, 50, 100] {
        for round_trip_us in [200, 1000, 10_000, 50_000] {
            let delay_us = round_trip_us / 2;
            let mut options = Options {
                seed: 7,
                ..with("host.ram_pages=2000 server.credit=4096")
            };
            for link in [&mut options.up, &mut options.down] {
                link.loss = loss;
                link.delay_us = delay_us;
            }
            let report = complete(&options);
            let time = report.time_us;
            let [packets, again] =
                ["host: packets", "host: sent again"].map(|name| report.counts.get(name));
            writeln!(
                table,
                "{loss:>13} | {round_trip_us:>13} | {time:>7} | {packets:>7} | {again:>10}"
            )
            .expect("writing to a string");
        }
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/time.txt");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&file, &table).expect("the snapshot is writable");
    }
    let before = std::fs::read_to_string(&file).expect("the snapshot exists");
    assert_eq!(
        table, before,
        "dump times changed; if that is meant: UPDATE_SNAPSHOTS=1"
    );
}
