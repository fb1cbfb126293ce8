"""The choice of the backend: the variable DEV, and the backends that open on this machine."""

import os
import sys

from tinygrad import Device
from tinygrad.helpers import DEV

from backend.errors import UserError

BACKENDS = ("CPU", "CUDA", "NV", "METAL", "AMD", "CL", "WEBGPU")


def set_default() -> None:
    """Sets DEV=CPU where the user names no backend and there is no GPU driver.

    tinygrad 0.14.0 would prefer an OpenCL on the CPU (pocl) to its faster CPU backend, and look for
    GPUs for half a second. With a GPU driver, or DEV, the choice is tinygrad's.
    """
    gpu_drivers = ("/dev/kfd", "/dev/nvidiactl", "/dev/dxg")
    has_gpu = sys.platform == "darwin" or any(map(os.path.exists, gpu_drivers))
    is_named = any(os.environ.get(name) == "1" for name in BACKENDS)  # deprecated: see `in_use`
    if not (DEV.device or has_gpu or is_named):
        DEV.value = os.environ["DEV"] = "CPU"


def in_use() -> str:
    """The name of the device, such as CPU or CUDA:1; UserError for the deprecated CUDA=1."""
    try:
        return Device.canonicalize(None)
    except AssertionError as error:  # "CUDA=1 is deprecated, use DEV=CUDA instead"
        raise UserError(error) from None


def open_error(backend: str) -> str | None:
    """The reason why the backend or its compiler does not open, or None."""
    try:
        Device[backend].renderer  # noqa: B018 - opens the compiler
    except Exception as error:  # a driver's loader may raise anything
        return " ".join(str(error).split())[:100] or type(error).__name__
    return None


def usable() -> list[str]:
    return [name for name in BACKENDS if open_error(name) is None]


def check() -> None:
    """UserError if the backend in use does not open."""
    if reason := open_error(name := in_use()):
        others = f"; these do: {', '.join(names)}" if (names := usable()) else ""
        raise UserError(f"DEV={os.environ.get('DEV', name)} does not open here ({reason}){others}")
