//! Bytes of the wire: datagrams, replies, records, blocks, messages.

use netdump::hardware::{Arrived, Hardware};
use proto::arming::{Command, MESSAGE_BYTES, Status};
use proto::hardware::{CONFIG_BYTES_MAX, PROCESSOR_REGISTERS_MAX};
use proto::lz4::Table;
use proto::record::{self, BLOCK_BYTES, Block, Codec, PFN_MAX, Record};
use proto::reply::{REPLY_BYTES_MAX, Reply};
use proto::units::{ArmingId, KeyId, PAGE_BYTES, PacketNumber, Pfn, SessionId};
use proto::wire::{
    CLIENT_OVERHEAD, HEADER_BYTES, Header, INCARNATION_BYTES, Kind, open_client, open_server,
    seal_client,
};

use crate::{byte, number};

const KEY: [u8; 32] = [7; 32];

/// Datagrams: any bytes are judged, and what is sealed opens as it was and only so.
pub(crate) fn wire(bytes: &[u8]) {
    if let Ok(header) = Header::parse(bytes) {
        let _ = open_client(&KEY, &header, &mut bytes.to_vec());
        let _ = open_server(&KEY, &header, &mut bytes.to_vec());
    }
    let mut rest = bytes;
    let header = Header {
        kind: if byte(&mut rest) & 1 == 0 {
            Kind::First
        } else {
            Kind::Data
        },
        attempt: u16::from(byte(&mut rest)),
        session: SessionId {
            key: KeyId(number(&mut rest)),
            arming: ArmingId(number(&mut rest)),
        },
        number: PacketNumber(number(&mut rest)),
    };
    let flip = number(&mut rest);
    let payload = &rest[..rest.len().min(1400)];
    let mut datagram = vec![0; payload.len() + CLIENT_OVERHEAD];
    datagram[HEADER_BYTES..][..payload.len()].copy_from_slice(payload);
    let length = seal_client(&KEY, &header, &mut datagram, payload.len());
    assert_eq!(length, Some(datagram.len()));
    assert_eq!(Header::parse(&datagram), Ok(header));
    let mut copy = datagram.clone();
    let opened = open_client(&KEY, &header, &mut copy);
    assert_eq!(opened.as_deref(), Ok(payload));
    let bits = u64::try_from(datagram.len() * 8).unwrap_or(1);
    let at = usize::try_from(flip % bits).unwrap_or(0);
    datagram[at / 8] ^= 1 << (at % 8);
    let taken = Header::parse(&datagram).and_then(|header| {
        open_client(&KEY, &header, &mut datagram.clone()).map(|stream| stream.len())
    });
    assert!(taken.is_err(), "a flipped bit was not noticed");
}

/// Replies: what is taken can be written again, and is the same.
pub(crate) fn reply(bytes: &[u8]) {
    let Some(opened) = Reply::decode(bytes) else {
        return;
    };
    let mut out = [0; REPLY_BYTES_MAX];
    let length = opened
        .reply
        .encode(opened.bitmap, opened.pull, &mut out)
        .expect("a legal reply fits");
    let again = Reply::decode(&out[HEADER_BYTES + INCARNATION_BYTES..][..length]);
    let again = again.expect("a reply that was written is legal");
    assert_eq!(again.reply, opened.reply);
    assert_eq!(again.bitmap, opened.bitmap);
    assert_eq!(again.pull, opened.pull);
}

/// Records: whatever is legal is within the bounds that the rest of the server relies on.
pub(crate) fn record(bytes: &[u8]) {
    let (mut rest, mut hardware) = (bytes, Arrived::default());
    while let Ok(Some(decoded)) = record::decode(rest) {
        assert!(decoded.bytes > 0 && decoded.bytes <= rest.len());
        rest = &rest[decoded.bytes..];
        match decoded.record {
            Record::Pages(block) => {
                let mut out = [0; BLOCK_BYTES];
                if let Ok(pages) = block.decode(&mut out) {
                    assert_eq!(pages.len(), usize::from(block.pages) * PAGE_BYTES);
                }
                assert!(block.first.0 + u64::from(block.pages) <= PFN_MAX);
            }
            Record::Run(run) => assert!(run.pages > 0 && run.first.0 + run.pages <= PFN_MAX),
            Record::MemoryMap(map) => {
                let mut end = 0;
                for range in map {
                    assert!(range.first.get() >= end && range.pages.get() > 0);
                    end = range.first.get() + range.pages.get();
                }
                assert!(end <= PFN_MAX);
            }
            Record::Processor(processor) => {
                assert!(processor.registers.len() <= PROCESSOR_REGISTERS_MAX);
                hardware.cpu(&processor);
            }
            Record::Devices { devices, .. } => {
                for device in devices {
                    let read = usize::from(device.head.read.get());
                    assert!(device.config.len() <= read && read <= CONFIG_BYTES_MAX);
                    hardware.device(&device);
                }
            }
            _ => {}
        }
    }
    // Whatever a host says its hardware is can be told in words.
    if !hardware.is_empty() {
        assert!(!Hardware::of(&hardware).to_string().is_empty());
    }
}

/// LZ4: a block of any bytes is decoded or refused, and what our compressor makes comes back.
pub(crate) fn lz4(bytes: &[u8]) {
    let mut out = [0; BLOCK_BYTES];
    for pages in [1, 16] {
        let block = Block {
            first: Pfn(0),
            pages,
            codec: Codec::Lz4,
            body: bytes,
        };
        let _ = block.decode(&mut out);
    }
    // Pages made of the input, over and over with a step, so that there are matches to be found.
    let Some(step) = bytes.first().copied().map(usize::from) else {
        return;
    };
    let page = |at: usize| bytes[(at + at / PAGE_BYTES * step) % bytes.len()];
    let raw: Vec<u8> = (0..2 * PAGE_BYTES).map(page).collect();
    let mut compressed = vec![0; raw.len() - 1];
    let Some(length) = Table::new().compress(&raw, &mut compressed) else {
        return;
    };
    let block = Block {
        first: Pfn(0),
        pages: 2,
        codec: Codec::Lz4,
        body: &compressed[..length],
    };
    assert!(block.decode(&mut out).is_ok_and(|pages| pages == raw));
}

/// Messages to the module and its status: what is taken can be written again, and is taken again.
pub(crate) fn arming(bytes: &[u8]) {
    if let Ok(command) = Command::decode(bytes) {
        let again: [u8; MESSAGE_BYTES] = command.encode();
        let taken = Command::decode(&again).map(|command| command.encode());
        assert!(taken.is_ok_and(|taken| taken == again));
    }
    if let Ok(status) = Status::decode(bytes) {
        let _ = (status.state(), status.server_address());
    }
}
