//! Worlds that once failed, as the simulator shrank them, each with what was wrong.

use super::{complete, with};
use crate::Options;

fn seed(seed: u64, options: &str) -> Options {
    Options {
        seed,
        ..with(options)
    }
}

#[test]
fn what_a_killed_server_held_is_sent_again() {
    // Packets that had arrived ahead of their turn were never sent again after the server that held
    // them was killed.
    complete(&seed(13, "up.burst=3 server.kill_every=50"));
}

#[test]
fn a_probe_does_not_send_a_buffer_that_is_being_filled() {
    // With one transmit buffer, the last packet was sent again from it, half overwritten.
    complete(&seed(16, "host.pool_slots=1 host.stall_permille=3"));
}

#[test]
fn a_later_attempt_that_the_server_lost_is_begun_again() {
    // The server still knew the attempt before, and refused the packets of this one in silence.
    let options = "server.kill_every=200 server.power=1000 server.sync_us=3000 up.loss=100 \
                   host.ram_pages=2000";
    complete(&seed(4, options));
}

#[test]
fn a_probe_from_the_only_buffer_promises_no_packet_after_it() {
    // The buffer is away for longer than a timeout, so that a probe waits for it and takes it.
    let options = "host.pool_slots=1 host.nic_us=30000 host.ram_pages=50";
    complete(&seed(5, options));
}
