"""GPU memory that other processes of the host can map, by the CUDA driver's own calls (libcuda.so.1, a stable ABI).

torch's allocator hands out pieces of larger blocks, which cannot be shared by themselves. A handle opens on any GPU of
the host with a path to this one, also in a process to which CUDA_VISIBLE_DEVICES shows only another one (CUDA driver
API, cuIpcOpenMemHandle).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1


class DriverError(RuntimeError):
    """A call of the CUDA driver failed, or there is none."""


class _Handle(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_ubyte * HANDLE_BYTES)]


_Address = ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuMemAlloc_v2": (ctypes.POINTER(_Address), ctypes.c_size_t),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _Address),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_Address), _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_Address,),
}


class SharedMemory:
    """Zeroed memory of the first visible GPU, held until the process ends: a process that has it mapped may outlive
    this one's interest in it, and freeing it under a mapping is undefined. Raises DriverError."""

    def __init__(self, *shape: int) -> None:
        """shape: of a tensor of int64."""
        _bind()
        address = _Address()
        _call("cuMemAlloc_v2", ctypes.byref(address), torch.Size(shape).numel() * torch.int64.itemsize)
        self.__cuda_array_interface__ = {
            "data": (address.value, False),
            "shape": shape,
            "typestr": "<i8",
            "strides": None,
            "version": 3,
        }
        self.tensor = torch.as_tensor(self, device="cuda:0").zero_()

    def handle(self) -> bytes:
        """By which other processes map it."""
        handle = _Handle()
        _bind()
        _call("cuIpcGetMemHandle", ctypes.byref(handle), self.tensor.data_ptr())
        return bytes(handle)


def open_handle(handle: bytes) -> int:
    """Map another process's memory; its address here, aligned as it is there. Raises DriverError."""
    address = _Address()
    _bind()
    opened = _Handle.from_buffer_copy(handle)
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), opened, LAZY_ENABLE_PEER_ACCESS)
    return address.value


def close_handle(address: int) -> None:
    """Unmap it, also after the other process's end. No kernel may be using it. Raises DriverError."""
    _bind()
    _call("cuIpcCloseMemHandle", address)


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise DriverError(str(error)) from None
    return library


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise DriverError(f"{name}: {text.value.decode() if text.value else code}")


@cache
def _context() -> ctypes.c_void_p:
    """torch's context on the first visible GPU, the primary one."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    _call("cuDeviceGet", ctypes.byref(device), 0)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def _bind() -> None:
    """The driver's calls work in the calling thread's current context; threads of an actor have none at first."""
    _call("cuCtxSetCurrent", _context())
