"""The load generator against the router: it takes every field the generator would like to use, and both tell the same story."""

import asyncio
from itertools import islice

from diptych.cluster.load.answer import Counting
from diptych.cluster.load.choice import Load
from diptych.cluster.load.dialect import Dialect
from diptych.cluster.load.measure import measure
from diptych.cluster.load.server import find_server


def test_the_router_tells_a_load_generator_all_it_asks_for(site):
    async def check():
        async with site() as s:
            server = await find_server(s.url, model=None, api_key=None, vocabulary=500, seed=1, timeout_s=30.0, as_text=False)
            assert server.dialect == Dialect()
            assert server.model == "tiny"
            load = Load(input="20-40", output="24").arrivals(50.0)  # 24 tokens: all of a text in which one character takes two
            run = await measure(server, islice(load, 10), asyncio.Event(), lambda run: None)
            for answer in run.answers:
                assert answer.error is None
                assert len(answer.token_times) == answer.output_tokens == 24
                assert answer.counting is Counting.USAGE
                assert answer.handed_over
                assert 0 < answer.server_ttft <= answer.ttft
                assert answer.prompt_tokens == answer.arrival.prompt_tokens

    asyncio.run(check())
