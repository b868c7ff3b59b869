"""Recorded workloads and mixes."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
from diptych.cluster.load.mix import parse_mix
from diptych.cluster.load.traces import read_arrivals
from diptych.core.errors import ConfigError

HEAD = "arrival_s,prompt_tokens,output_tokens\n"


def rows(text: str) -> list[tuple[float, int, int]]:
    return [(a.at, a.prompt_tokens, a.output_tokens) for a in read_arrivals(text.splitlines(keepends=True), "W")]


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "0,10,2\n1.5,20,3\n",
        "prompt_tokens,output_tokens,arrival_s\r\n10,2,0\r\n20,3,1.5\r\n",
        '{"arrival_s": 0, "prompt_tokens": 10, "output_tokens": 2}\n\n{"arrival_s": 1.5, "prompt_tokens": 20, "output_tokens": 3}\n',
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,10,2,12,API\n6.5,GPT-4,20,3,23,API\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.5000000,10,2\n2023-11-17 00:00:01.0000000,20,3\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-02-29 23:59:59.500000+00:00,10,2\n2024-03-01 00:00:01+00:00,20,3\n",
    ],
)
def test_every_format_says_the_same(text: str) -> None:
    assert rows(text) == [(0.0, 10, 2), (1.5, 20, 3)]


def test_tenants_and_prefixes_are_read() -> None:
    text = "arrival_s,prompt_tokens,output_tokens,tenant,prefix,prefix_tokens\n0,100,2,a,3,64\n"
    (arrival,) = read_arrivals(text.splitlines(), "W")
    assert (arrival.tenant, arrival.prefix, arrival.prefix_tokens) == ("a", 3, 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "W has no requests"),
        (HEAD, "W has no requests"),
        (HEAD + "2,10,2\n1,10,2\n", "W, line 3: arrival_s goes back from 2 to 1"),
        (HEAD + "-1,10,2\n", "W, line 2: arrival_s is -1: a request cannot come before"),
        (HEAD + "0,-10,2\n", "W, line 2: prompt_tokens is -10; it must be a whole number, at least 1"),
        (HEAD + "0,10,0\n", "W, line 2: output_tokens is 0; .*a call that failed"),
        (HEAD + "0,10,2.5\n", "W, line 2: output_tokens is 2.5"),
        (HEAD + "0,10,x\n", "W, line 2: output_tokens is 'x', not a number"),
        (HEAD + "0,1e300,2\n", "W, line 2: prompt_tokens is 1e300; the most is 1,000,000,000 tokens"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1e300}\n', "W, line 1: output_tokens is 1e.300; the most is"),
        ("Timestamp,Request tokens,Response tokens\n5,10,0\n", "W has no requests"),
        (HEAD + "nan,10,2\n", "W, line 2: arrival_s is nan, not a time"),
        (HEAD + "0,10\n", "W, line 2: 2 cells under 3 columns"),
        ("time,prompt,output\n0,1,1\n", "W, line 1: columns are time, prompt, output; there should be arrival_s"),
        ("arrival_s,prompt_tokens,prompt_tokens,output_tokens\n0,1,2,3\n", "W, line 1: two columns are called prompt_tokens"),
        ('{"arrival_s": 0\n', "W, line 1: not JSON"),
        ('{"arrival_s": 0, "prompt_tokens": 1}\n', "W, line 1: output_tokens is None, not a number"),
    ],
)
def test_what_is_wrong_is_refused_with_line_and_reason(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rows(text)


def test_calls_that_failed_are_left_out_of_what_others_recorded_and_told() -> None:
    text = "Timestamp,Model,Request tokens,Response tokens\n3,m,0,0\n5,m,10,2\n6,m,7,0\n6.5,m,20,3\n"
    failed: list[int] = []
    found = list(read_arrivals(text.splitlines(), "W", failed.append))
    assert [(a.number, a.at, a.prompt_tokens) for a in found] == [(0, 0.0, 10), (1, 1.5, 20)]
    assert failed == [2, 4]


def test_a_file_is_read_as_far_as_it_is_asked_for() -> None:
    def endless():  # type: ignore[no-untyped-def]
        yield HEAD
        number = 0
        while True:
            yield f"{number},10,2\n"
            number += 1

    assert [a.at for a in islice(read_arrivals(endless(), "W"), 3)] == [0.0, 1.0, 2.0]


MIX = """{"streams": [
 {"tenant": "chat", "rate": 3, "prompt": "100-200", "output": "50", "prefixes": 2, "prefix_tokens": 320},
 {"tenant": "batch", "rate": 1, "burstiness": 0.3, "pairs": [[1000, 10], [2000, 20]]}]}"""


def test_a_mix_has_its_streams_in_their_proportion() -> None:
    mix = parse_mix(MIX, "mix.json")
    made = list(islice(mix.arrivals(8.0), 4000))
    assert [a.number for a in made] == list(range(4000))
    assert all(a.at <= b.at for a, b in pairwise(made))
    assert 4000 / made[-1].at == pytest.approx(8.0, rel=0.1)
    chat = [a for a in made if a.tenant == "chat"]
    assert len(chat) == pytest.approx(3000, rel=0.05)
    assert {a.prefix for a in chat} == {1, 2}
    assert all(420 <= a.prompt_tokens <= 520 for a in chat), "its own, behind the prefix"
    assert {(a.prompt_tokens, a.output_tokens) for a in made if a.tenant == "batch"} == {(1000, 10), (2000, 20)}
    assert list(islice(mix.arrivals(8.0), 50)) == made[:50], "the same seed, the same load"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"rate": 3', '"rate": 0'), "streams.0.rate"),
        (('"100-200"', '"200-100"'), "streams.0.prompt"),
        (('"tenant": "batch"', '"tennant": "batch"'), "streams.1.tennant"),
        (("[1000, 10]", "[1000, 0]"), "streams.1.pairs"),
        (("]}", ""), "not valid JSON"),
        ((MIX, "[[0, 10, 2]]"), "mix.json is no object, and a mix is one with `streams`"),
    ],
)
def test_a_wrong_mix_is_refused_by_key(change: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_mix(MIX.replace(*change), "mix.json")
