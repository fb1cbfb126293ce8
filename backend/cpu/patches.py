"""All assignments into tinygrad 0.14.0: the device CPU gets another compiler, loops and threads.

Importing this module applies them. A patch can go when tinygrad does what the patch's comment says.
"""

import functools
import platform

import tinygrad.codegen.opt.heuristic as heuristic
import tinygrad.engine.realize as realize
from tinygrad.helpers import getenv
from tinygrad.renderer import cstyle
from tinygrad.runtime.support.hcq2 import HCQ2Compiled

from backend.arrays import CPUAllocator
from backend.cpu.compiler import CPUCompiler, CPUProgram, ops_cpu
from backend.cpu.processes import CompilingBar, compiling_processes
from backend.cpu.threads import CPUGraph, count_cores, plain_loops

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


heuristic.hand_coded_optimizations = plain_loops  # tinygrad's heuristic unrolls loops
ops_cpu.ClangRenderer, ops_cpu.CPUDevice = ClangRenderer, CPUDevice
# processes of tinygrad's pool import everything again; its bar needs DEBUG=1, and stays
realize.get_worker_pool, realize.tqdm = compiling_processes, CompilingBar
count_cores()  # tinygrad overlooks some containers' limits
