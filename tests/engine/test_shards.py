"""What a shard has of each tensor: all shards together have all of it, and rows are the file's own memory."""

from __future__ import annotations

import pytest
import torch
from diptych.core.model import Decoder
from diptych.engine.prepared import open_prepared
from diptych.engine.shards import Shard
from diptych.kernels.linear import linear, linear_in_parts

HEADS, HIDDEN, INTERMEDIATE, HEAD_DIM = 8, 24, 16, 4


def decoder(kv_heads: int, activation: str = "silu") -> Decoder:
    return Decoder(
        family="llama",
        layers=1,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        intermediate=INTERMEDIATE,
        activation=activation,
        norm_eps=1e-6,
        query_scale=1.0,
        tied_head=True,
        windows=(0,),
        rope_full=None,
    )


def made(model: Decoder) -> dict[str, torch.Tensor]:
    """Tensors whose first column, or whose bias, is the number of the row."""
    opened = INTERMEDIATE * (1 if model.activation == "relu" else 2)
    shapes = {"qkv": ((HEADS + 2 * model.kv_heads) * HEAD_DIM, HIDDEN), "gate_up": (opened, HIDDEN)}
    shapes |= {"o": (HIDDEN, HEADS * HEAD_DIM), "down": (HIDDEN, INTERMEDIATE)}
    tensors = {f"0.{name}": torch.arange(rows * width).view(rows, width) for name, (rows, width) in shapes.items()}
    tensors |= {f"0.{name}_bias": torch.arange(rows) for name, (rows, _) in shapes.items()}
    return tensors | {"0.qk_norm": torch.arange((HEADS + model.kv_heads) * HEAD_DIM).view(-1, HEAD_DIM)}


def rows_of(parts) -> list[int]:
    """Which rows the parts are; of the biases too."""
    rows = [int(row) // HIDDEN for weight, _ in parts for row in weight[:, 0]]
    assert rows == [int(row) for _, bias in parts for row in bias]
    return rows


def rows_of_head(first: int, head: int) -> range:
    return range((first + head) * HEAD_DIM, (first + head + 1) * HEAD_DIM)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_shard_has_its_query_heads_and_the_kv_heads_they_read(kv_heads, tp):
    model = decoder(kv_heads)
    tensors, share = made(model), HEADS // tp
    for number in range(tp):
        shard = Shard(model, tp, number)
        queries = range(number * share, (number + 1) * share)
        read = sorted(
            {head * kv_heads // HEADS for head in queries}
        )  # grouped-query attention: head h reads KV head h / (heads / kv_heads)
        assert (shard.heads, shard.kv_heads) == (share, len(read))
        rows = [row for head in queries for row in rows_of_head(0, head)]
        rows += [row for first in (HEADS, HEADS + kv_heads) for head in read for row in rows_of_head(first, head)]
        assert rows_of(shard.qkv(tensors, 0)) == rows
        norm = shard.qk_norm(tensors, 0)
        assert norm is not None
        assert (norm[:, 0] // HEAD_DIM).tolist() == [*queries, *(HEADS + head for head in read)]


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_shards_of_the_mlp_are_its_parts(activation, tp):
    model = decoder(2, activation)
    tensors, share = made(model), INTERMEDIATE // tp
    for number in range(tp):
        shard = Shard(model, tp, number)
        inner = [*range(number * share, (number + 1) * share)]
        assert rows_of(shard.gate_up(tensors, 0)) == inner + ([] if activation == "relu" else [INTERMEDIATE + row for row in inner])
        down, _ = shard.down(tensors, 0)
        assert down[0].tolist() == inner
        o, _ = shard.o(tensors, 0)
        assert torch.equal(o, tensors["0.o"].chunk(tp, 1)[number])


def test_the_bias_of_a_sum_comes_once():
    tensors = made(decoder(2))
    for name in ("o", "down"):
        biases = [getattr(Shard(decoder(2), 4, number), name)(tensors, 0)[1] for number in range(4)]
        assert [bias is not None for bias in biases] == [True, False, False, False]


@pytest.mark.parametrize("vocab_size", [8, 511, 512])
def test_the_vocabulary_is_shared_out_whole(vocab_size):
    for tp in (1, 2, 4, 8):
        held = [range(vocab_size)[Shard(decoder(1), tp, number).vocabulary(vocab_size)] for number in range(tp)]
        assert [token for ids in held for token in ids] == [*range(vocab_size)]
        assert max(map(len, held)) - min(map(len, held)) <= 1


def test_rows_are_views_of_the_file_and_one_rank_copies_nothing(tiny_gemma3_dir):
    model = open_prepared(tiny_gemma3_dir)
    described = model.card.decoder
    for tp in (1, 2, 4):
        shard = Shard(described, tp, tp - 1)
        for name, parts in {"qkv": shard.qkv(model.tensors, 0), "gate_up": shard.gate_up(model.tensors, 0)}.items():
            file = model.tensors[f"0.{name}"].untyped_storage().data_ptr()
            assert [weight.untyped_storage().data_ptr() for weight, _ in parts] == [file] * len(parts)
            assert len(parts) == 1 or tp > 1
    for name, (weight, _) in {"o": Shard(described).o(model.tensors, 0), "down": Shard(described).down(model.tensors, 0)}.items():
        assert weight.data_ptr() == model.tensors[f"0.{name}"].data_ptr()


def test_a_product_in_parts_is_the_product():
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    whole = linear(x, weight, bias)
    torch.testing.assert_close(linear_in_parts(x, [(weight[:2], bias[:2]), (weight[2:], bias[2:])]), whole)
    torch.testing.assert_close(linear_in_parts(x, [(weight, None)]), linear(x, weight))
