"""Memory by its address: what Python's own modules do not offer."""

from __future__ import annotations

import ctypes
import mmap
import warnings

import torch
from torch.utils.dlpack import from_dlpack

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.malloc.argtypes, _libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.argtypes, _new_capsule.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object


def address_of(mapped: mmap.mmap) -> int:
    """Where `mapped` begins in this process; good until it is closed."""
    with warnings.catch_warnings():
        # A read-only buffer cannot tell its address any other way; nothing is written through this tensor.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()


class _DLManagedTensor(ctypes.Structure):
    """dlpack.h, and behind it the one number that `shape` points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("length", ctypes.c_int64),
    )


def tensor_at(address: int, length: int, device: torch.device) -> torch.Tensor:
    """A uint8 tensor over what lies at `address` in the address space of `device`; it does not keep the memory from being freed.

    By DLPack, since it believes what it is told of the device. Of another process's allocation on another GPU CUDA says, and torch with it,
    that it is there; but the kernels that read it run here.
    """
    place = _libc.malloc(ctypes.sizeof(_DLManagedTensor))
    kind, number = (1, 0) if device.type == "cpu" else (2, device.index)  # kDLCPU, kDLCUDA
    code, bits, shape = 1, 8, place + _DLManagedTensor.length.offset  # kDLUInt
    free = ctypes.cast(_libc.free, ctypes.c_void_p).value  # torch frees what describes the tensor
    described = _DLManagedTensor(address, kind, number, 1, code, bits, 1, shape, None, 0, None, free, length)
    ctypes.memmove(place, ctypes.byref(described), ctypes.sizeof(described))
    tensor: torch.Tensor = from_dlpack(_new_capsule(place, b"dltensor", None))
    return tensor


def take_pages(address: int, length: int) -> bool:
    """Have the kernel back [address, address + length) with memory now, without changing what it holds and without the GIL.

    False where the kernel cannot (before Linux 5.14): pages then come at their first use.
    """
    return bool(_libc.madvise(address, length, _MADV_POPULATE_WRITE) == 0)
