//! Civil time in UTC with microseconds: `2026-11-24T00:30:12.123456Z`.

use crate::number;

/// Bytes of such a time.
pub(crate) const TIME_BYTES: usize = 27;
const DAY_SECONDS: u64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01. Years that begin in March have the leap day last.
const EPOCH_DAYS: u64 = 719_468;
const ERA_DAYS: u64 = 146_097;

/// Appends `micros` since 1970.
pub fn utc(out: &mut Vec<u8>, micros: u64) {
    seconds(out, micros / 1_000_000);
    out.push(b'.');
    number::write_padded(out, micros % 1_000_000, 6);
    out.push(b'Z');
}

/// Appends `2026-11-24T00:30:12`.
pub(crate) fn seconds(out: &mut Vec<u8>, seconds: u64) {
    let (days, rest) = (seconds / DAY_SECONDS + EPOCH_DAYS, seconds % DAY_SECONDS);
    let (era, day_of_era) = (days / ERA_DAYS, days % ERA_DAYS);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    number::write_padded(out, year, 4);
    for (mark, value) in [
        (b'-', month),
        (b'-', day),
        (b'T', rest / 3600),
        (b':', rest / 60 % 60),
        (b':', rest % 60),
    ] {
        out.push(mark);
        number::write_padded(out, value, 2);
    }
}

/// Microseconds since 1970 of a time that [`utc`] wrote.
#[must_use]
pub fn from_utc(text: &[u8]) -> Option<u64> {
    let text: &[u8; TIME_BYTES] = text.try_into().ok()?;
    let marks = [
        (4, b'-'),
        (7, b'-'),
        (10, b'T'),
        (13, b':'),
        (16, b':'),
        (19, b'.'),
        (26, b'Z'),
    ];
    if marks.iter().any(|&(at, mark)| text[at] != mark) {
        return None;
    }
    let field = |from: usize, to: usize| number::parse(&text[from..to]);
    let (year, month, day) = (field(0, 4)?, field(5, 7)?, field(8, 10)?);
    let (hour, minute, second) = (field(11, 13)?, field(14, 16)?, field(17, 19)?);
    let legal = (1..=12).contains(&month) && (1..=31).contains(&day);
    if !legal || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let year = if month <= 2 {
        year.checked_sub(1)?
    } else {
        year
    };
    let from_march = (month + 9) % 12;
    let day_of_year = (153 * from_march + 2) / 5 + day - 1;
    let year_of_era = year % 400;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (year / 400 * ERA_DAYS + day_of_era).checked_sub(EPOCH_DAYS)?;
    let seconds = days * DAY_SECONDS + hour * 3600 + minute * 60 + second;
    Some(seconds * 1_000_000 + field(20, 26)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_back_as_they_were_written() {
        let check = |micros, expected: &str| {
            let mut text = Vec::new();
            utc(&mut text, micros);
            assert_eq!(text, expected.as_bytes());
            assert_eq!(from_utc(&text), Some(micros));
        };
        check(0, "1970-01-01T00:00:00.000000Z");
        check(951_827_696_000_001, "2000-02-29T12:34:56.000001Z");
        check(951_868_800_999_999, "2000-03-01T00:00:00.999999Z");
        check(1_795_543_320_000_000, "2026-11-24T18:02:00.000000Z");
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "2026-11-24 18:02:00.000000Z",
            "2026-13-24T18:02:00.000000Z",
            "1960-11-24T18:02:00.000000Z",
        ] {
            assert_eq!(from_utc(text.as_bytes()), None, "{text}");
        }
    }
}
