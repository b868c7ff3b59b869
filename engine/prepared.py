"""Prepared models: made once from any source, opened by every worker of a host. See core/model.py for what the directory holds.

Opening imports torch and safetensors only; preparing imports transformers, which costs seconds and 400 MB.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ModelError
from ..core.layout import DType
from ..core.model import CARD, CHAT_TEMPLATE, TOKENIZER, WEIGHTS, Decoder, ModelCard, read_card
from ..core.quantization import Quantization
from .location import FORMAT, default_prepared_dir, source_name
from .quantizing import quantizing
from .recipe import Recipe, choose_recipe
from .sources import Checkpoint, open_checkpoint
from .weights import bytes_of, map_weights, quantized_shapes, shapes_of, write_weights

NOT_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text")
Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A prepared model, opened: its card, and its tensors memory-mapped from the page cache.

    Their names are those of weights.py, or with a `ForeignDecoder` those of transformers' module."""

    directory: Path
    card: ModelCard
    tensors: Mapping[str, Tensor]


def open_prepared(directory: Path) -> PreparedModel:
    """Map the prepared model in `directory`; `ModelError` if it is not one or is damaged."""
    card = read_card(directory)
    shapes = None
    if isinstance(card.decoder, Decoder):
        shapes = quantized_shapes(shapes_of(card.decoder, card.vocab_size, card.dtype), card.quantization)
    return PreparedModel(directory, card, map_weights(directory / WEIGHTS, shapes))


def find_or_prepare(
    source: str,
    *,
    dtype: DType,
    quantization: Quantization = Quantization.NONE,
    name: str | None = None,
    chat_template: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The prepared directory of `source`, made if there is none yet; `source` itself if it is one already.

    Two processes that ask for the same model at once get the same directory, made once.
    """
    if (Path(source) / CARD).is_file():
        return _as_it_is(Path(source), dtype, quantization, name, chat_template)
    _check_template(chat_template)
    directory = default_prepared_dir(source, dtype=dtype, quantization=quantization, name=name, chat_template=chat_template)
    if not (directory / CARD).is_file():
        options: dict[str, Any] = {"name": name, "chat_template": chat_template, "progress": progress}
        prepare(source, directory, dtype=dtype, quantization=quantization, **options)
    return directory


def _as_it_is(directory: Path, dtype: DType, quantization: Quantization, name: str | None, chat_template: Path | None) -> Path:
    """A prepared directory named as the source is used unchanged, so nothing that would change it may be asked for."""
    card = read_card(directory)
    if card.dtype is not dtype:
        raise ModelError(f"{directory} was prepared as {card.dtype}, not {dtype}. Prepare its source again, or serve it as {card.dtype}.")
    if card.quantization is not quantization:
        raise ModelError(
            f"{directory} was prepared with quantization {card.quantization}, not {quantization}. Prepare its source again, or say "
            f"{card.quantization}.",
            field="quantization",
        )
    if chat_template is not None or name not in (None, card.name):
        raise ModelError(f"{directory} is prepared already; a name or a chat template is given when its source is prepared.")
    return directory


def prepare(
    source: str,
    out: Path,
    *,
    dtype: DType,
    quantization: Quantization = Quantization.NONE,
    name: str | None = None,
    chat_template: Path | None = None,
    progress: Progress | None = None,
) -> ModelCard:
    """Make the prepared model `out` from `source`: a Hugging Face directory, a GGUF file, a hub name or `demo_source()`.

    `out` appears whole or not at all; if it is there already it must be the same source's, and is kept. `ModelError` says
    what is wrong with the source.
    """
    _check_template(chat_template)
    report = progress or (lambda what, share: None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(out.parent):
            if out.exists():
                return read_card(out)
            with _scratch(out.parent) as scratch, open_checkpoint(source, scratch, report) as checkpoint:
                made = scratch / "model"
                made.mkdir()
                card = _write(checkpoint, made, source, dtype, quantization, name, chat_template, report)
                made.rename(out)
                return card
    except OSError as error:
        raise ModelError(f"The model cannot be prepared in {out}: {error}.") from error


def _check_template(chat_template: Path | None) -> None:
    if chat_template is not None and not chat_template.is_file():
        raise ModelError(f"There is no chat template {chat_template}.", field="chat_template")


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process prepares in `directory`. The lock is the kernel's, so a killed process leaves none."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


_SCRATCH = ".preparing-"


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A directory on the same filesystem, gone afterwards; also removes what killed processes left. Needs `_alone_in`."""
    for left in parent.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _write(
    checkpoint: Checkpoint,
    made: Path,
    source: str,
    dtype: DType,
    quantization: Quantization,
    name: str | None,
    chat_template: Path | None,
    report: Progress,
) -> ModelCard:
    """Write all files of a prepared model; the card last."""
    if dtype is DType.FLOAT16 and checkpoint.config["model_type"] in NOT_IN_FLOAT16:
        raise ModelError(
            f"Activations of {checkpoint.config['model_type']} models grow beyond what float16 holds, 65504: prepare it as bfloat16.",
            field="dtype",
        )
    recipe = quantizing(choose_recipe(checkpoint, dtype, report), quantization)
    digest = _fingerprint(recipe, dtype, quantization)
    for share in write_weights(made / WEIGHTS, recipe.shapes, recipe.make, digest):
        report("writing weights", share)
    template = chat_template.read_text() if chat_template else checkpoint.chat_template
    (made / TOKENIZER).write_text(checkpoint.tokenizer)
    if template is not None:
        (made / CHAT_TEMPLATE).write_text(template)
    card = ModelCard(
        name=name or source_name(source),
        source=source,
        fingerprint=digest.hexdigest(),
        dtype=dtype,
        quantization=quantization,
        vocab_size=int(checkpoint.config["vocab_size"]),
        max_context=recipe.max_context,
        bos_token_id=checkpoint.config.get("bos_token_id"),
        eos_token_ids=checkpoint.eos_token_ids,
        has_chat_template=template is not None,
        weights_bytes=bytes_of(recipe.shapes),
        decoder=recipe.decoder,
    )
    (made / CARD).write_text(card.model_dump_json(indent=2))
    if recipe.check:
        report("comparing with transformers", 1.0)
        opened = open_prepared(made)
        recipe.check(opened.card, opened.tensors)
    return card


def _fingerprint(recipe: Recipe, dtype: DType, quantization: Quantization) -> hashlib._Hash:
    chosen = [] if quantization is Quantization.NONE else [quantization]
    return hashlib.sha256(json.dumps([FORMAT, recipe.decoder.model_dump(mode="json"), dtype, *chosen]).encode())
