"""Small profiles and loads that the planner's tests share."""

from __future__ import annotations

from collections.abc import Iterator

from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.latency import DecodeTimes, PrefillTimes, StepTimes
from diptych.cluster.planner.life import Life
from diptych.cluster.planner.policies import Policies
from diptych.cluster.planner.profile import DeviceShare, Hardware, Link, Model, Overheads, Parallelism, Profile
from diptych.cluster.planner.world import World
from diptych.core.fleet import LocalPrefill, Phase

TIMES = StepTimes(
    prefill=PrefillTimes(constant=0.01, token=1e-4, pair=1e-9), decode=DecodeTimes(constant=0.02, context=1e-6, row=1e-4), hop=0.001
)
MODEL = Model(name="m", dtype="bfloat16", layers=10, heads=8, kv_heads=8, max_context=2048, kv_token_bytes=1e5, weight_bytes=1e9)
APART = Policies(local_prefill=LocalPrefill.NEVER, most_running=None)


def profile(**changes: object) -> Profile:
    values: dict[str, object] = {
        "source": "made up",
        "model": MODEL,
        "device": DeviceShare(name="d", memory_bytes=10e9),
        "parallelisms": (Parallelism(tp=1, times=TIMES, kv_tokens={1: 16000, 2: 32000}),),
        "links": {"node": Link(bytes_per_s=1e10)},
        "overheads": Overheads(request=0.005),
    }
    return Profile.model_validate(values | changes)


def workers(prefills: int, decodes: int, *, kv: tuple[int, int] = (16000, 16000), pp: tuple[int, int] = (1, 1)) -> list[Hardware]:
    return [Hardware(Phase.PREFILL, 1, pp[0], TIMES, kv[0])] * prefills + [Hardware(Phase.DECODE, 1, pp[1], TIMES, kv[1])] * decodes


def evenly(count: int, every: float, prompt: int = 100, output: int = 10) -> Iterator[Arrival]:
    return (Arrival(number, number * every, prompt, output) for number in range(count))


def run(arrivals: Iterator[Arrival], hardware: list[Hardware], policies: Policies = APART, **settings: object) -> tuple[World, list[Life]]:
    """Simulate all of it, and see that nothing is left."""
    lives: list[Life] = []
    world = World(profile(), hardware, policies, on_end=lives.append, **settings)  # type: ignore[arg-type]
    world.run(arrivals)
    world.check()
    return world, sorted(lives, key=lambda life: life.arrival.number)
