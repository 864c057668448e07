//! Streams: order, holes, fragments, boots, and that nothing taken is ever lost.

use std::fmt::Write as _;

use super::*;

const SECOND: u64 = 1_000_000;
const START: u64 = 1_795_543_320 * SECOND;
/// Uptime at which these tests begin.
const UP: u64 = 100 * SECOND;

/// What a stream gave on, a word a thing.
#[derive(Default)]
struct Told {
    words: Vec<String>,
    texts: Vec<Vec<u8>>,
    counts: Counts,
}

impl Sink for Told {
    fn boot(&mut self, start: &BootStart<'_>) {
        let release = start.release.unwrap_or("?");
        self.words.push(format!("boot({release})"));
    }

    fn record(&mut self, _: u64, record: &Record<'_>) {
        self.texts.push(record.text());
        let text = String::from_utf8_lossy(&record.text()).into_owned();
        self.words.push(match record.seq {
            Some(seq) => format!("{seq}:{text}"),
            None => text,
        });
    }

    fn gap(&mut self, _: u64, Gap { first, last, lost }: Gap) {
        let lost = lost.map_or_else(String::new, |lost| format!(",{lost} lost"));
        self.words.push(format!("gap({first}-{last}{lost})"));
    }

    fn part(&mut self, _: u64, Part { seq, have, total }: Part) {
        self.words.push(format!("part({seq},{have}/{total})"));
    }

    fn raw(&mut self, _: u64, bytes: &[u8], _: Unfinished) {
        self.words.push(format!("raw({})", bytes.len()));
    }

    fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }
}

struct World {
    stream: Stream,
    room: Room,
    told: Told,
    /// Microseconds since [`START`].
    now: u64,
}

impl World {
    fn new() -> Self {
        Self {
            stream: Stream::default(),
            room: Room::new(1 << 20),
            told: Told::default(),
            now: UP,
        }
    }

    fn take(&mut self, datagram: impl AsRef<[u8]>) -> &mut Self {
        self.now += 10;
        let (now, datagram) = (START + self.now, datagram.as_ref());
        self.stream
            .take(now, datagram, &mut self.room, &mut self.told);
        self
    }

    /// Record `seq`, printed now.
    fn record(&mut self, seq: u64) -> &mut Self {
        let now = self.now;
        self.take(format!("6,{seq},{now},-;r{seq}\n"))
    }

    fn wait(&mut self, micros: u64) -> &mut Self {
        self.now += micros;
        let now = START + self.now;
        if self.stream.due().is_some_and(|due| due <= now) {
            self.stream.expire(now, &mut self.room, &mut self.told);
        }
        self
    }

    fn told(&mut self) -> String {
        self.told.words.drain(..).collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn records_in_order_go_straight_through() {
    let mut world = World::new();
    world.record(5).record(6).record(7);
    assert_eq!(world.told(), "boot(?) 5:r5 6:r6 7:r7");
    assert_eq!(world.stream.due(), None);
}

#[test]
fn records_that_overtake_each_other_are_put_in_order() {
    let mut world = World::new();
    world.record(1).record(4).record(3).record(2).record(5);
    assert_eq!(world.told(), "boot(?) 1:r1 2:r2 3:r3 4:r4 5:r5");
    assert_eq!(world.told.counts.gaps, 0);
}

#[test]
fn a_hole_followed_by_silence_is_a_gap_in_time() {
    let mut world = World::new();
    world.record(1).record(3).record(4).record(7);
    assert_eq!(world.told(), "boot(?) 1:r1");
    let due = world.stream.due().unwrap();
    assert!(due <= START + world.now + HOLE_MICROS);
    world.wait(HOLE_MICROS);
    assert_eq!(world.told(), "gap(2-2) 3:r3 4:r4 gap(5-6) 7:r7");
    assert_eq!((world.stream.due(), world.told.counts.gaps), (None, 3));
}

#[test]
fn holes_are_waited_for_each_from_its_own_time() {
    let mut world = World::new();
    world.record(1).record(3).wait(HOLE_MICROS / 2).record(5);
    world.wait(HOLE_MICROS / 2);
    assert_eq!(world.told(), "boot(?) 1:r1 gap(2-2) 3:r3");
    world.wait(HOLE_MICROS);
    assert_eq!(world.told(), "gap(4-4) 5:r5");
}

#[test]
fn late_records_are_given_on_and_duplicates_are_not() {
    let mut world = World::new();
    world
        .record(1)
        .record(3)
        .wait(HOLE_MICROS)
        .record(2)
        .record(2)
        .record(3)
        .record(1);
    assert_eq!(world.told(), "boot(?) 1:r1 gap(2-2) 3:r3 2:r2");
    let Counts {
        late,
        duplicates,
        records,
        ..
    } = world.told.counts;
    assert_eq!((late, duplicates, records), (1, 3, 3));
    world.record(9).record(9).wait(HOLE_MICROS);
    assert_eq!(world.told.counts.duplicates, 4, "of records that wait, too");
}

#[test]
fn the_hosts_own_count_tells_loss_from_silence() {
    let mut world = World::new();
    let mut say = |seq: u64, msgid: u32| {
        let now = world.now;
        world
            .take(format!("6,{seq},{now},-;r{seq}\n msgid={msgid}\n"))
            .wait(HOLE_MICROS);
    };
    say(1, 10);
    say(5, 11);
    say(9, 14);
    assert_eq!(world.told(), "boot(?) 1:r1 5:r5 gap(6-8,2 lost) 9:r9");
    assert_eq!((world.told.counts.gaps, world.told.counts.lost), (6, 2));
}

/// Datagrams of record `seq` whose body is cut every `size` bytes.
fn fragments(seq: u64, time_us: u64, body: &str, size: usize) -> Vec<String> {
    let total = body.len();
    let parts = body.as_bytes().chunks(size).enumerate();
    parts
        .map(|(index, part)| {
            let part = std::str::from_utf8(part).unwrap();
            format!("4,{seq},{time_us},-,ncfrag={}/{total};{part}", index * size)
        })
        .collect()
}

#[test]
fn fragments_are_put_together_in_any_order() {
    let mut world = World::new();
    let mut body = String::new();
    for entry in 0..200 {
        write!(body, "{entry} is a word; ").unwrap();
    }
    body.push_str("\n SUBSYSTEM=x\n");
    let mut parts = fragments(2, UP, &body, 97);
    world.record(1);
    parts.reverse();
    for part in &parts {
        world.take(part).take(part);
    }
    world.record(3);
    let text = body.split_once('\n').unwrap().0;
    assert_eq!(world.told(), format!("boot(?) 1:r1 2:{text} 3:r3"));
    assert_eq!(world.told.counts.incomplete, 0);
    assert_eq!(
        world.told.counts.duplicates,
        u64::try_from(parts.len()).unwrap()
    );
}

#[test]
fn a_record_that_lacks_a_fragment_is_given_on_as_far_as_it_came() {
    let mut world = World::new();
    let parts = fragments(2, UP, "abcdefghij\n", 4);
    world
        .record(1)
        .take(&parts[0])
        .take(&parts[2])
        .record(3)
        .wait(HOLE_MICROS);
    assert_eq!(
        world.told(),
        "boot(?) 1:r1 part(2,7/11) 2:abcd\0\0\0\0ij 3:r3"
    );
    let parts = fragments(6, world.now, "abcdefghij\n", 4);
    world.take(&parts[1]).record(7).wait(HOLE_MICROS);
    assert_eq!(
        world.told(),
        "gap(4-5) part(6,4/11) 6:\0\0\0\0efgh\0\0\0 7:r7"
    );
    assert_eq!(
        (world.told.counts.incomplete, world.told.counts.gaps),
        (2, 2)
    );
}

#[test]
fn fragments_that_contradict_each_other_are_kept_raw() {
    let mut world = World::new();
    world
        .record(1)
        .take("6,2,9,-,ncfrag=0/8;abcd")
        .take("6,2,9,-,ncfrag=2/8;xyz");
    world
        .take("6,2,9,-,ncfrag=4/9;efgh")
        .take("6,2,9,-;whole\n")
        .take("6,2,9,-,ncfrag=4/8;efgh");
    assert_eq!(
        world.told(),
        "boot(?) 1:r1 raw(22) raw(23) raw(14) 2:abcdefgh"
    );
}

#[test]
fn the_longest_body_fits() {
    let mut world = World::new();
    let body = format!("{}\n", "x".repeat(BODY - 1));
    world.record(1);
    for part in fragments(2, UP, &body, 950) {
        world.take(part);
    }
    assert_eq!(world.told.texts.last().unwrap().len(), BODY - 1);
}

const BODY: usize = crate::datagram::BODY_BYTES_MAX;

#[test]
fn a_capture_kernel_and_a_rebooted_one_begin_new_boots() {
    let mut world = World::new();
    world.record(700).record(702);
    // The capture kernel, whose clock has just begun.
    world.now += 3 * SECOND;
    world
        .take("6,0,0,-;Linux")
        .take("6,1,0,-;two")
        .wait(HOLE_MICROS);
    assert_eq!(
        world.told(),
        "boot(?) 700:r700 gap(701-701) 702:r702 boot(?) 0:Linux 1:two"
    );
    world.now += 60 * SECOND;
    world.take("6.1.0,5,900,20000000,-;late network");
    assert_eq!(world.told(), "boot(6.1.0) 900:late network");
    world.take("6.2.0,5,901,20000001,-;another");
    assert_eq!(world.told(), "boot(6.2.0) 901:another");
}

#[test]
fn a_resumed_stream_goes_on_in_the_same_boot() {
    let mut world = World::new();
    let position = Position {
        at_us: START + UP,
        time_us: Some(UP),
        seq: Some(41),
    };
    world.stream = Stream::resume(position);
    world.now += 5 * SECOND;
    world.record(41).record(42).record(44).wait(HOLE_MICROS);
    assert_eq!(world.told(), "42:r42 gap(43-43) 44:r44");
}

#[test]
fn basic_text_is_lines_with_times() {
    let mut world = World::new();
    world.take("[  100.000001] one\n[  100.000002][  T42] two\n");
    assert_eq!(world.told(), "boot(?) one two");
    world
        .take("[  100.000003] thr")
        .take("ee\n")
        .take("no time\n");
    assert_eq!(world.told(), "three no time");
    // The end of a line was lost; the next one is not its end.
    world
        .take("[  100.000004] cut")
        .take("[  100.000005] next\n");
    assert_eq!(world.told(), "cut next");
    world.take("half");
    assert!(world.stream.due().is_some());
    world.wait(HOLE_MICROS);
    assert_eq!(world.told(), "half");
    world.now += 3 * SECOND;
    world.take("[    0.000000] Linux version 6\n");
    assert_eq!(world.told(), "boot(?) Linux version 6");
    world.take("Linux version 5\n");
    assert_eq!(world.told(), "boot(?) Linux version 5");
}

#[test]
fn what_is_malformed_is_kept_and_counted() {
    let mut world = World::new();
    world.take("").take("2048,1,2,-;x").take([0_u8, 255]);
    assert_eq!(world.told(), "boot(?) raw(0) raw(12) raw(2)");
    assert_eq!(world.told.counts.malformed, 3);
}

#[test]
fn what_waits_is_bounded_and_never_lost() {
    let mut world = World::new();
    world.record(0);
    for seq in 0..2000 {
        world.record(2 * seq + 2);
        let held = world
            .stream
            .held
            .as_ref()
            .map_or(0, |held| held.records.len());
        assert!(held <= HELD_RECORDS_MAX);
    }
    world.wait(HOLE_MICROS);
    assert_eq!(world.told.counts.records, 2001);
    // Without any room, everything goes through at once.
    let mut world = World::new();
    world.room = Room::new(0);
    world
        .record(1)
        .record(3)
        .take("6,4,9,-,ncfrag=0/8;abcd")
        .take("[    1.0")
        .record(5);
    assert_eq!(
        world.told(),
        "boot(?) 1:r1 gap(2-2) 3:r3 raw(23) [    1.0 gap(4-4) 5:r5"
    );
}

/// Any order, loss and duplication: each record that arrived is given on once, each that did not is
/// in a gap, and the room is whole again.
#[test]
fn whatever_the_network_does_everything_is_accounted_for() {
    let mut random = 7_u64;
    let mut draw = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) % below
    };
    for _ in 0..200 {
        let mut world = World::new();
        let mut sent: Vec<(u64, String)> = Vec::new();
        for seq in 0..60 {
            let body = format!(
                "r{seq}-{}\n",
                "y".repeat(usize::try_from(draw(40)).unwrap())
            );
            let size = if draw(3) == 0 { 11 } else { 1000 };
            for part in fragments(seq, UP, &body, size) {
                sent.push((seq, part));
            }
        }
        for index in 0..sent.len() {
            let other = index + usize::try_from(draw(6)).unwrap();
            if other < sent.len() {
                sent.swap(index, other);
            }
        }
        let mut arrived = std::collections::BTreeSet::new();
        world.record(0);
        for (seq, part) in &sent {
            for _ in 0..[0, 1, 1, 1, 1, 2][usize::try_from(draw(6)).unwrap()] {
                arrived.insert(*seq);
                world.take(part);
            }
            if draw(20) == 0 {
                world.wait(HOLE_MICROS);
            }
        }
        world.stream.finish(&mut world.room, &mut world.told);
        let Counts {
            records,
            gaps,
            late,
            ..
        } = world.told.counts;
        arrived.insert(0);
        let through = *arrived.last().unwrap() + 1;
        let given = u64::try_from(arrived.len()).unwrap();
        assert_eq!(records, given, "{:?}", world.told.words);
        assert_eq!(gaps - late, through - given, "{:?}", world.told.words);
        assert_eq!(world.room.left, 1 << 20);
    }
}
