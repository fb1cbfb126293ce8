"""All that is assigned into tinygrad, 0.14.0: its device CPU gets our compiler, loops and threads.

Importing this module is enough. A patch can go as soon as tinygrad does what the patch says.
"""

import contextlib
import functools
import mmap
import platform
import sys

import numpy as np
import tinygrad.codegen.opt.heuristic as heuristic
import tinygrad.engine.realize as realize
from tinygrad.device import BufferSpec
from tinygrad.helpers import getenv
from tinygrad.renderer import cstyle
from tinygrad.runtime.support.hcq import HCQBuffer, MMIOInterface
from tinygrad.runtime.support.hcq2 import HCQ2Compiled

from backend.cpu.compiler import CPUCompiler, CPUProgram, ops_cpu
from backend.cpu.processes import Progress, compiling_processes
from backend.cpu.threads import CPUGraph, count_cores, plain_loops

MIN_HUGE_BYTES = 1 << 18
# one a process: tinygrad makes a renderer for each kernel that it sends to another
compiler_for = functools.cache(CPUCompiler)


class ClangRenderer(cstyle.ClangRenderer):
    """Compiles with any clang; tinygrad's calls the program in CC, or fails where there is none."""

    def __init__(self, target):
        super().__init__(target)
        self.compiler = compiler_for(tuple(target.arch.split(",")))


class HugePages:
    """Memory for many arrays in pages of 2 MB: read up to twice as fast as in those of 4 kB, at
    whose ends a processor stops to read ahead. It is freed when the last of its arrays is."""

    SIZE, PAGE = 32 << 20, 2 << 20

    def __init__(self):
        self.left = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> np.ndarray:
        n_aligned = -(-n_bytes // 64) * 64
        if n_aligned > len(self.left):
            memory = mmap.mmap(
                -1, max(n_aligned, self.SIZE) + self.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            with contextlib.suppress(OSError):  # a Linux without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.left = np.frombuffer(memory, np.uint8)
            self.left = self.left[-self.left.ctypes.data % self.PAGE :]
        taken, self.left = self.left[:n_bytes], self.left[n_aligned:]
        return taken


huge_pages = HugePages()


class CPUAllocator(ops_cpu.CPUAllocator):
    """Takes large buffers from huge pages; tinygrad maps each by itself, in pages of 4 kB."""

    def _alloc(self, size: int, options: BufferSpec) -> HCQBuffer:
        if options.external_ptr is not None or size < MIN_HUGE_BYTES or sys.platform != "linux":
            return super()._alloc(size, options)
        memory = huge_pages.take(size)
        address, view = memory.ctypes.data, MMIOInterface(memory.ctypes.data, size, fmt="B")
        return HCQBuffer(address, size, meta=memory, view=view, owner=self.dev)


class CPUDevice(ops_cpu.CPUDevice):
    """Runs the kernels of a jit on all cores, by threads.c; tinygrad runs them on one."""

    def __init__(self, device: str = ""):
        if getenv("HCQ2"):
            super().__init__(device)
        else:  # tinygrad's own compiles the kernels of HCQ2's queue in any case: 0.3 s
            self.workers = []
            machine = platform.machine().lower()
            machine = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
            renderers = [ClangRenderer, ops_cpu.CPULLVMRenderer]
            allocator, arch = CPUAllocator(self), f"{machine},native"
            HCQ2Compiled.__init__(self, device, allocator, renderers, CPUProgram, arch=arch)
        self.graph = CPUGraph


heuristic.hand_coded_optimizations = plain_loops  # tinygrad's unroll loops
ops_cpu.ClangRenderer, ops_cpu.CPUDevice = ClangRenderer, CPUDevice
# tinygrad's pool starts processes that import all anew, and its bar stays on the terminal
realize.get_worker_pool, realize.tqdm = compiling_processes, Progress
count_cores()  # tinygrad's count knows only some containers
