"""A model of a real shape with random weights, as a Hugging Face directory: what is fast or slow about a model of that size, without a
download.

    python -m diptych.benchmarks.random_model DIR [--shape llama-8b] [--layers N]

Then `diptych up -m DIR`, or `--model DIR` of a benchmark. bfloat16, a layer a file, so that no more of it than that is in memory. What it
answers is nonsense, greedily a few tokens over and over: it is for times and bytes, not for quality. The tokenizer takes any text as its
bytes, and each of the model's tokens is some text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

DEVIATION = 0.02
"""Of each weight, as Llama's are before they are trained."""
SPECIAL = ("<pad>", "<eos>", "<bos>")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "llama-1b": Shape(128_256, 2048, 8192, 16, 32, 8, 131_072, tied=True),
    "llama-3b": Shape(128_256, 3072, 8192, 28, 24, 8, 131_072, tied=True),
    "llama-8b": Shape(128_256, 4096, 14_336, 32, 32, 8, 131_072),
    "llama-70b": Shape(128_256, 8192, 28_672, 80, 64, 8, 131_072),
}


def write(shape: Shape, directory: Path, seed: int = 0) -> None:
    """`directory` appears whole or not at all; `FileExistsError` if it is there."""
    if directory.exists():
        raise FileExistsError(f"{directory} is there already")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch, "model")
        made.mkdir()
        _write_weights(shape, made, torch.Generator().manual_seed(seed))
        (made / "config.json").write_text(json.dumps(_config(shape), indent=1))
        (made / "tokenizer.json").write_text(_tokenizer(shape.vocabulary))
        (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        shutil.move(made, directory)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def _write_weights(shape: Shape, directory: Path, random: torch.Generator) -> None:
    from safetensors.torch import save_file

    parts = [*_layers(shape), _outside(shape)]
    where: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: _random(each, random) for name, each in shapes.items()}
        save_file(tensors, directory / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        print(f"\r{number} of {len(parts)} files, {total / 1e9:.1f} GB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))


def _random(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Norms multiply by 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=DEVIATION, generator=random)


def _layers(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    hidden, queries, keys, mlp = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    parts: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(shape.layers):
        yield {f"model.layers.{layer}.{name}.weight": each for name, each in parts.items()}


def _outside(shape: Shape) -> dict[str, tuple[int, ...]]:
    table: tuple[int, ...] = (shape.vocabulary, shape.hidden)
    head = {} if shape.tied else {"lm_head.weight": table}
    return {"model.embed_tokens.weight": table, "model.norm.weight": (shape.hidden,), **head}


def _tokenizer(vocabulary: int) -> str:
    """The bytes, and behind them words that no text becomes, so that there are as many tokens as the model can answer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġ{number}" for number in range(len(words), vocabulary)]  # "Ġ" is a space; it and a number are no one byte
    tokenizer = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return str(tokenizer.to_str())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.random_model", description="Random weights of a real shape.")
    parser.add_argument("directory", type=Path, help="to be made")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b", help="8b is 16 GB")
    parser.add_argument("--layers", type=int, help="of it; by default all")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None and not 1 <= options.layers <= shape.layers:
        parser.error(f"--layers: {options.shape} has 1 to {shape.layers}")
    try:
        write(replace(shape, layers=options.layers or shape.layers), options.directory)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{options.directory}: {options.shape}, {options.layers or shape.layers} layers. Serve it: diptych up -m {options.directory}")


if __name__ == "__main__":
    main()
