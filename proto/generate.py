"""Make the Python stubs from the `.proto` files: `python proto/generate.py` writes them, `--check` only compares.

Needs grpcio-tools in the version that the constraints pin; another version may write other text. Only messages are generated:
`rpc/` takes services and methods from the descriptors and speaks bytes to grpc, so there are no service stubs to keep.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parent


def generate(out: Path) -> dict[str, str]:
    """Text of every stub by file name, freshly made below `out`."""
    sources = sorted(PROTO.glob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-Idiptych/proto={PROTO}"),
            *(f"--python_out={out}", f"--pyi_out={out}"),
            *(f"diptych/proto/{source.name}" for source in sources),
        ],
        check=True,
    )
    return {path.name: path.read_text() for path in sorted((out / "diptych" / "proto").iterdir())}


def stale(fresh: dict[str, str]) -> list[str]:
    """Names of stubs that are missing, different, or left over from a source that is gone."""
    present = {path.name: path.read_text() for path in PROTO.glob("*_pb2*.py*")}
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the Python stubs from the .proto files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a stub is not what the sources say")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as out:
        fresh = generate(Path(out))
    names = stale(fresh)
    if check:
        if names:
            print(f"not what the .proto files say: {', '.join(names)}; run `python proto/generate.py`", file=sys.stderr)
        return 1 if names else 0
    for name in names:
        path = PROTO / name
        if name in fresh:
            path.write_text(fresh[name])
        else:
            path.unlink()
        print(f"{'wrote' if name in fresh else 'removed'} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
