"""A worker of many ranks says what a worker of one says: real processes, tiny models, fp32, gloo."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from diptych.core.layout import DType, even_stages
from diptych.core.model import read_card
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import BlockCopy, Draw, Row
from diptych.engine.last_drawn import LastDrawn
from diptych.engine.prepared import prepare
from diptych.engine.step_codec import decode_output, encode_batch

BLOCK, KV_TOKENS = 16, 512
GREEDY = SamplingParams(temperature=0.0, logprobs=5)
SEEDED = SamplingParams(temperature=1.3, top_p=0.95, seed=2**60 + 1)
PENALISED = SamplingParams(temperature=1.2, seed=7, logprobs=2, repetition_penalty=1.4, frequency_penalty=0.5)
pytestmark = pytest.mark.timeout(300)  # four processes that import torch first, on a machine that may be busy


class Peer:
    """A rank process; answers come in the order of what was asked."""

    def __init__(self) -> None:
        path = Path(__file__).with_name("rank_peer.py")
        self.process = subprocess.Popen([sys.executable, "-P", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, command, *arguments, **named) -> None:
        pickle.dump((command, arguments, named), self.process.stdin)
        self.process.stdin.flush()

    def answer(self):
        return pickle.load(self.process.stdout)

    def ended(self) -> bool:
        """It is told at the end of its stdin."""
        code = self.process.wait(100)
        self.process.stdout.close()
        return code == 0


class Crew:
    """Processes that are kept, since starting one costs 2 s: the first ones are the ranks of the worker at hand."""

    def __init__(self, folder: Path) -> None:
        self.peers: list[Peer] = []
        self.stores = (folder / f"store{number}" for number in count())

    def start(self, directory: Path, *, tp: int = 1, stages: tuple[int, ...] = (), timeout_s: float = 100.0, ranks=None) -> ManyRanks:
        """A worker of all its ranks, or without some of them."""
        layout = read_card(directory).layout(block_size=BLOCK, kv_tokens=KV_TOKENS, tp=tp, stages=stages)
        self.peers += [Peer() for _ in range(layout.ranks - len(self.peers))]
        members = {rank: self.peers[rank] for rank in (range(layout.ranks) if ranks is None else ranks)}
        store = next(self.stores)
        for rank, peer in members.items():
            peer.ask("connect", directory, tp=tp, stages=stages, rank=rank, store=store, kv_tokens=KV_TOKENS, timeout_s=timeout_s)
        return ManyRanks(layout, members, [peer.answer() for peer in members.values()])

    def close(self) -> None:
        for peer in self.peers:
            peer.process.stdin.close()
        assert [peer.ended() for peer in self.peers] == [True] * len(self.peers)


class ManyRanks:
    """All ranks of a worker in the place of an engine, and the leader's part: it resolves the batch and hears what was drawn."""

    def __init__(self, layout, peers, connected) -> None:
        self.layout, self.peers, self.connected = layout, peers, connected
        self.sampling = layout.ranks - layout.tp
        self.last_drawn = LastDrawn(8)
        self.logits: list[np.ndarray] = []
        self._in_flight: deque = deque()

    def begin(self, batch) -> None:
        for peer in self.peers.values():
            peer.ask("run", encode_batch(self.last_drawn.resolve(batch)))
        self._in_flight.append(batch)

    def end(self):
        """The output of the first step that has none yet."""
        batch = self._in_flight.popleft()
        outputs = {}
        for rank, peer in self.peers.items():
            data, layers, logits = peer.answer()
            assert layers == list(self.layout.stage(rank // self.layout.tp))
            outputs[rank] = decode_output(data)
            if rank != self.sampling:
                assert logits is None
                assert outputs[rank].drawn == ((),) * len(batch.rows)
            elif logits is not None:
                self.logits.append(logits)
        self.last_drawn.note(batch, outputs[self.sampling])
        return outputs[self.sampling]

    def run(self, batch, _on_layer=None):
        self.begin(batch)
        return self.end()

    def each(self, command):
        for peer in self.peers.values():
            peer.ask(command)
        return [peer.answer() for peer in self.peers.values()]


@pytest.fixture(scope="module")
def crew(tmp_path_factory) -> Iterator[Crew]:
    crew = Crew(tmp_path_factory.mktemp("stores"))
    yield crew
    crew.close()


@pytest.fixture(scope="module")
def tiny_opt_dir(tmp_path_factory, save_random) -> Path:
    """A tiny OPT: layer norms, learned positions, biases everywhere, and a vocabulary that no tp divides."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("opt")
    settings = {"vocab_size": 511, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    save_random(OPTForCausalLM(OPTConfig(**settings)), folder / "source")
    prepare(str(folder / "source"), folder / "prepared", dtype=DType.FLOAT32)
    return folder / "prepared"


@pytest.fixture
def one_rank(bench):
    """A worker of one rank whose logits are kept."""

    def make(directory: Path):
        bench_ = bench(directory, kv_tokens=KV_TOKENS)
        compute, bench_.logits = bench_.engine._decoder.logits, []

        def keep(*inputs):
            logits = compute(*inputs)
            if logits is not None:
                bench_.logits.append(logits.numpy())
            return logits

        bench_.engine._decoder.logits = keep
        return bench_

    return make


@pytest.fixture
def many_ranks(bench, crew):
    """The same with the ranks of a crew in the place of the engine."""

    def make(directory: Path, **spread):
        bench_ = bench(directory, kv_tokens=KV_TOKENS)
        bench_.engine = crew.start(directory, **spread)
        bench_.logits = bench_.engine.logits
        return bench_

    return make


def conversation(bench_, prompt) -> list[list]:
    """What two sequences say, computed in chunks, then together; and a third, forked off the first by copying its blocks."""
    lengths, steps = (40, 21), 8
    prompts = [prompt(length, seed=length, vocab=500) for length in lengths]
    tables = [bench_.table(length + steps) for length in lengths]
    said = [
        [bench_.prefill(prompts[0], tables[0], chunk=13, slot=4, sampling=GREEDY)],
        [bench_.step(Row(1, 0, tuple(prompts[1]), tables[1], (Draw(PENALISED, 0, history=tuple(prompts[1])),)))[0]],
        [],
    ]
    for index in range(1, steps):
        starts = [length + index - 1 for length in lengths]
        rows = (
            Row(4, starts[0], (), bench_.passed(tables[0], starts[0]), (Draw(GREEDY, index), Draw(SEEDED, index, 3))),
            Row(1, starts[1], (), bench_.passed(tables[1], starts[1]), (Draw(PENALISED, index),)),
        )
        both = bench_.run(*rows)
        said[0] += both[0]
        said[1] += both[1]
    fork = bench_.table(lengths[0] + 1)
    last = lengths[0] - 1
    pairs = zip(bench_.passed(tables[0], last), fork, strict=True)
    copies = [BlockCopy(g, old, new) for g, (olds, news) in enumerate(pairs) for old, new in zip(olds, news, strict=False) if old >= 0]
    row = Row(2, last, (prompts[0][-1],), bench_.passed(fork, last), (Draw(GREEDY, 0),))
    said[2] = list(bench_.run(row, copies=tuple(copies))[0])
    return said


def check_same(ours, theirs, prompt) -> None:
    expected, found = conversation(ours, prompt), conversation(theirs, prompt)
    assert [[drawn.token_id for drawn in each] for each in found] == [[drawn.token_id for drawn in each] for each in expected]
    assert len({drawn.token_id for each in expected for drawn in each}) > 8
    for one, other in zip(expected, found, strict=True):
        for drawn, same in zip(one, other, strict=True):
            assert same.logprob == (None if drawn.logprob is None else pytest.approx(drawn.logprob, abs=1e-4))
            assert [token for token, _ in same.top] == [token for token, _ in drawn.top]
    assert len(theirs.logits) == len(ours.logits) == 10
    assert max(np.abs(one - other).max() for one, other in zip(ours.logits, theirs.logits, strict=True)) < 1e-4
    check_stored(ours, theirs)


def check_stored(ours, theirs) -> None:
    """Every rank holds of the KV what its layout says."""
    layout = theirs.engine.layout
    for rank, stored in enumerate(theirs.engine.each("stored")):
        on = layout.on(rank)
        for g, caches in enumerate(stored):
            assert len(caches) == len(on.layers(g))
            for layer, cache in zip(on.layers(g), caches, strict=True):
                whole = ours.caches[g][layout.groups[g].layers.index(layer)].numpy()
                heads = on.heads(g)
                np.testing.assert_allclose(cache, whole[:, heads.start : heads.stop], atol=1e-4)


@pytest.mark.parametrize(
    ("family", "tp", "stages"),
    [
        ("gemma3", 2, (3, 1)),  # of the cache groups one has no layer in the last stage
        ("gemma3", 4, ()),  # two ranks for each KV head
        ("gemma3", 1, (1, 2, 1)),
        ("llama", 2, ()),
        ("llama", 1, (1, 2)),
        ("opt", 4, ()),
        ("opt", 2, (2, 1)),
    ],
)
def test_many_ranks_say_the_same(family, tp, stages, request, one_rank, many_ranks, prompt):
    directory = request.getfixturevalue(f"tiny_{family}_dir")
    check_same(one_rank(directory), many_ranks(directory, tp=tp, stages=stages), prompt)


@pytest.mark.nightly
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ["gemma3", "llama", "opt"])
def test_every_spread_says_the_same(family, tp, pp, request, one_rank, many_ranks, prompt):
    directory = request.getfixturevalue(f"tiny_{family}_dir")
    stages = even_stages(read_card(directory).decoder.layers, pp)
    check_same(one_rank(directory), many_ranks(directory, tp=tp, stages=stages), prompt)


def test_ranks_warm_up_together_and_are_then_as_new(one_rank, many_ranks, prompt, tiny_gemma3_dir):
    warm = many_ranks(tiny_gemma3_dir, tp=2, stages=(2, 2))
    assert warm.engine.each("warm_up") == [None] * 4
    ours, theirs = (bench_.generate(prompt(20), 5) for bench_ in (one_rank(tiny_gemma3_dir), warm))
    assert ours == theirs


def test_as_many_steps_are_in_flight_as_there_are_stages(one_rank, many_ranks, prompt, tiny_llama_dir):
    """While the last stage has the step of one sequence, the first computes that of the other, and nobody waits for its output."""
    alone, spread = one_rank(tiny_llama_dir), many_ranks(tiny_llama_dir, stages=(1, 1, 1))
    expected = [[drawn.token_id for drawn in alone.generate(prompt(20, seed=seed), 6)] for seed in range(3)]
    tables = [spread.table(26) for _ in range(3)]
    said = [[spread.prefill(prompt(20, seed=slot), tables[slot], slot=slot).token_id] for slot in range(3)]
    for index in range(1, 6):
        for slot in range(3):
            row = Row(slot, 19 + index, (), tables[slot], (Draw(GREEDY, index),))
            spread.engine.begin(spread.batch(row))
        for slot in range(3):
            said[slot].append(spread.engine.end().drawn[0][0].token_id)
    assert said == expected


def test_bfloat16_is_added_up_too(bench, many_ranks, prompt, tiny_gemma3_source, tmp_path):
    """Logits agree to a few roundings: the shards round their parts before these are added up."""
    prepare(str(tiny_gemma3_source), tmp_path / "narrow", dtype=DType.BFLOAT16)
    sampling = SamplingParams(temperature=0.0, logprobs=20)
    ours, theirs = (
        make.generate(prompt(60), 1, sampling=sampling)[0]
        for make in (bench(tmp_path / "narrow"), many_ranks(tmp_path / "narrow", tp=2, stages=(2, 2)))
    )
    known = dict(theirs.top)
    shared = [(value, known[token]) for token, value in ours.top if token in known]
    assert len(shared) >= 12
    assert [one for one, _ in shared] == pytest.approx([other for _, other in shared], abs=0.25)


def refused(answer, *words: str) -> None:
    code, message, _ = answer
    assert code == "unavailable"
    assert all(word in message for word in words), message


@pytest.fixture
def step(bench, prompt, tiny_llama_dir) -> bytes:
    return encode_batch(bench(tiny_llama_dir).batch(Row(0, 0, tuple(prompt(20)), ((0, 1),), (Draw(GREEDY, 0),))))


def test_a_rank_that_takes_no_part_is_named(crew, step, tiny_llama_dir):
    silent = crew.start(tiny_llama_dir, tp=2, timeout_s=5.0)
    assert silent.connected == [None, None]
    silent.peers[1].ask("run", step)
    refused(silent.peers[1].answer(), "Rank 1 lost rank 0 of its worker (add up)")


@pytest.mark.parametrize(
    ("spread", "lost"), [({"tp": 2}, "rank 0 of its worker (add up)"), ({"stages": (2, 1)}, "rank 0 of its worker (receive)")]
)
def test_a_rank_that_is_gone_is_named_at_once(crew, step, tiny_llama_dir, spread, lost):
    gone = crew.start(tiny_llama_dir, timeout_s=60.0, **spread)
    gone.peers[1].ask("run", step)
    gone.peers[0].ask("close")
    assert gone.peers[0].answer() is None
    refused(gone.peers[1].answer(), f"Rank 1 lost {lost}")


def test_a_rank_that_finds_nobody_says_so(crew, tiny_llama_dir):
    alone = crew.start(tiny_llama_dir, tp=2, timeout_s=1.0, ranks=[1])
    refused(alone.connected[0], "Rank 1 of 2 could not connect")
