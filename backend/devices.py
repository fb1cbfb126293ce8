"""The choice of the backend: the variable DEV, and what opens on this machine."""

import os
import sys

from tinygrad import Context, Device
from tinygrad.helpers import DEV

from backend.errors import UserError

BACKENDS = ("CPU", "CUDA", "NV", "METAL", "AMD", "CL", "WEBGPU")


def choose() -> None:
    """Leaves DEV to the user, and the choice without it to tinygrad where there may be a GPU.

    Else tinygrad would take an OpenCL that runs on the CPU (pocl) before its own, faster, backend,
    and spend half a second on looking for GPUs.
    """
    gpu_drivers = ("/dev/kfd", "/dev/nvidiactl", "/dev/dxg")
    has_gpu = sys.platform == "darwin" or any(map(os.path.exists, gpu_drivers))
    names_one = any(os.environ.get(name) == "1" for name in BACKENDS)  # see `in_use`
    if not (DEV.device or has_gpu or names_one):
        DEV.value = os.environ["DEV"] = "CPU"


def default_to_cpu() -> Context:
    """Within it, what names no device is on the CPU."""
    return Context(DEV="CPU")


def in_use() -> str:
    """The device's name, as CPU or CUDA:1; ValueError for an older way to choose one, as CUDA=1."""
    try:
        return Device.canonicalize(None)
    except AssertionError as error:  # tinygrad's: CUDA=1 is deprecated, use DEV=CUDA instead
        raise UserError(error) from None


def open_error(backend: str) -> str | None:
    """Why the backend does not open, or has no compiler; None if it can be used."""
    try:
        Device[backend].renderer  # noqa: B018 - which finds the compiler
    except Exception as error:  # whatever the driver's loader raises
        return " ".join(str(error).split())[:100] or type(error).__name__
    return None


def usable() -> list[str]:
    return [name for name in BACKENDS if open_error(name) is None]


def check() -> None:
    """ValueError if the backend that DEV names does not open."""
    if reason := open_error(name := in_use()):
        others = f"; these do: {', '.join(names)}" if (names := usable()) else ""
        raise UserError(f"DEV={os.environ.get('DEV', name)} does not open here ({reason}){others}")
