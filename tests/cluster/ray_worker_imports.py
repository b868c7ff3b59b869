"""What a Ray worker of ours imports: prints, as JSON, where `proto`, `transformers` and our own `proto` come from, and its path."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from diptych.cluster.on_ray.placement import Driver
from diptych.cluster.process.spec import RaySpec
from diptych.core.fleet import Phase


def look() -> dict[str, Any]:
    import diptych.proto.worker_pb2 as ours
    import transformers

    import proto  # type: ignore[import-untyped]  # of proto-plus

    return {"proto": proto.__file__, "message": proto.Message.__name__, "transformers": transformers.__file__, "ours": ours.__file__,
            "path": sys.path, "cwd": os.getcwd()}  # fmt: skip


def main() -> None:
    driver = Driver(RaySpec(directory=Path("ray").absolute(), cores=1, wanted=((("d", Phase.DECODE, ((1, 0, 0.0, ""),), 1),),)))
    driver.connect()
    found = ray.get(ray.remote(look).options(num_cpus=0.5).remote())
    ray.shutdown()
    print(json.dumps({"event": "ready", **found}))


if __name__ == "__main__":
    main()
