"""Models for tests: tiny random ones in seconds, and the demo model, prepared once per machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diptych.core.layout import DType
from hypothesis import HealthCheck, settings

VOCAB = 512
settings.register_profile("no clock", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")  # else an example of 0.2 s fails, as any does on a machine that stands still for so long


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What runs beside what, with `--dist loadgroup`."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from groups import Grouped

    return Grouped(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms whose tests start processes that import torch, for which they wait up to 180 s: on two cores with much else to do the first
    test of `test_kills`, with six of them, was seen to take 170."""
    from groups import CLUSTERS

    for item in items:
        if item.path.parent.name in CLUSTERS and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests share the machine's cores."""
    import torch

    torch.set_num_threads(1)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of VOCAB tokens that any text survives: <pad>, <eos>, <bos>, 256 bytes, a few merges, fillers."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the"), ("i", "n"), ("e", "r")]
    words = ["<pad>", "<eos>", "<bos>", *alphabet, *("".join(pair) for pair in pairs)]
    words += [f"<filler{i}>" for i in range(VOCAB - len(words))]
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(directory / "tokenizer.json"))


def write_gemma3(directory: Path, **changes: Any) -> None:
    """A random Gemma 3 in Hugging Face form: 4 layers, window 24 (more than a block) on all but layer 2."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 40,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    torch.manual_seed(1)
    _save(Gemma3ForCausalLM(Gemma3TextConfig(**settings | changes)), directory)


def write_llama(directory: Path, **changes: Any) -> None:
    """A random Llama in Hugging Face form: 3 layers, untied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    torch.manual_seed(2)
    _save(LlamaForCausalLM(LlamaConfig(**settings | changes)), directory)


def _save(model: Any, directory: Path) -> None:
    """Weights larger than the usual initialisation, so that logits differ by much and norms are not all one."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.08))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.fixture(scope="session")
def save_random() -> Callable[[Any, Path], None]:
    """Save a transformers model with larger random weights, and a tokenizer."""
    return _save


@pytest.fixture(scope="session", name="write_gemma3")
def _write_gemma3() -> Callable[..., None]:
    return write_gemma3


@pytest.fixture(scope="session", name="write_llama")
def _write_llama() -> Callable[..., None]:
    return write_llama


@pytest.fixture(scope="session")
def tiny_gemma3_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("source") / "tiny-gemma3"
    write_gemma3(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("source") / "tiny-llama"
    write_llama(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_gemma3_dir(tiny_gemma3_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3, prepared in float32: full and window (24) cache groups, vocabulary 512."""
    return _prepared(tiny_gemma3_source, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, prepared in float32: one full cache group, vocabulary 512."""
    return _prepared(tiny_llama_source, tmp_path_factory)


def _prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diptych.engine.prepared import prepare

    out = tmp_path_factory.mktemp("prepared") / source.name
    prepare(str(source), out, dtype=DType.FLOAT32)
    return out


@pytest.fixture(scope="session")
def demo_model_dir() -> Callable[[DType], Path]:
    """The demo model, prepared as the given dtype; kept in the user's cache between runs. Skips where it is not installed."""

    def find(dtype: DType) -> Path:
        from diptych.engine.location import demo_source
        from diptych.engine.prepared import find_or_prepare

        source = demo_source()
        if source is None:
            pytest.skip("the demo model's package is not installed")
        return find_or_prepare(source, dtype=dtype)

    return find
