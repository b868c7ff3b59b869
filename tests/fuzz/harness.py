"""Whatever bytes come, a parser takes them or refuses them by `InvalidRequest`: atheris looks for bytes with which it does neither.

    python tests/fuzz/harness.py codec|bodies CORPUS [libFuzzer's options, such as -max_total_time=300]

CORPUS is a directory; valid messages are put there to begin with.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["diptych"]):
    from diptych.core.commands import Decode, Failed, FirstTokens, NewTokens, Prefill, StepEvents, Stop
    from diptych.core.errors import InvalidRequest
    from diptych.core.fleet import Fleet, Member, Phase, WorkerReport, WorkerState
    from diptych.core.generate import Chunk, Finish, Generate, Timing, Usage
    from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
    from diptych.core.request import FinishReason, Request, Token, Tokens
    from diptych.core.transfer import KeepAlive
    from diptych.router.bodies import ChatBody, CompletionBody, parse_body
    from diptych.rpc import codec_commands, codec_fleet, codec_inference, codec_lane, codec_spans

Parser = Callable[[bytes], object]
MOST_BYTES = 2 << 30
"""That a parser may take. libFuzzer's own limit is of the most that the process has ever held, and Linux begins that count with what the
one that started it held: a test run that has had a model in memory."""


def _bodies() -> list[Parser]:
    def completion(raw: bytes) -> None:
        body = parse_body(CompletionBody, raw)
        body.check_limits(1000)
        body.generate(body.prompt, "r", max_tokens=16, logprobs=body.logprobs)

    def chat(raw: bytes) -> None:
        body = parse_body(ChatBody, raw)
        body.check_limits(1000)
        body.generate(" ", "r", max_tokens=16, logprobs=body.logprob_count)
        body.plain_messages()

    return [completion, chat]


PARSERS: dict[str, list[Parser]] = {
    "codec": [
        codec_inference.decode_generate,
        codec_inference.decode_chunk,
        codec_inference.decode_models,
        codec_commands.decode_command,
        codec_commands.decode_step_events,
        codec_fleet.decode_fleet,
        codec_fleet.decode_fleet_status,
        codec_fleet.decode_report,
        codec_lane.decode_lane_messages,
        codec_spans.decode_spans_command,
        codec_spans.decode_spans_answer,
    ],
    "bodies": _bodies(),
}


def seeds(target: str) -> list[bytes]:
    """Valid messages."""
    if target == "bodies":
        sampling = {"max_tokens": 3, "temperature": 0.5, "stop": ["a"], "logit_bias": {"1": 2}, "n": 2, "stream": True}
        messages = [{"role": "user", "content": [{"type": "text", "text": "é"}]}]
        return [json.dumps({"prompt": [1, 2], **sampling}).encode(), json.dumps({"messages": messages, **sampling}).encode()]
    layout = Layout("f", (CacheGroup(CacheKind.FULL, (0, 1), 2, 8, DType.FLOAT32),), 16, (8,), tp=2)
    request = Request("r", "m", (Tokens((1, 2, 3)),), generated=((4,),), tenant="t")
    token = Token(0, 5, -0.5, ((5, -0.5),))
    report = WorkerReport("w", 7, WorkerState.READY, 1, 2, 3, 4, 5, 6, (("n", 1.5),))
    fleet = Fleet(3, (Member("w", "h:1", Phase.DECODE, 7, layout, 100),))
    events = (FirstTokens("a", (token,), (None,)), NewTokens("a", (token,)), Failed("a", InvalidRequest("no", field="f")))
    return [
        codec_inference.encode_generate(Generate("text", stop=("x",))),
        codec_inference.encode_chunk(Chunk("r", "t", (token,), Finish(Usage(1, 2), Timing(0.5)), reason=FinishReason.STOP)),
        *map(codec_commands.encode_command, (Prefill("a", request, "h:1"), Decode("a", request), Stop("a", 1))),
        codec_commands.encode_step_events(StepEvents(events)),
        codec_fleet.encode_fleet(fleet),
        codec_fleet.encode_fleet_status((fleet, (report,))),
        codec_fleet.encode_report(report),
        codec_lane.encode_lane_message(KeepAlive(("t",))),
    ]


def main() -> None:
    target, corpus = sys.argv[1], Path(sys.argv[2])
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed-{number}").write_bytes(seed)
    parsers = PARSERS[target]

    def once(data: bytes) -> None:
        for parse in parsers:
            try:
                parse(data)
            except InvalidRequest as error:
                if error.field is None:
                    raise AssertionError("a refusal that names no field") from error

    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    options = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=0", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], str(corpus), *options, *sys.argv[3:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
