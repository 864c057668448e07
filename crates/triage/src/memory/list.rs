//! The kernel's doubly linked lists.

use super::image::{Image, Unread};

/// The places of a list's links, from the one behind the head on. Follows the list at most `limit`
/// steps; where it breaks or does not end, the second part says why.
pub(crate) fn walk(image: &mut Image<'_>, head: u64, limit: usize) -> (Vec<u64>, Option<Unread>) {
    let mut places = Vec::new();
    let mut at = head;
    loop {
        match image.u64(at) {
            Ok(next) if next == head => return (places, None),
            Ok(_) if places.len() >= limit => {
                let what = format!("the list at {head:#x} has more than {limit} entries");
                return (places, Some(Unread::Strange(what)));
            }
            Ok(next) => at = next,
            Err(error) => {
                // What led here is not readable, so it is no element.
                places.pop();
                return (places, Some(error));
            }
        }
        places.push(at);
    }
}
