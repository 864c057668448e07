//! Decimal numbers, read and written as bytes.

/// The value of 1 to 20 decimal digits that fit into 64 bits.
pub(crate) fn parse(digits: &[u8]) -> Option<u64> {
    if !(1..=20).contains(&digits.len()) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, byte| {
        let digit = byte.wrapping_sub(b'0');
        (digit < 10)
            .then(|| value.checked_mul(10)?.checked_add(u64::from(digit)))
            .flatten()
    })
}

/// Appends `value` in decimal.
pub(crate) fn write(out: &mut Vec<u8>, value: u64) {
    let mut digits = [0; 20];
    let (mut at, mut rest) = (digits.len(), value);
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + low_digit(rest);
        at -= 1;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// Appends `value` with at least `width` digits.
pub(crate) fn write_padded(out: &mut Vec<u8>, value: u64, width: u32) {
    for place in (1..width).rev() {
        if value < 10_u64.pow(place) {
            out.push(b'0');
        }
    }
    write(out, value);
}

fn low_digit(value: u64) -> u8 {
    (value % 10) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_back_as_they_were_written() {
        for value in [0, 7, 10, 99, 12_345, u64::MAX] {
            let mut text = Vec::new();
            write(&mut text, value);
            assert_eq!(text, value.to_string().into_bytes());
            assert_eq!(parse(&text), Some(value));
        }
        let mut text = Vec::new();
        write_padded(&mut text, 42, 6);
        assert_eq!(text, b"000042");
    }

    #[test]
    fn what_is_no_number_is_none() {
        for text in [
            "",
            "-1",
            "1a",
            "18446744073709551616",
            "000000000000000000001",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }
}
