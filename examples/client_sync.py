"""Stream one answer: `python examples/client_sync.py --address 127.0.0.1:50051 "Once upon a time"`."""

import argparse
import sys

from diptych.client.sync import Client
from diptych.core.errors import DiptychError


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the answer to a prompt as it is written.")
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:50051", help="the router's gRPC face")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    with Client(args.address) as client:
        for chunk in client.stream(args.prompt, max_tokens=args.max_tokens):
            print(chunk.text, end="", flush=True)
            if chunk.finish:
                print(f"\n[{chunk.finish.usage.output_tokens} tokens, the first after {chunk.finish.timing.ttft:.3f} s]")


if __name__ == "__main__":
    try:
        main()
    except DiptychError as error:
        sys.exit(f"{error.code}: {error.message}")
