"""Simulated requests: what stands for their prefix hashes."""

import random

from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.life import TOKEN, hashes_of, request_of
from diptych.core.prefix import chained


def test_simulated_hashes_are_equal_where_those_of_a_server_are() -> None:
    draw = random.Random(6)
    prompts = [
        Arrival(
            n,
            0.0,
            draw.randint(1, 200),
            draw.choice((1, 5, 40)),
            0,
            draw.choice("ab"),
            draw.randint(0, 2),
            draw.choice((0, 16, 40, 64, 300)),
        )
        for n in range(120)
    ]
    requests = [request_of(arrival, 4096) for arrival in prompts]
    real = [h for each in requests for h in chained(each.tenant.encode(), each.token_ids + (TOKEN,) * each.sampling.max_tokens)]
    ours = [h for each in requests for h in hashes_of(each, each.token_ids)]
    assert len(ours) == len(real)
    assert len(set(zip(ours, real, strict=True))) == len(set(ours)) == len(set(real)) < len(real)
