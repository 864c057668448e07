"""What drgn sees in a vmcore, as one JSON object: tasks, the crashed thread's stack, every CPU's registers, the log.

Arguments: the vmcore, the kernel with symbols, and any modules with symbols.
"""
import json
import sys

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.sched import cpu_curr

vmcore, *symbols = sys.argv[1:]
program = drgn.Program()
program.set_core_dump(vmcore)
try:
    program.load_debug_info(symbols)
except drgn.MissingDebugInfoError as error:
    print(f"drgn: {error}", file=sys.stderr)


def frames(trace):
    return [frame.name for frame in trace]


cpus = []
for cpu in for_each_online_cpu(program):
    try:
        trace = program.stack_trace(cpu_curr(program, cpu))
        registers = trace[0].registers()
        cpus.append({"cpu": cpu, "frames": frames(trace), "rip": registers.get("rip", 0), "rsp": registers.get("rsp", 0)})
    except (ValueError, LookupError, drgn.FaultError) as error:
        cpus.append({"cpu": cpu, "error": str(error)})

def stack(task):
    try:
        return frames(program.stack_trace(task))
    except (ValueError, LookupError, drgn.FaultError):
        return []


crashed = program.crashed_thread()
print(
    json.dumps(
        {
            "tasks": [[task.pid.value_(), task.comm.string_().decode()] for task in for_each_task(program)],
            "crashed": frames(crashed.stack_trace()),
            "all": sorted({name for task in for_each_task(program) for name in stack(task) if name}),
            "cpus": cpus,
            "log": get_dmesg(program).decode(errors="replace"),
        }
    )
)
