"""float16 through real processes: prefilled at one worker, decoded at another, the tokens of one that does both."""

from __future__ import annotations

import asyncio
from pathlib import Path

from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.engine.prepared import prepare
from e2e_harness import attached, rank_spec, ranks, request


def test_kv_in_float16_is_handed_over(tiny_llama_source: Path, tmp_path: Path) -> None:
    prepare(str(tiny_llama_source), tmp_path / "half", dtype=DType.FLOAT16)
    prompt = range(3, 80)

    async def main() -> None:
        specs = [rank_spec(tmp_path / "half", phase, phase.value, chunk_tokens=32) for phase in Phase]
        with ranks(tmp_path, *specs) as (prefill, decode):
            async with attached(prefill, decode) as workers:
                apart = await workers.disaggregated(request(prompt, max_tokens=16))
                alone = await workers.local(request(prompt, max_tokens=16))
                assert apart.error is alone.error is None
                assert apart.tokens == alone.tokens
                assert apart.handed_over is not None
                assert apart.handed_over.kv_bytes == 3 * len(prompt) * 2 * 2 * 16 * 2
                await workers.idle()

    asyncio.run(main())
