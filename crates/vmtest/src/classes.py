"""What each page of a full dump is, told from its struct page without our module's code.

Arguments: the dump, the kernel with symbols, the file to write, and ranges of pages FIRST:COUNT. The file gets one byte a page, in
the order of the ranges: an index into the list of names that standard output gets.
"""
import json
import struct
import sys

import drgn

NAMES = [
    "other", "free", "cache", "private cache", "anonymous", "hugetlb", "slab", "page table", "reserved", "poisoned", "offline",
    "no sense",
]
OTHER, FREE, CACHE, PRIVATE, ANON, HUGETLB, SLAB, TABLE, RESERVED, POISONED, OFFLINE, NONSENSE = range(len(NAMES))

dump, vmlinux, out, *ranges = sys.argv[1:]
program = drgn.Program()
program.set_core_dump(dump)
program.load_debug_info([vmlinux])

info = dict(
    line.split("=", 1) for line in program["VMCOREINFO"].string_().decode().splitlines() if line.startswith("NUMBER(")
)
number = lambda name: int(info[f"NUMBER({name})"])
flag = lambda name: 1 << program.constant(name).value_()
vmemmap = program["vmemmap_base"].value_()
page_type = program.type("struct page")
size = drgn.sizeof(page_type)
at = lambda name: drgn.offsetof(page_type, name)
HEAD, LRU, PRIVATE_FLAG, SWAPCACHE, SWAPBACKED = map(flag, ["PG_head", "PG_lru", "PG_private", "PG_swapcache", "PG_swapbacked"])
RESERVED_FLAG, HWPOISON = flag("PG_reserved"), flag("PG_hwpoison")
BUDDY, OFFLINE_TYPE = (number(f"PAGE_{name}_MAPCOUNT_VALUE") & 0xFFFFFFFF for name in ["BUDDY", "OFFLINE"])
ORDER_MAX = len(program["contig_page_data"].node_zones[0].free_area) - 1 if "contig_page_data" in program else 10
try:
    # Since 6.10 slabs and hugetlb, since 6.11 all types are numbers in the highest byte of page_type.
    SLAB_TYPE, HUGETLB_TYPE, TABLE_TYPE = (
        program.constant(f"PGTY_{name}").value_() << 24 for name in ["slab", "hugetlb", "table"]
    )
    of_type = lambda word, value: word >> 24 == value >> 24
    is_slab = lambda flags, word: of_type(word, SLAB_TYPE)
    is_hugetlb = lambda head: of_type(type_of(head), HUGETLB_TYPE)
except LookupError:
    # Before, each type was a bit that is cleared in page_type, and slabs had a flag.
    TABLE_TYPE = ~0x200 & 0xFFFFFFFF
    of_type = lambda word, value: word & (0xF0000000 | ~value & 0xFFFFFFFF) == 0xF0000000
    SLAB_FLAG = flag("PG_slab")
    is_slab = lambda flags, word: flags & SLAB_FLAG
    is_hugetlb = lambda head: word64(head + 1, 0) & HEAD == 0 and pages.get(head + 1) is not None and (
        pages[head + 1][at("compound_dtor")] == number("HUGETLB_PAGE_DTOR")
    )

pages = {}
for part in ranges:
    first, count = map(int, part.split(":"))
    array = program.read(vmemmap + first * size, count * size)
    for index in range(count):
        pages[first + index] = array[index * size : (index + 1) * size]


def word64(pfn, offset):
    return struct.unpack_from("<Q", pages[pfn], offset)[0]


def type_of(pfn):
    return struct.unpack_from("<I", pages[pfn], at("page_type"))[0]


def kind_of_head(pfn):
    flags, word, mapping = word64(pfn, 0), type_of(pfn), word64(pfn, at("mapping"))
    if flags & RESERVED_FLAG:
        return RESERVED
    if is_slab(flags, word):
        return SLAB
    if of_type(word, TABLE_TYPE):
        return TABLE
    if mapping & 1:
        return ANON
    if flags & HEAD and is_hugetlb(pfn):
        return HUGETLB
    if flags & LRU or flags & SWAPCACHE and flags & SWAPBACKED:
        return PRIVATE if flags & PRIVATE_FLAG else CACHE
    return OTHER


def kind(pfn):
    flags, word = word64(pfn, 0), type_of(pfn)
    if flags & HWPOISON:
        return POISONED
    if of_type(word, OFFLINE_TYPE):
        return OFFLINE
    head = word64(pfn, at("compound_head"))
    if head & 1:
        head, rest = divmod(head - 1 - vmemmap, size)
        return kind_of_head(head) if not rest and head in pages else NONSENSE
    return kind_of_head(pfn)


free = set()
for pfn in pages:
    if of_type(type_of(pfn), BUDDY):
        order = word64(pfn, at("private"))
        if order <= ORDER_MAX:
            free.update(range(pfn, pfn + (1 << order)))

with open(out, "wb") as file:
    for part in ranges:
        first, count = map(int, part.split(":"))
        file.write(bytes(FREE if pfn in free else kind(pfn) for pfn in range(first, first + count)))
print(json.dumps(NAMES))
