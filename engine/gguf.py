"""Making a GGUF file cheap to read: the same file without its long arrays.

The reader that transformers uses builds several numpy views for each of the tokenizer's 262,144 tokens and scores, 13 s each
time the file is opened. Config and weights need none of them, only their number.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import ModelError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_LONG = 1000
_ALIGNMENT = 32
_TOKENS = "tokenizer.ggml.tokens"


def write_slim(source: Path, out: Path) -> None:
    """Copy GGUF `source` to `out` without its metadata arrays of more than 1,000 items; the vocabulary's size is kept as a key.

    Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `ModelError` if it is not one.
    """
    try:
        with source.open("rb") as file, out.open("wb") as slim:
            _copy(file, slim)
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ModelError(f"{source} is damaged or not GGUF: {error!r}.", field="model.source") from error


def read_first(source: Path) -> dict[str, int | str]:
    """Whole numbers and strings of the metadata of GGUF `source`, up to its first long array: the architecture and its sizes stand before
    the vocabulary. Empty if it is not one."""
    found: dict[str, int | str] = {}
    try:
        with source.open("rb") as file:
            magic, version, _, pairs = _unpack(file, "<4sIQQ")
            for _ in range(pairs if magic == b"GGUF" and version >= 2 else 0):
                key = _string(file)
                (kind,) = _unpack(file, "<I")
                if kind == _STRING:
                    found[key] = _string(file)
                elif kind == _ARRAY:
                    if _items(file) > _LONG:
                        break
                    _skip_value(file, kind)
                else:
                    value = file.read(_SIZES[kind])
                    found |= {key: int.from_bytes(value, "little")} if kind == _UINT32 else {}
    except (struct.error, UnicodeDecodeError, KeyError):  # what is wrong with it is said when it is prepared
        return {}
    return found


def _copy(file: BinaryIO, slim: BinaryIO) -> None:
    magic, version, tensors, pairs = _unpack(file, "<4sIQQ")
    if magic != b"GGUF" or version < 2:
        raise KeyError(f"magic {magic!r} version {version}")
    kept, alignment = _pairs(file, pairs)
    infos = _tensor_infos(file, tensors)
    header = struct.pack("<4sIQQ", magic, version, tensors, len(kept)) + b"".join(kept) + infos
    slim.write(header + bytes(-len(header) % alignment))
    file.seek(-file.tell() % alignment, 1)
    shutil.copyfileobj(file, slim, 16 << 20)


def _pairs(file: BinaryIO, count: int) -> tuple[list[bytes], int]:
    """The key-value pairs worth keeping, as bytes, and the file's alignment."""
    kept: list[bytes] = []
    architecture = ""
    keys: dict[str, int] = {}
    for _ in range(count):
        start = file.tell()
        key = _string(file)
        (kind,) = _unpack(file, "<I")
        items = _skip_value(file, kind)
        end = file.tell()
        file.seek(start)
        pair = file.read(end - start)
        keys[key] = items if kind == _ARRAY else int.from_bytes(pair[-4:], "little")
        if items <= _LONG:
            kept.append(pair)
        if key == "general.architecture":
            architecture = pair[8 + len(key) + 4 + 8 :].decode()
    if _TOKENS in keys and f"{architecture}.vocab_size" not in keys:
        name = f"{architecture}.vocab_size".encode()
        kept.append(struct.pack("<Q", len(name)) + name + struct.pack("<II", _UINT32, keys[_TOKENS]))
    return kept, keys.get("general.alignment", _ALIGNMENT)


def _skip_value(file: BinaryIO, kind: int) -> int:
    """Move past a value; the number of items if it is an array, else 1."""
    if kind == _STRING:
        file.seek(_unpack(file, "<Q")[0], 1)
    elif kind == _ARRAY:
        inner, items = _unpack(file, "<IQ")
        if inner in _SIZES:
            file.seek(_SIZES[inner] * items, 1)
        else:
            for _ in range(items):
                _skip_value(file, inner)
        return int(items)
    else:
        file.seek(_SIZES[kind], 1)
    return 1


def _items(file: BinaryIO) -> int:
    """Of the array that begins here."""
    _, items = _unpack(file, "<IQ")
    file.seek(-12, 1)
    return int(items)


def _tensor_infos(file: BinaryIO, count: int) -> bytes:
    start = file.tell()
    for _ in range(count):
        _string(file)
        (dimensions,) = _unpack(file, "<I")
        file.seek(8 * dimensions + 4 + 8, 1)
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


def _string(file: BinaryIO) -> str:
    return file.read(_unpack(file, "<Q")[0]).decode()


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))
