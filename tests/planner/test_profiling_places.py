"""On what `diptych profile` times workers: cores, several ranks, GPUs. Steps of real ranks; of GPUs what is made of their steps."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from decoders import LLAMA, card
from diptych.cluster.cli import app
from diptych.cluster.commands import preparing
from diptych.cluster.planner.latency import StepTimes, Work, step_seconds
from diptych.cluster.planner.profile import Basis, Profile, Residuals, read_profile
from diptych.cluster.profiling import command, measuring, steps
from diptych.cluster.profiling.ends import Here
from diptych.cluster.profiling.grid import AGAIN, CHUNK, CHUNK_START, ON_GPUS, ROWS, Place, Room, Step, blocks_for
from diptych.cluster.profiling.links import LinkTimes, link_of, timed_link
from diptych.cluster.profiling.making import Crossing, Fitted, fitted_to, of_gpus, of_host
from diptych.cluster.profiling.reckoning import Answers, Moment, Prompt, Read, Together, prompt_seconds
from diptych.cluster.profiling.served import STAGES, Small, config_of
from diptych.cluster.profiling.steps import timed_steps
from diptych.cluster.resources.devices import Gpu
from diptych.core.config import load_config
from diptych.core.errors import ConfigError, ModelError, Unavailable
from diptych.core.layout import DType
from diptych.core.transfer import Transport
from diptych.kv_transfer.transports import wiring
from typer.testing import CliRunner
from worlds import TIMES

H100 = Gpu("0", "NVIDIA H100 80GB HBM3", 80 << 30)
EXACT = Residuals(points=1, mean=0.0, worst=0.0)
ROOM = Room(50_000)
MODEL = card(LLAMA, DType.BFLOAT16, 256).model_copy(update={"max_context": 16384, "weights_bytes": 1 << 30})
LINK = LinkTimes(0.0001, tuple((size, 0.0003 + size / 1e10) for size in (10**6, 2 * 10**6, 4 * 10**6)))
CROSSINGS = {"any": Crossing(*link_of(LINK), LINK.message)}


def of_tp(tp: int) -> StepTimes:
    """A tp-th of all, as if shards had nothing to say to each other."""
    prefill, decode = ({name: value / tp for name, value in part.model_dump().items()} for part in (TIMES.prefill, TIMES.decode))
    return StepTimes.model_validate({"prefill": prefill, "decode": decode, "hop": TIMES.hop})


def work_of(what: str, batch: int, length: int) -> Work:
    if what == "prefill":
        return Work(tokens=batch * length, pairs=batch * length**2)
    rows = Work(rows=batch, context=batch * length)
    return rows if what == "decode" else replace(rows, tokens=CHUNK, pairs=CHUNK * (2 * CHUNK_START + CHUNK))


def exact_steps(model_dir: Path, place: Place, repeats: int, asked: Sequence[tuple[str, int, int]]) -> Iterator[Room | Step]:
    """What a machine without noise would say, whose pool has no room for the longest, and for less of all while larger ones are timed."""
    yield Room(ROOM.tokens - 1000) if asked else ROOM
    for step in asked:
        if 16 * blocks_for(*step) <= ROOM.tokens:
            yield Step(*step, step_seconds(of_tp(place.tp), work_of(*step)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Profile]:
    """`diptych profile` on a machine that has these GPUs, or cores alone."""

    def measure(*arguments: str, gpus: Sequence[Gpu] = (), link: Callable[..., LinkTimes] = lambda *asked: LINK) -> Profile:
        monkeypatch.setattr(preparing, "prepare_here", lambda *values: tmp_path)
        monkeypatch.setattr(command, "chosen", lambda device, there, cuda: gpus)
        monkeypatch.setattr(measuring, "read_card", lambda directory: MODEL)
        monkeypatch.setattr(measuring, "timed_steps", exact_steps)
        monkeypatch.setattr(measuring, "timed_link", link)
        monkeypatch.setattr(wiring, "installed", lambda: True)
        out = tmp_path / "P.json"
        result = CliRunner().invoke(app, ["profile", "--out", str(out), *arguments], catch_exceptions=False)
        if result.exit_code:
            raise ConfigError(result.stdout + result.stderr)
        return read_profile(out)

    return measure


def test_workers_of_several_ranks_are_timed_beside_those_of_one(machine: Callable[..., Profile]) -> None:
    tps = [tp for tp in (2, 4) if tp <= len(os.sched_getaffinity(0))]
    arguments = [word for tp in tps for word in ("--tp", str(tp))]
    found = machine("--no-clusters", "--threads", "1", *arguments)
    assert [each.tp for each in found.parallelisms] == [1, *tps]
    assert found.cores is not None
    for each in found.parallelisms:
        assert each.error == 0
        for work in (Work(tokens=300, pairs=300**2), Work(rows=3, context=900)):
            assert step_seconds(each.times, work) == pytest.approx(step_seconds(of_tp(each.tp), work))
    one, *others = (found.kv_tokens(each.tp, 1) for each in found.parallelisms)
    assert all(other == pytest.approx(one * 2, abs=16) for other in others), "each has half of the KV heads, of which there are two"
    assert found.basis["step"] is Basis.ASSUMED


def test_serving_adds_as_much_to_a_step_of_several_ranks_as_of_one() -> None:
    serving = TIMES.model_copy(update={"step": 0.002, "step_row": 0.0005})
    here, two = Fitted(Place(((0,),)), 0, serving, EXACT, EXACT, {}), Fitted(Place(((0,), (1,))), 0, of_tp(2), EXACT, EXACT, {})
    known = of_host(MODEL, 2, (1, 1), {1: here, 2: here}, (two,), CROSSINGS, None, 1 << 34).parallelism(2)
    assert known is not None
    assert (known.times.step, known.times.step_row) == (0.002, 0.0005)
    assert known.times.decode == of_tp(2).decode


def test_gpus_are_timed_as_workers_of_as_many_ranks(machine: Callable[..., Profile]) -> None:
    found = machine("--no-clusters", "--tp", "4", "--tp", "2", gpus=[replace(H100, key=str(number)) for number in range(4)])
    assert [each.tp for each in found.parallelisms] == [2, 4], "what is named, and no other"
    assert (found.device.name, found.device.memory_bytes) == ("H100", 80 << 30)
    assert not found.on_cpu
    assert set(found.links) == {"nccl", "cuda_ipc"}
    for each in found.parallelisms:
        assert found.kv_tokens(each.tp, 1) == ROOM.tokens, "as the pool was"
        assert each.decode_residuals is not None
        assert each.decode_residuals.worst < 1e-6
    assert found.basis["kv_tokens"] is Basis.MEASURED


def test_without_a_tp_a_worker_is_one_gpu(machine: Callable[..., Profile]) -> None:
    assert [each.tp for each in machine("--no-clusters", gpus=[H100, H100]).parallelisms] == [1]


def test_a_small_cluster_tells_what_serving_adds_on_gpus(machine: Callable[..., Profile], monkeypatch: pytest.MonkeyPatch) -> None:
    """One, of a worker of the least tp for both phases, on a machine that is as fast as at first."""
    asked: list[object] = []
    serving = of_tp(2).model_copy(update={"step": 0.001, "step_row": 0.0002})

    def answers(rows: int) -> Answers:
        return Answers(rows, 16 * rows, step_seconds(serving, Work(rows=rows, context=16 * rows)))

    def prompt(tokens: int) -> Prompt:
        computed = prompt_seconds(of_tp(2), tokens, 64)
        return Prompt(tokens, computed + 0.003, computed)

    read = Read(64, 96, 6, 300, 0.0)
    read = replace(read, seconds=step_seconds(serving, read.work) + 0.004)
    together = Together(tuple(map(prompt, (64, 160, 256))), tuple(map(answers, ROWS)), read, 64)

    def watched(kind: type, small: Small, repeats: int) -> Iterator[Any]:
        asked.append((kind, small.tp))
        yield from STAGES[kind]
        yield together

    monkeypatch.setattr(measuring, "watched", watched)
    found = machine("--tp", "2", "--tp", "4", gpus=[H100] * 4)
    assert asked == [(Together, 2)]
    for each in found.parallelisms:
        assert (each.times.step, each.times.step_row) == pytest.approx((0.001, 0.0002))
    assert found.parallelisms[0].times.both == pytest.approx(0.004, rel=0.01)
    assert found.overheads.request == pytest.approx(0.003)
    assert found.basis["step"] is Basis.MEASURED


def test_a_slower_hour_is_taken_out_of_what_a_cluster_on_gpus_showed() -> None:
    fitted = fitted_to(Place(gpus=("0",)), list(exact_steps(Path(), Place(gpus=("0",)), 1, ON_GPUS.steps(16384))))
    answers = tuple(Answers(rows, 16 * rows, 0.03) for rows in ROWS)
    seen = Together((Prompt(64, 0.1, 0.05),), answers, Read(64, 96, 6, 300, 0.1), 64)
    moment = Moment(1.0, 1.0, dict.fromkeys(ROWS, 0.028))
    made = of_gpus(MODEL, H100, [fitted], CROSSINGS, (seen, moment))
    assert made.parallelisms[0].times.step == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("arguments", "gpus", "said"),
    [
        (["--tp", "3"], [H100] * 4, "tp 3 does not split tiny"),
        (["--tp", "4"], [H100] * 2, "--tp 4: a rank has a GPU of its own, and this host has 2"),
        ([], [H100, Gpu("1", "NVIDIA L40S", 48 << 30)], "name those to measure in CUDA_VISIBLE_DEVICES"),
        (["--tp", "4", "--threads", "2"], [], "--tp 4: 4 ranks of 2 threads take more than the 2 cores"),
        (["--threads", "3"], [], "--threads 3: this process may use 2 cores"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    arguments: list[str], gpus: list[Gpu], said: str, machine: Callable[..., Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring.os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(ConfigError) as caught:
        machine("--no-clusters", *arguments, gpus=gpus)
    assert said in " ".join(caught.value.message.split())


def test_a_transport_over_which_nothing_moves_is_left_out_and_said(machine: Callable[..., Profile]) -> None:
    def over(broken: set[Transport]) -> Callable[..., LinkTimes]:
        def timed(layout: object, transport: Transport, runs: int, gpus: Sequence[str]) -> LinkTimes:
            if transport in broken:
                raise Unavailable("the two GPUs cannot reach each other.")
            return LINK

        return timed

    found = machine("--no-clusters", gpus=[H100, H100], link=over({Transport.CUDA_IPC}))
    assert set(found.links) == {"nccl"}
    with pytest.raises(ConfigError, match="Error: the two GPUs cannot reach each other") as caught:
        machine("--no-clusters", gpus=[H100, H100], link=over({Transport.CUDA_IPC, Transport.NCCL}))
    assert "KV over cuda_ipc could not be timed" in caught.value.message


def test_a_transfer_that_fails_ends_the_timing_of_its_link() -> None:
    """Also one that fails before anybody waits for it."""

    async def fail() -> None:
        here = Here.__new__(Here)
        here._waits, here._error = {}, None
        before = here.wait("granted", "0")
        here.failed("0", Unavailable("the pair is lost"))
        for waiting in (before, here.wait("released", "1")):
            with pytest.raises(Unavailable, match="the pair is lost"):
                await waiting
        for what, come in (("granted", here.granted), ("released", here.released)):
            come("2")  # what follows on it is not taken for a transfer
            with pytest.raises(Unavailable):
                await here.wait(what, "2")

    asyncio.run(fail())


def test_a_link_whose_other_end_has_no_room_says_so() -> None:
    """Both ends are real; the pool is larger than any host's memory."""
    layout = MODEL.layout(block_size=16, kv_tokens=1 << 36)
    with pytest.raises(ConfigError, match="needs"):
        timed_link(layout, Transport.SHM, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090"),
    ],
)
def test_a_gpu_is_called_as_ray_calls_it(name: str, kind: str) -> None:
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    assert Gpu("0", name, 1).kind == kind == NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name)


def test_places_say_what_they_are() -> None:
    places = [Place(((0,),)), Place(((0, 1),)), Place(((0,), (1,))), Place(gpus=("0",)), Place(gpus=("0", "1"))]
    assert list(map(str, places)) == ["1 core", "2 cores", "2 × 1 core", "a GPU", "2 GPUs"]


def test_a_small_cluster_on_gpus_has_workers_of_that_tp() -> None:
    config = load_config(config_of(Small(Path("/model"), "bfloat16", tp=2), prefill=0))
    assert (config.device, config.decode.tp, config.decode.workers, config.prefill.workers) == ("cuda", 2, 1, 0)
    on_cores = load_config(config_of(Small(Path("/model"), "bfloat16", threads=3), prefill=1))
    assert (on_cores.device, on_cores.decode.threads, on_cores.prefill.threads, on_cores.decode.tp) == ("cpu", 3, 3, 1)


TWO = Place(((0,), (1,)) if len(os.sched_getaffinity(0)) > 1 else ((0,), (0,)))


def test_a_usual_worker_tells_how_much_room_there_is(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no steps: the settings are those of a config that names none."""
    spec = steps._spec(tiny_llama_dir, Place(gpus=("3", "5")), 1, ())
    config = load_config({"model": {"source": "m"}})
    assert (spec.max_running, spec.chunk_tokens) == (config.decode.max_running, config.prefill.chunk_tokens)
    assert (spec.device, spec.gpu, spec.rank, spec.tp, spec.kv_tokens) == ("cuda", "5", 1, 2, None)


def test_real_ranks_make_each_step_together(tiny_llama_dir: Path) -> None:
    asked = [*AGAIN, ("both", 2, 64)]
    room, *timed = timed_steps(tiny_llama_dir, TWO, 1, asked)
    assert room == Room(16 * max(blocks_for(*step) for step in asked))
    assert [(each.what, each.batch, each.length) for each in timed] == asked  # type: ignore[union-attr]
    assert all(each.seconds > 0 for each in timed)  # type: ignore[union-attr]
    assert not multiprocessing.active_children()


def test_a_rank_that_dies_ends_the_measuring(tiny_llama_dir: Path) -> None:
    told = timed_steps(tiny_llama_dir, TWO, 1, [("prefill", 1, 16)] * 100_000)
    next(told)
    follower = multiprocessing.active_children()[-1]
    follower.kill()
    with pytest.raises(Unavailable, match=r"ended before it was through|lost rank"):
        list(told)
    assert not multiprocessing.active_children()


def test_ranks_that_say_nothing_are_not_waited_for_for_ever() -> None:
    ear, _mouth = multiprocessing.Pipe(duplex=False)
    with pytest.raises(Unavailable, match="have said nothing for"):
        list(steps._told([ear], 0.01))


def test_a_link_whose_process_fails_otherwise_says_what_it_was() -> None:
    with pytest.raises(Unavailable, match=r"AttributeError: .*NoneType"):
        timed_link(None, Transport.SHM, 1)  # type: ignore[arg-type]


def test_what_keeps_a_rank_from_loading_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        list(timed_steps(tmp_path, TWO, 1, list(AGAIN)))
    assert not multiprocessing.active_children()
