"""The weights file of a prepared model: which tensors it has, how it is written, how it is mapped.

Tensors, in this order (L is a layer's number; norms are fp32, their family's offset already added; the rest is the model's dtype);
on the slow path they are those of transformers' module, under its names:

    embed                 [vocab, hidden]; also the head if it is tied
    head                  [vocab, hidden], only if it is not tied
    positions             [positions, hidden], only if they are learned
    norm                  [hidden]; layer norms here and below are [2, hidden]: weight, bias
    L.attention_norm      [hidden]                L.attention_out_norm  [hidden], only with sandwich norms
    L.qkv                 [(heads + 2 * kv_heads) * head_dim, hidden]: q, k, v
    L.qk_norm             [heads + kv_heads, head_dim], only with qk norms: q's weight for each head, then k's
    L.o                   [hidden, heads * head_dim]
    L.mlp_norm            [hidden]                L.mlp_out_norm        [hidden], only with sandwich norms
    L.gate_up             [2 * intermediate, hidden]: gate, up; without a gate [intermediate, hidden]
    L.down                [hidden, intermediate]
    L.qkv_bias, L.o_bias, L.gate_up_bias, L.down_bias  [rows of the product], those the model has

With quantization embed, head and the products are numbers of 8 or 4 bits (`kernels.quantized.Quantized`), each followed by its scales,
embed_scales and so on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import ModelError
from ..core.layout import DType
from ..core.model import Decoder
from ..core.quantization import GROUP, Quantization
from ..kernels.gated import UNGATED
from ..kernels.quantized import Quantized, Weight

TORCH_DTYPE = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}
_FORMAT_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}
_PAGE = 4096
SCALES = "_scales"
"""Behind the name of a quantised tensor: its scales, the next tensor of the file."""
PRODUCTS = ("embed", "head", "qkv", "o", "gate_up", "down")
"""What is quantised: all that a step reads but norms, biases and learned positions, which are small."""

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def shapes_of(decoder: Decoder, vocab_size: int, dtype: DType) -> Shapes:
    """Shape and dtype of every tensor of the weights file, in the file's order."""
    model = TORCH_DTYPE[dtype]
    hidden, head_dim = decoder.hidden, decoder.head_dim
    shapes: Shapes = {"embed": ((vocab_size, hidden), model)}
    if not decoder.tied_head:
        shapes["head"] = ((vocab_size, hidden), model)
    if decoder.learned_positions:
        shapes["positions"] = ((decoder.learned_positions, hidden), model)
    norm = ((2, hidden) if decoder.layer_norm else (hidden,), torch.float32)
    opened = decoder.intermediate * (1 if decoder.activation in UNGATED else 2)
    shapes["norm"] = norm
    for layer in range(decoder.layers):
        tensors: Shapes = {
            "attention_norm": norm,
            "qkv": (((decoder.heads + 2 * decoder.kv_heads) * head_dim, hidden), model),
            "o": ((hidden, decoder.heads * head_dim), model),
            "mlp_norm": norm,
            "gate_up": ((opened, hidden), model),
            "down": ((hidden, decoder.intermediate), model),
        }
        if decoder.qk_norm:
            tensors["qk_norm"] = ((decoder.heads + decoder.kv_heads, head_dim), torch.float32)
        if decoder.sandwich_norms:
            tensors["attention_out_norm"] = tensors["mlp_out_norm"] = norm
        tensors.update({f"{part}_bias": (tensors[part][0][:1], model) for part in decoder.biases})
        shapes.update((f"{layer}.{name}", shape) for name, shape in tensors.items())
    return shapes


def quantized_shapes(shapes: Shapes, quantization: Quantization) -> Shapes:
    """What the weights file has in place of `shapes`. `ModelError` names a product that cannot be quantised like this."""
    if quantization is Quantization.NONE:
        return shapes
    stored: Shapes = {}
    for name, shape in shapes.items():
        if not is_product(name):
            stored[name] = shape
            continue
        (outputs, inputs), kind = shape[0], kind_of(name, quantization)
        if not kind.can_cut(inputs):
            raise ModelError(f"{name} has {inputs} inputs, and int4 takes {GROUP} at a time: use int8.", field="quantization")
        number, scale = (torch.int8, torch.float32) if kind is Quantization.INT8 else (torch.uint8, torch.bfloat16)
        stored[name] = ((outputs, kind.row_bytes(inputs)), number)
        stored[name + SCALES] = ((outputs, kind.groups(inputs)), scale)
    return stored


def kind_of(name: str, quantization: Quantization) -> Quantization:
    """What a product is stored as."""
    return quantization.of_tables if name in ("embed", "head") else quantization


def is_product(name: str) -> bool:
    return name.rpartition(".")[2] in PRODUCTS


def product(tensors: Mapping[str, Tensor], name: str) -> Weight:
    """A matrix of a prepared model, as it is stored."""
    scales = tensors.get(name + SCALES)
    return tensors[name] if scales is None else Quantized(tensors[name], scales)


def bytes_of(shapes: Shapes) -> int:
    """Bytes of all tensors together."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


def write_weights(path: Path, shapes: Shapes, make: Callable[[str], Tensor], digest: hashlib._Hash) -> Iterator[float]:
    """Write a safetensors file tensor by tensor, so that no more than one is in memory; yields the share done.

    `make(name)` returns the tensor to write; its bytes are also fed to `digest`. The data starts at a page, for the
    kernels' aligned loads.
    """
    header, offset = {}, 0
    for name, (shape, dtype) in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _FORMAT_DTYPE[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        for name, (shape, dtype) in shapes.items():
            tensor = _narrowed(name, make(name), dtype).contiguous()
            if tuple(tensor.shape) != shape:
                raise ModelError(f"Tensor {name} has shape {tuple(tensor.shape)}, not {shape}.")
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(data)
            file.write(data)
            written += len(data)
            yield written / offset
        file.flush()
        os.fsync(file.fileno())


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dtype`; `ModelError` if float16 cannot hold it: it ends at 65504, where the others go as far as float32."""
    narrow = tensor.to(dtype)
    if dtype is torch.float16 and tensor.dtype is not dtype and not torch.isfinite(narrow).all():
        raise ModelError(f"Tensor {name} has values that float16 cannot hold: prepare the model as bfloat16.", field="dtype")
    return narrow


def map_weights(path: Path, shapes: Shapes | None) -> dict[str, Tensor]:
    """The tensors of a weights file, memory-mapped: workers of a host share the pages. `ModelError` if the file is not `shapes`, which
    are None where transformers knows them."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Prepare the model again.") from error
    if shapes is None:
        return tensors
    if odd := tensors.keys() ^ shapes.keys():
        raise ModelError(f"{path} does not fit its card: {min(odd)} is {'missing' if min(odd) in shapes else 'not expected'}.")
    for name, (shape, dtype) in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ModelError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the card says {dtype} {shape}.")
    return tensors
