"""schemathesis as it comes, all its default checks, against the served document and real ranks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from diptych.core.fleet import LocalPrefill, Phase
from diptych.core.layout import DType
from diptych.engine.prepared import prepare
from e2e_harness import Rank, rank_spec, ranks
from router_harness import idle, router
from tokenizers import Regex, Tokenizer, normalizers

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CONTEXT = 256
ENDS = [1, *range(263, 512)]
"""Half of the vocabulary ends the output, so that most answers are short."""


@pytest.fixture(scope="module")
def workers(write_llama: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    """Their tokenizer reads what is no letter as one space: the fuzzer's texts are long, and most of it is none. Only a text that is too
    long is refused though the document calls it valid."""
    directory = tmp_path_factory.mktemp("fuzzed")
    source = directory / "tiny"
    write_llama(source, eos_token_id=ENDS, max_position_embeddings=CONTEXT)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(Regex("[^a-z]+"), " ")
    tokenizer.save(str(source / "tokenizer.json"))
    template = directory / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    prepare(str(source), directory / "prepared", dtype=DType.FLOAT32, chat_template=template)
    specs = [
        rank_spec(directory / "prepared", phase, phase.value, kv_tokens=16 * CONTEXT, max_running=32)
        for phase in (Phase.PREFILL, Phase.DECODE)
    ]
    with ranks(directory, *specs) as started:
        yield started


async def fuzz(workers: list[Rank], directory: Path, *options: str) -> str:
    """What schemathesis said; fails with it if it found something."""
    async with router(workers, LocalPrefill.AUTO) as running:
        process = await asyncio.create_subprocess_exec(
            SCHEMATHESIS, "run", f"http://{running.http}/openapi.json", "--no-color", *options,
            cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, said
        await idle(running)
        return said


@pytest.mark.timeout(300)
def test_a_schema_fuzzer_finds_nothing(workers: list[Rank], tmp_path: Path) -> None:
    print(asyncio.run(fuzz(workers, tmp_path, "--max-examples", "5", "--seed", "1")))
    assert all(rank.alive for rank in workers)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_schema_fuzzer_finds_nothing_in_many_tries(workers: list[Rank], tmp_path: Path) -> None:
    print(asyncio.run(fuzz(workers, tmp_path, "--max-examples", "1000")))
    assert all(rank.alive for rank in workers)
