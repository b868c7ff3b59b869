"""Several answers at once: `python examples/client_async.py --address 127.0.0.1:50051 "Once upon a time" "In the year 3000"`."""

import argparse
import asyncio
import sys

from diptych.client.aio import AsyncClient
from diptych.core.errors import DiptychError


async def main() -> None:
    parser = argparse.ArgumentParser(description="Answer all prompts concurrently.")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--address", default="127.0.0.1:50051", help="the router's gRPC face")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    async with AsyncClient(args.address) as client:
        answers = await asyncio.gather(*(client.generate(prompt, max_tokens=args.max_tokens) for prompt in args.prompts))
    for prompt, answer in zip(args.prompts, answers, strict=True):
        print(f"{prompt}{answer.text}\n[{answer.usage.output_tokens} tokens, the first after {answer.timing.ttft:.3f} s]\n")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except DiptychError as error:
        sys.exit(f"{error.code}: {error.message}")
