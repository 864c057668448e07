//! The small parts: VMCOREINFO text, and sets of pages against a plain model.

use std::collections::BTreeSet;

use super::{Random, ram};
use crate::ram::{PageSet, RamMap};
use crate::{Pfn, Vmcoreinfo};

#[test]
fn vmcoreinfo_lines() {
    let text = b"OSRELEASE=6.1.0-56-amd64\nPAGESIZE=4096\nSYMBOL(_stext)=ffffffff88c00000\n\
        NUMBER(phys_base)=-16777216\nNUMBER(pgtable_l5_enabled)=1\nKERNELOFFSET=7c00000\n\
        NUMBER(VA_BITS)=0x30\nEMPTY=\nCUT=y";
    let info = Vmcoreinfo::new(text);
    assert_eq!(info.osrelease(), Some("6.1.0-56-amd64"));
    assert_eq!(info.page_size(), Some(4096));
    assert_eq!(info.symbol("_stext"), Some(0xffff_ffff_88c0_0000));
    assert_eq!(info.number("VA_BITS"), Some(0x30));
    assert_eq!(info.phys_base(), Some(0xffff_ffff_ff00_0000));
    assert_eq!(info.five_level_paging(), Some(true));
    assert_eq!(info.kernel_offset(), Some(0x7c0_0000));
    assert_eq!(info.get("EMPTY"), Some(""));
    assert_eq!(info.get("CUT"), Some("y"));
    assert_eq!(info.get("OSREL"), None);
    assert_eq!(info.symbol("absent"), None);
}

#[test]
fn vmcoreinfo_of_any_bytes() {
    let mut random = Random(3);
    for _ in 0..2000 {
        let alphabet = b"OSRELEASE=\n\xff(0-9x";
        let text: Vec<u8> = (0..random.below(60))
            .map(|_| alphabet[usize::try_from(random.below(alphabet.len() as u64)).unwrap()])
            .collect();
        let info = Vmcoreinfo::new(&text);
        // Each answer is some value or none; what matters is that there is one.
        assert!(
            info.osrelease()
                .is_none_or(|release| !release.contains('\n'))
        );
        assert!(info.page_size().is_none() && info.symbol("S").is_none());
        assert!(info.kernel_offset().is_none() && info.number("(").is_none());
    }
}

#[test]
fn page_sets_against_a_model() {
    for seed in 1..40 {
        let mut random = Random(seed);
        let first = random.below(100);
        let ranges = ram(&[
            (first, 1 + random.below(200)),
            (1000, 1 + random.below(200)),
        ]);
        let map = RamMap::new(&ranges).unwrap();
        let pfns: Vec<_> = ranges
            .iter()
            .flat_map(|range| range.first.0..range.end())
            .collect();
        let (mut set, mut model) = (PageSet::new(map.pages()), BTreeSet::new());
        for _ in 0..random.below(500) {
            let index = usize::try_from(random.below(pfns.len() as u64)).unwrap();
            assert_eq!(set.insert(index), model.insert(index));
        }
        for (index, &pfn) in pfns.iter().enumerate() {
            assert_eq!(map.index(Pfn(pfn)), Some(index));
            assert_eq!(set.contains(index), model.contains(&index));
        }
        assert_eq!(map.index(Pfn(999)), None);
        for inside in [true, false] {
            let listed: Vec<_> = map
                .runs(&set, inside)
                .flat_map(|(index, run)| (index..).zip(run.first.0..run.end()))
                .collect();
            let wanted: Vec<_> = (0..pfns.len())
                .filter(|index| model.contains(index) == inside)
                .map(|index| (index, pfns[index]))
                .collect();
            assert_eq!(listed, wanted);
        }
    }
}
