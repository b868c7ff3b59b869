"""Someone with nothing but `inference.proto` and their own protoc can call the server; and our own stubs are what the sources say."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from diptych.proto import inference_pb2

PROTO = Path(inference_pb2.__file__).parent
SITE_PACKAGES = Path(grpc.__file__).parent.parent

STRANGER = """
import importlib.util, json, sys
import grpc, inference_pb2 as pb, inference_pb2_grpc

assert importlib.util.find_spec("diptych") is None
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = inference_pb2_grpc.InferenceStub(channel)
    models = [model.id for model in stub.ListModels(pb.ListModelsRequest()).models]
    answer = list(stub.Generate(pb.GenerateRequest(text="never more", sampling=pb.Sampling(temperature=0))))
    refused = None
    try:
        list(stub.Generate(pb.GenerateRequest(text="x", sampling=pb.Sampling(max_tokens=0))))
    except grpc.RpcError as error:
        refused = [error.code().name, error.details(), dict(error.trailing_metadata())["diptych-field"]]
said = [[message.text, [token.id for token in message.tokens], message.reason] for message in answer]
print(json.dumps({"models": models, "said": said, "refused": refused}))
"""


def test_stubs_made_by_a_stranger_work_unchanged(tmp_path: Path, serving: Any, parrot: Callable[[], Any]) -> None:
    shutil.copy(PROTO / "inference.proto", tmp_path)
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--grpc_python_out=.", "inference.proto"]
    subprocess.run(protoc, cwd=tmp_path, check=True, timeout=60)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{SITE_PACKAGES}"}

    def call(address: str) -> subprocess.CompletedProcess[str]:
        # -S: site-packages as a plain folder, so that the editable install of diptych is out of reach.
        command = [sys.executable, "-S", "-P", "-c", STRANGER, address]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)

    async def scenario() -> subprocess.CompletedProcess[str]:
        async with serving(inference=parrot()) as server:
            return await asyncio.to_thread(call, server.address)

    done = asyncio.run(scenario())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "models": ["parrot"],
        "said": [["never", [10], ""], ["more", [11], ""], ["", [], "stop"]],
        "refused": ["INVALID_ARGUMENT", "max_tokens must be between 1 and 2147483647, not 0.", "max_tokens"],
    }


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_stubs", PROTO / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stubs_are_what_the_sources_say(tmp_path: Path, script: ModuleType) -> None:
    assert script.stale(script.generate(tmp_path)) == []


def test_a_stub_that_differs_is_missing_or_is_left_over_is_stale(script: ModuleType) -> None:
    fresh = {path.name: path.read_text() for path in PROTO.glob("*_pb2*.py*")}
    changed = {**fresh, "worker_pb2.py": "other", "new_pb2.py": ""}
    del changed["inference_pb2.pyi"]
    assert script.stale(changed) == ["inference_pb2.pyi", "new_pb2.py", "worker_pb2.py"]
