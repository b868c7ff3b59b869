"""Make the Python stubs of proto/*.proto.

python .ci/stubs.py            write them to proto/
python .ci/stubs.py --check    write nothing; fail and name the files that differ from what would be written
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parents[1] / "proto"


def generate(out: Path) -> dict[str, str]:
    """All generated files by name, written below `out` on the way. The sources are compiled as `diptych/proto/*.proto`,
    whatever the checkout's folder is called, so that the stubs import each other as `diptych.proto`."""
    from grpc_tools import protoc

    sources = [f"diptych/proto/{source.name}" for source in sorted(PROTO.glob("*.proto"))]
    flags = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", "-I", f"diptych/proto={PROTO}", *flags, *sources]) != 0:
        raise SystemExit("protoc failed")
    files = sorted((out / "diptych" / "proto").iterdir())
    return {file.name: file.read_text() for file in files}


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as out:
        fresh = generate(Path(out))
    present = {file.name: file.read_text() for file in PROTO.glob("*_pb2*.py*")}
    differing = sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))
    if "--check" in arguments:
        for name in differing:
            print(f"proto/{name} is not what proto/*.proto says: run `make stubs`", file=sys.stderr)
        return int(bool(differing))
    for name in present.keys() - fresh.keys():
        (PROTO / name).unlink()
    for name, text in fresh.items():
        (PROTO / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
