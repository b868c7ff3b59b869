"""Asking a running cluster over gRPC, and showing the answer as it comes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.access import Access
from ...core.errors import InvalidRequest
from ...core.generate import Finish, Generate
from ...core.request import FinishReason
from ...core.sampling import SamplingParams
from ...rpc.inference import InferenceClient, SyncInferenceClient
from .printing import InTurn, likelihoods

if TYPE_CHECKING:
    from .up import Served


DEMO_PROMPT = (
    "A diptych is a picture on two panels that are joined by a hinge. In the old days travellers carried small ones with them, "
    "closed like a book, and opened them in the evening by the light of a candle. The two panels were often painted by different "
    "hands, one quick and one patient. One of them tells how the story begins, and the other one how it goes on. "
    "The most famous of them all was painted in the year"
)
"""Some 80 tokens: a shorter prompt than `router.local_prefill_below` would be read by the decode worker, and nothing handed over."""


def read_stdin() -> str:
    """All of stdin; `InvalidRequest` if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"What came on stdin is not UTF-8: {error.reason} at byte {error.start}.", field="prompt") from None


def answer(address: str, access: Access, call: Generate, *, stats: bool) -> None:
    """Stream the answer to stdout, then what else was asked for to stderr."""
    finish: Finish | None = None
    screen = InTurn(call.sampling.n, sys.stdout.write)
    with SyncInferenceClient(address, access) as client, closing(client.generate(call)) as chunks:
        try:
            for chunk in chunks:
                screen.take(chunk)
                sys.stdout.flush()
                finish = chunk.finish or finish
        except BrokenPipeError:  # `| head`: whoever read has enough; closing the call cancels the request
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
    if call.sampling.logprobs is not None:
        for tokens in screen.tokens:
            sys.stderr.writelines(f"{line}\n" for line in likelihoods(tokens))
    if stats and finish is not None:
        for label, value in numbers(finish, screen.reasons):
            sys.stderr.write(f"{label:>16}  {value}\n")


def numbers(finish: Finish, reasons: Sequence[FinishReason | None]) -> list[tuple[str, str]]:
    """What the answer cost, as label and value. `reasons`: why each choice ended."""
    usage, timing = finish.usage, finish.timing
    why = ", ".join(reason for reason in reasons if reason)
    rows = [
        ("tokens", f"{usage.prompt_tokens} read ({usage.cached_tokens} from cache), {usage.output_tokens} written ({why})"),
        ("TTFT", _ms(timing.ttft)),
    ]
    if timing.tpot is not None:
        rows.append(("TPOT", f"{_ms(timing.tpot)} ({1 / timing.tpot:.1f} tokens/s)" if timing.tpot > 0 else _ms(timing.tpot)))
    if timing.handover_gap is not None:
        rows.append(("hand-over gap", _ms(timing.handover_gap)))
    if timing.transport:
        rows.append(("KV moved", f"{timing.kv_bytes:,} bytes in {_ms(timing.transfer_seconds)} over {timing.transport}"))
    if timing.prefill_worker or timing.decode_worker:
        path = " → ".join(worker for worker in (timing.prefill_worker, timing.decode_worker) if worker)
        rows.append(("path", path + (f", {timing.attempts} attempts" if timing.attempts > 1 else "")))
    return rows


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


@dataclass(frozen=True, slots=True)
class Demo:
    """What `diptych demo` does once the cluster serves."""

    prompt: str
    max_tokens: int
    once: bool

    async def __call__(self, served: Served) -> bool:
        call = Generate(prompt=self.prompt, sampling=SamplingParams(max_tokens=self.max_tokens, seed=1))
        finish: Finish | None = None
        reasons: list[FinishReason | None] = []
        began = False
        served.terminal.say(f"\n{self.prompt}", style="bold", end="")
        async with InferenceClient(served.grpc, served.access) as client:
            async for chunk in client.generate(call):
                if chunk.tokens and not began:
                    served.terminal.timeline.mark("cluster", "first token")
                    began = True
                served.terminal.say(chunk.text, end="")
                reasons += [chunk.reason] if chunk.reason else []
                finish = chunk.finish or finish
        assert finish is not None, "a stream that ends without an error has a finish"
        served.terminal.say("\n")
        served.terminal.table(numbers(finish, reasons))
        if served.terminal.verbose:
            served.terminal.show_timeline()
        return self.once
