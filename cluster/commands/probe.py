"""What `diptych up --verbose` does once the cluster serves: ask for two tokens, and show what happened when."""

from __future__ import annotations

from ...core.generate import Generate
from ...core.sampling import SamplingParams
from ...rpc.inference import InferenceClient
from .up import Served

PROBE_TOKENS = 32


async def probe(served: Served) -> bool:
    """Ask for two tokens behind a prompt long enough to be handed over, and print the time line with the first."""
    if served.access.api_key is None and served.wants_key:
        served.terminal.warn("No DIPTYCH_API_KEY is set, so the cluster was not asked for a first token.")
        served.terminal.show_timeline()
        return False
    prompt = tuple(range(PROBE_TOKENS))
    call = Generate(prompt, sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    async with InferenceClient(served.grpc, served.access) as client:
        async for chunk in client.generate(call):
            if chunk.tokens or chunk.finish:
                served.terminal.timeline.mark("cluster", "last token" if chunk.finish else "first token")
    served.terminal.show_timeline()
    return False
