"""All assignments into tinygrad 0.14.0: the device CPU gets another compiler, loops and threads.

Importing this module applies them. A patch can go when tinygrad does what the patch's comment says.
"""

import functools
import platform

import tinygrad.codegen.opt.heuristic as heuristic
import tinygrad.engine.realize as realize
import tinygrad.schedule.memory as memory
from tinygrad import UOp
from tinygrad.helpers import getenv
from tinygrad.renderer import cstyle
from tinygrad.runtime.support.hcq2 import HCQ2Compiled
from tinygrad.uop.ops import Ops

from backend.arrays import CPUAllocator
from backend.cpu.compiler import CPUCompiler, CPUProgram, ops_cpu
from backend.cpu.processes import CompilingBar, compiling_processes
from backend.cpu.threads import CPUGraph, plain_loops, set_core_counts

# cached: tinygrad makes a renderer for each kernel that it sends to another process
compiler_for = functools.cache(CPUCompiler)


class ClangRenderer(cstyle.ClangRenderer):
    """Finds any clang; tinygrad's renderer calls the program in CC, or fails without one."""

    def __init__(self, target):
        super().__init__(target)
        self.compiler = compiler_for(tuple(target.arch.split(",")))


class CPUDevice(ops_cpu.CPUDevice):
    """Runs the kernels of a jit on all cores, by threads.c; tinygrad's device runs them on one."""

    def __init__(self, device: str = ""):
        if getenv("HCQ2"):
            super().__init__(device)
        else:  # tinygrad's device compiles the kernels of HCQ2's queue even so: 0.3 s
            self.workers = []
            machine = platform.machine().lower()
            machine = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
            renderers = [ClangRenderer, ops_cpu.CPULLVMRenderer]
            allocator, arch = CPUAllocator(self), f"{machine},native"
            HCQ2Compiled.__init__(self, device, allocator, renderers, CPUProgram, arch=arch)
        self.graph = CPUGraph


def contiguous_view(view: UOp) -> tuple[UOp, int] | None:
    """The buffer and the offset of a view. For views of a jit's planned memory, tinygrad 0.14.0
    applies all rules of its symbolic algebra, 0.2 s a start; here the offset is read off."""
    if view.op is Ops.BITCAST and view.src[0].op is Ops.SHRINK and view.device == "CPU":
        part, [(start, _), *axes] = view.src[0], view.src[0].marg
        if part.src[0].op is Ops.BUFFER and isinstance(start, int) and not axes:
            return part.src[0], start
    return contiguous_view_by_rules(view)


def buffers_of(argument: UOp) -> list[UOp]:
    """The buffers of a kernel's argument. tinygrad 0.14.0 overlooks the buffer of a view, and plans
    its memory for other buffers as well while the kernel still reads it."""
    return buffers_of_whole(argument.base)


buffers_of_whole, memory._collect_bufs = memory._collect_bufs, buffers_of
contiguous_view_by_rules, UOp.contiguous_view = UOp.contiguous_view, contiguous_view
heuristic.hand_coded_optimizations = plain_loops  # tinygrad's heuristic unrolls loops
ops_cpu.ClangRenderer, ops_cpu.CPUDevice = ClangRenderer, CPUDevice
# processes of tinygrad's pool import everything again; its bar needs DEBUG=1, and stays
realize.get_worker_pool, realize.tqdm = compiling_processes, CompilingBar
set_core_counts()
