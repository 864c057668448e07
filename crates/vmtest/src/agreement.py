"""Every task's and CPU's backtrace as drgn has it, as one JSON object.

Arguments: the vmcore, the kernel with symbols, and any modules with symbols. Standard input: names of
symbols, as a JSON list; the answer says where drgn's own table has each.

A frame is [address, name, whether debug information names it]; inlined frames and those of user space
are left out.
"""
import json
import sys

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import cpu_curr

vmcore, *files = sys.argv[1:]
program = drgn.Program()
program.set_core_dump(vmcore)
try:
    program.load_debug_info(files)
except drgn.MissingDebugInfoError as error:
    print(f"drgn: {error}", file=sys.stderr)


def frames(task):
    try:
        trace = program.stack_trace(task)
    except ValueError:
        return None
    found = []
    for frame in trace:
        if frame.is_inline:
            continue
        try:
            address = frame.pc
        except LookupError:
            break
        if address >> 63:
            found.append([address, frame.name, frame.function_name is not None])
    return found


print(
    json.dumps(
        {
            "tasks": [
                {"pid": task.pid.value_(), "name": task.comm.string_().decode(), "frames": frames(task)}
                for task in for_each_task(program)
            ],
            "cpus": [{"cpu": cpu, "frames": frames(cpu_curr(program, cpu))} for cpu in for_each_online_cpu(program)],
            "symbols": {name: [symbol.address for symbol in program.symbols(name)] for name in json.load(sys.stdin)},
        }
    )
)
