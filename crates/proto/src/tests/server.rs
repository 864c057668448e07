//! What the server engine does with packets that no honest client sends.

use crate::keys::Secret;
use crate::server::{Hold, Session};
use crate::time::Instant;
use crate::units::{ArmingId, KeyId, PacketNumber, SessionId};
use crate::wire::{Header, Kind, Reject, seal_client};

struct NoRoom;

impl Hold for NoRoom {
    fn keep(&mut self, _: PacketNumber, _: &[u8]) -> bool {
        false
    }

    fn release<R>(&mut self, _: PacketNumber, _: impl FnOnce(&[u8]) -> R) -> Option<R> {
        None
    }
}

#[test]
fn the_last_number_there_is_delivers_nothing() {
    let id = SessionId {
        key: KeyId(1),
        arming: ArmingId(2),
    };
    let keys = Secret([3; 32]).session_keys(id);
    let last = PacketNumber(u64::MAX);
    let mut session = Session::new(id, keys.clone(), [4; 16], 0, last, last);
    let header = Header {
        kind: Kind::First,
        attempt: 0,
        session: id,
        number: last,
    };
    let mut datagram = [0; 64];
    let length = seal_client(&keys.client, &header, &mut datagram, 16).unwrap();
    let taken = session.handle(
        Instant::from_micros(0),
        &mut datagram[..length],
        &mut NoRoom,
        &mut |_| panic!("delivered"),
    );
    assert_eq!(taken, Err(Reject::BeyondWindow));
}
