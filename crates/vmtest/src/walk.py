"""Reads all of a dump that a debugger of the kernel needs: every task's stack, the slab caches, modules, page tables, per-CPU and
vmalloc memory, the log. One JSON object: for each of these how much was found, a digest of it, and how often memory was missing.

Arguments: the dump, the kernel with symbols, and any modules with symbols.
"""
import hashlib
import json
import sys

import drgn
from drgn import FaultError
from drgn.helpers.linux.cpumask import for_each_possible_cpu
from drgn.helpers.linux.mm import for_each_vmap_area
from drgn.helpers.linux.module import for_each_module
from drgn.helpers.linux.percpu import per_cpu_ptr
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.slab import for_each_slab_cache, slab_cache_for_each_allocated_object

PAGE = 4096
# THREAD_SIZE of x86-64.
STACK = 4 * PAGE
# Where the kernel's image is linked to.
IMAGE = 0xFFFFFFFF80000000
dump, *symbols = sys.argv[1:]
program = drgn.Program()
program.set_core_dump(dump)
try:
    program.load_debug_info(symbols)
except drgn.MissingDebugInfoError as error:
    print(f"drgn: {error}", file=sys.stderr)


class Section:
    """What was found of one thing."""

    def __init__(self):
        self.count, self.missing, self.digest = 0, 0, hashlib.sha256()

    def add(self, data):
        self.count += 1
        self.digest.update(data if isinstance(data, bytes) else repr(data).encode())

    def read(self, address, size, physical=False):
        try:
            data = program.read(address, size, physical)
        except FaultError:
            self.missing += 1
            return b""
        self.add(data)
        return data

    def result(self):
        return {"count": self.count, "missing": self.missing, "digest": self.digest.hexdigest()[:16]}


def tasks(section):
    for task in for_each_task(program):
        section.add((task.pid.value_(), task.comm.string_()))
        section.read(task.stack.value_(), STACK)
        try:
            section.add([(frame.name, frame.pc) for frame in program.stack_trace(task)])
        except FaultError:
            section.missing += 1
        except ValueError as error:
            section.add(str(error))


def slabs(section):
    for cache in for_each_slab_cache(program):
        section.add(cache.name.string_())
        size = cache.object_size.value_()
        try:
            for found in slab_cache_for_each_allocated_object(cache, "char"):
                section.read(found.value_(), size)
        except FaultError:
            section.missing += 1


def modules(section):
    for module in for_each_module(program):
        section.add(module.name.string_())
        try:
            parts = [(memory.base.value_(), memory.size.value_()) for memory in module.mem]
        except AttributeError:
            # Before 6.4.
            parts = [(module.core_layout.base.value_(), module.core_layout.size.value_())]
        for base, size in parts:
            if size:
                section.read(base, size)


def page_tables(section):
    info = dict(line.split("=", 1) for line in program["VMCOREINFO"].string_().decode().splitlines() if "=" in line)
    levels = 4 + int(info["NUMBER(pgtable_l5_enabled)"])
    # The kernel's own highest table lies in its image, all others in the direct map.
    image = IMAGE - int(info["NUMBER(phys_base)"])
    seen = set()

    def walk(table, level):
        if table in seen:
            return
        seen.add(table)
        data = section.read(table, PAGE, True)
        for at in range(0, len(data), 8):
            entry = int.from_bytes(data[at : at + 8], "little")
            if level > 1 and entry & 1 and not entry & 0x80:
                walk(entry & 0xFFFFFFFFFF000, level - 1)

    roots = {program["init_mm"].pgd.value_()}
    for task in for_each_task(program):
        for mm in (task.mm, task.active_mm):
            if mm:
                roots.add(mm.pgd.value_())
    for root in sorted(roots):
        walk(root - (image if root >= IMAGE else program["page_offset_base"].value_()), levels)


def per_cpu(section):
    size = program["pcpu_unit_size"].value_()
    for cpu in for_each_possible_cpu(program):
        section.read(program["__per_cpu_offset"][cpu].value_(), size)


def vmalloc(section):
    for area in for_each_vmap_area(program):
        vm = area.vm
        if vm and vm.pages:
            for index in range(vm.nr_pages.value_()):
                section.read(area.va_start.value_() + index * PAGE, PAGE)


def log(section):
    for line in get_dmesg(program).splitlines():
        section.add(line)


found = {}
for work in (tasks, slabs, modules, page_tables, per_cpu, vmalloc, log):
    section = Section()
    work(section)
    found[work.__name__] = section.result()
print(json.dumps(found))
