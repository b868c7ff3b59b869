"""Rows of an int8 cache, each one head's key or value of one token: whole numbers from -127 to 127, and behind them, in the same run of
bytes, a bf16 for every 32 of them, by which these are multiplied.

So nothing is calibrated, nothing saturates, and no number is off by more than half of its scale. 32 because in keys a few dimensions are
ten times as large as others: with one scale a row the probabilities of Gemma 3 270M diverge four times as far. int8_rows.h does the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import native, threads_for

GROUP = 32
LARGEST = 127


def width(head_dim: int) -> int:
    """Bytes of a row."""
    return head_dim + 2 * -(-head_dim // GROUP)


def numbers_in(width: int) -> int:
    """The head_dim of rows of so many bytes."""
    return width - 2 * -(-width // (GROUP + 2))


def encode(x: Tensor) -> Tensor:
    """Rows [..., head_dim], of any floating dtype, as int8 [..., width]. Of 32 numbers of which one is not finite all become NaN."""
    head_dim = x.shape[-1]
    groups = F.pad(x.float(), (0, -head_dim % GROUP)).reshape(*x.shape[:-1], -1, GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    scales = _rounded_up(most / LARGEST).masked_fill(~most.isfinite(), torch.nan)
    numbers = (groups / scales).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8).flatten(-2)[..., :head_dim]
    return torch.cat((numbers, scales.squeeze(-1).bfloat16().view(torch.int8)), dim=-1)


def _rounded_up(x: Tensor) -> Tensor:
    """Positive fp32 to what bf16 holds and is not less: a number divided by its scale is then not above 127."""
    return ((x.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)


def decode(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `encode`, in fp32 and rounded to `dtype`: [..., head_dim]."""
    head_dim = numbers_in(rows.shape[-1])
    scales = rows[..., head_dim:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)  # a view wants an even address
    return (rows[..., :head_dim] * scales.float().repeat_interleave(GROUP, -1)[..., :head_dim]).to(dtype)


def read_blocks(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """`blocks` (int64) of an int8 cache [num_blocks, kv_heads, 2, block_size, width], read as rows of one head's keys or values of a block:
    [blocks * block_size, head_dim]."""
    if dtype is not torch.bfloat16 or not cache.is_cpu or (kernels := native()) is None:
        return read_blocks_torch(cache, blocks, dtype)
    size, head_dim = cache.shape[3], numbers_in(cache.shape[4])
    out = torch.empty(len(blocks) * size, head_dim, dtype=dtype)
    kernels.read_int8(out.data_ptr(), cache.data_ptr(), blocks.data_ptr(), len(blocks), size, head_dim, threads_for(out.numel()))
    return out


def read_blocks_torch(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by torch, in five passes."""
    size, width = cache.shape[3:]
    return decode(cache.view(-1, size * width).index_select(0, blocks).view(-1, width), dtype)
