//! The name under which equal crashes meet.
//!
//! Two levels. EXACT: kind, topic, culprit, module and the next frames that count. FAMILY: group
//! of kinds and culprit, because one bug is a KASAN report on one kernel and a page fault on the
//! next. Both are over names only: no address, offset, line number, task or build is in them, and
//! no frame that the unwinder doubts. What has neither a function nor a text of its own has no
//! signature: a hash of nothing would make unrelated crashes equal.
//!
//! A signature begins with its version. A change of the rules is a new version; old ones are
//! never computed again.

use std::fmt;

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_128;

use crate::anatomy::Anatomy;
use crate::class::Class;
use crate::frame::Frame;
use crate::title;

/// The version of these rules.
pub const VERSION: u32 = 1;

/// Both levels of a signature, and what they were computed from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Signature {
    /// EXACT: `s1:` and 16 hexadecimal digits.
    pub signature: String,
    /// FAMILY: `f1:` and 16 hexadecimal digits.
    pub family: String,
    /// What EXACT is the hash of.
    pub signature_of: String,
    /// What FAMILY is the hash of.
    pub family_of: String,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}), family {}",
            self.signature, self.signature_of, self.family
        )
    }
}

pub(crate) fn of(
    class: Class,
    anatomy: &Anatomy,
    culprit: Option<&Frame>,
    next: &[Frame],
) -> Option<Signature> {
    let topic = title::topic(class, anatomy);
    let (exact, family) = match culprit {
        Some(culprit) => {
            let name = family_name(culprit, anatomy);
            let mut exact = format!("{class:?}|{topic}|{}", title::shown(culprit));
            if let Some(module) = &culprit.module {
                exact.push_str(&format!("[{module}]"));
            }
            for frame in next {
                exact.push('|');
                exact.push_str(frame.function());
            }
            let family = match class {
                Class::Panic => format!("text|{}", title::of(class, anatomy, None)),
                _ => format!("{}|{name}", group(class, &topic)),
            };
            (exact, family)
        }
        None if title::identifies(class, anatomy) => {
            let text = title::of(class, anatomy, None);
            (format!("{class:?}|{text}"), format!("text|{text}"))
        }
        None => return None,
    };
    Some(Signature {
        signature: hashed('s', &exact),
        family: hashed('f', &family),
        signature_of: exact,
        family_of: family,
    })
}

fn hashed(level: char, text: &str) -> String {
    let hash = xxh3_128(text.as_bytes()) >> 64;
    format!("{level}{VERSION}:{hash:016x}")
}

/// Kinds that one bug may show itself as.
fn group(class: Class, topic: &str) -> String {
    let group = match class {
        Class::Kasan if topic.contains("free") && !topic.contains("use-after-free") => "bad-free",
        Class::Kasan
        | Class::Kmsan
        | Class::Kfence
        | Class::NullDereference
        | Class::PageFault
        | Class::GeneralProtection => "bad-access",
        Class::Trap if is_abort(topic) => "bad-access",
        Class::RcuStall | Class::SoftLockup | Class::HardLockup => "stall",
        Class::HungTask => "hang",
        Class::StackOverflow | Class::Atomic | Class::Lock | Class::Trap | Class::Kernel => {
            return format!("{class:?}|{topic}");
        }
        other => return format!("{other:?}"),
    };
    group.to_owned()
}

/// Exceptions that are bad accesses under another name.
fn is_abort(topic: &str) -> bool {
    ["Internal error", "bad access", "stack segment"]
        .iter()
        .any(|abort| topic.starts_with(abort))
}

/// The culprit's name as FAMILY sees it: flavours of one wait are one, both sides of a race are a
/// pair without order.
fn family_name(culprit: &Frame, anatomy: &Anatomy) -> String {
    let name = title::shown(culprit);
    if let Some(second) = &anatomy.second {
        let second = second.function().to_owned();
        return if second < name {
            format!("{second}|{name}")
        } else {
            format!("{name}|{second}")
        };
    }
    let flavours: [(&str, &[&str]); 2] = [
        (
            "synchronize_rcu",
            &[
                "synchronize_rcu_expedited",
                "__synchronize_srcu",
                "synchronize_srcu",
                "synchronize_srcu_expedited",
                "synchronize_sched",
                "synchronize_sched_expedited",
                "synchronize_rcu_normal",
                "synchronize_net",
                "_synchronize_rcu_expedited",
                "__synchronize_rcu",
                "rcu_barrier",
                "synchronize_rcu_mult",
            ],
        ),
        (
            "smp_call_function",
            &[
                "smp_call_function_many",
                "smp_call_function_many_cond",
                "smp_call_function_single",
                "generic_exec_single",
            ],
        ),
    ];
    flavours
        .iter()
        .find(|(_, names)| names.contains(&name.as_str()))
        .map_or(name, |(one, _)| (*one).to_owned())
}
