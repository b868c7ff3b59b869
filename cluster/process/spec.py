"""What a process of the cluster is told at its start: one JSON value on its command line, validated before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.config import LimitsSection, LogFormat, Placing
from ...core.errors import ConfigError
from ...core.fleet import LocalPrefill, Phase
from ...core.layout import DType
from ...core.security import JwtSection, TlsFiles
from ...core.transfer import Transport

BLOCK_SIZE = 16
"""Tokens per block of every cache group."""


LogLevel = Literal["debug", "info", "warning", "error"]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RankSpec(_Spec):
    """One rank process: `python -m diptych.cluster.programs.rank --spec '<this as JSON>'`."""

    worker_id: str = Field(min_length=1, description="The worker's name in the fleet, in logs and in metrics.")
    phase: Phase = Field(description="Whether it reads prompts or writes answers.")
    model_dir: Path = Field(description="A prepared model.")
    listen: str = Field("127.0.0.1:0", description="host:port of its gRPC faces; port 0 takes a free one.")
    advertise: str | None = Field(
        None, min_length=1, description="The host by which others reach it, if `listen` names all interfaces; gloo binds to its interface."
    )
    rank: int = Field(0, ge=0, description="Which of the worker's ranks: stage * tp + shard; 0 leads.")
    tp: int = Field(1, ge=1, description="Shards of every pipeline stage.")
    stages: tuple[int, ...] = Field((), description="Layers of each pipeline stage; () where one has them all.")
    threads: int = Field(1, ge=1, description="CPU threads of this rank's engine.")
    cpus: tuple[int, ...] | None = Field(None, min_length=1, description="Cores this rank may run on; by default all it has.")
    core_table: Path | None = Field(
        None, description="Where ranks of this host say which cores they do not use: its engine runs on `cpus` and on what others lend."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="What it computes on, and holds its KV in.")
    gpu: str | None = Field(None, description="The one GPU it sees, as CUDA_VISIBLE_DEVICES names it; by default those its parent sees.")
    kv_dtype: DType | None = Field(None, description="What its KV is held in; by default the weights' dtype.")
    kv_tokens: int | None = Field(None, ge=BLOCK_SIZE, description="Tokens the KV pool holds; by default as many as memory allows.")
    memory_fraction: float = Field(
        0.25, gt=0, le=1, description="Of its GPU's memory, or of what the host has available, how much it may take by default."
    )
    chunk_tokens: int = Field(512, ge=1, description="Prompt tokens computed per step.")
    max_running: int = Field(32, ge=1, description="Attempts in one batch.")
    cuda_graphs: bool = Field(True, description="On a GPU: capture decode steps where that is possible.")
    lease_s: float = Field(10.0, gt=0, description="A grant without piece or keep-alive ends after this, in seconds.")
    offer_wait_s: float = Field(5.0, gt=0, description="How long an Offer waits for its Decode, in seconds.")
    pairs: int = Field(
        1, ge=0, description="How many ranks of the other phase it exchanges KV with; where gloo is allowed, memory is set aside for each."
    )
    transports: tuple[Transport, ...] = Field((Transport.SHM, Transport.GLOO), min_length=1, description="How KV may move, the best first.")
    drain_s: float = Field(10.0, ge=0, description="How long SIGTERM lets running work finish, in seconds.")
    internal_tls: TlsFiles | None = Field(None, description="Mutual TLS with router, other workers and the worker's other ranks.")
    log_level: LogLevel = Field("info", description="Least severe level that is logged.")
    log_format: LogFormat = Field("pretty", description="Lines for people, or JSON.")
    check: bool = Field(
        False, description="Check the books (blocks, leases, transfers) ten times a second and whenever idle; die if they are wrong."
    )


class NewRole(_Spec):
    """What the ranks of a worker are told, in one line on the leader's stdin, when they are to be another worker with the weights in place.
    All else of their specs stays."""

    worker_id: str
    phase: Phase
    kv_tokens: int | None
    memory_fraction: float
    chunk_tokens: int
    pairs: tuple[int, ...] = Field(description="By rank.")

    def of(self, spec: RankSpec) -> RankSpec:
        """What this rank is then."""
        return spec.model_copy(update=self.model_dump(exclude={"pairs"}) | {"pairs": self.pairs[spec.rank]})


def rank_name(spec: RankSpec) -> str:
    """The process's name for people and for its log; the leader's is the worker's."""
    return f"{spec.worker_id}.rank{spec.rank}" if spec.rank else spec.worker_id


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker: its `ranks`, the leader first. `group`: which of its phase's groups it is of; `section`: where the config has that;
    `partner`: the worker with which it is a pair."""

    ranks: tuple[RankSpec, ...]
    group: int = 0
    section: str = ""
    partner: str | None = None

    @property
    def name(self) -> str:
        return self.ranks[0].worker_id

    @property
    def phase(self) -> Phase:
        return self.ranks[0].phase


def new_role(worker: Worker) -> NewRole:
    """To become this worker."""
    first = worker.ranks[0]
    return NewRole(
        worker_id=first.worker_id,
        phase=first.phase,
        kv_tokens=first.kv_tokens,
        memory_fraction=first.memory_fraction,
        chunk_tokens=first.chunk_tokens,
        pairs=tuple(spec.pairs for spec in worker.ranks),
    )


def require_in_place(old: Worker, new: Worker) -> None:
    """Raise `ConfigError` if the processes of one worker cannot be the other's: a role is all that changes."""
    role = new_role(new)
    for now, then in zip(old.ranks, new.ranks, strict=True):
        there = role.of(now)
        for name in RankSpec.model_fields:
            if getattr(there, name) != getattr(then, name):
                raise ConfigError(f"{name} is {getattr(there, name)} and is to be {getattr(then, name)}.", field=name)


class RouteSpec(_Spec):
    """The router's process: `python -m diptych.cluster.programs.route --spec '<this as JSON>'`."""

    model_dir: Path = Field(description="A prepared model; only its card, tokenizer and chat template are read.")
    model_name: str | None = Field(None, description="The name clients use; by default the card's.")
    chat_template: Path | None = Field(None, description="A Jinja file to use in place of the model's own chat template.")
    host: str = Field("127.0.0.1", description="Address both faces listen on.")
    http_port: int = Field(0, ge=0, le=65535, description="OpenAI HTTP; 0 takes a free port.")
    grpc_port: int = Field(0, ge=0, le=65535, description="gRPC; 0 takes a free port.")
    local_prefill: LocalPrefill = Field(LocalPrefill.AUTO, description="Whether decode workers read prompts themselves.")
    local_prefill_below: int = Field(16, ge=0, description="With auto: prompts of fewer tokens are read by the decode worker.")
    limits: LimitsSection = Field(default_factory=LimitsSection, description="What a client may use.")
    api_keys: Path | None = Field(None, description="The keys of which a request needs one; without, nobody is asked who he is.")
    jwt: JwtSection | None = Field(None, description="The tokens that are good too, or in place of keys.")
    open_metrics: bool = Field(True, description="Whether /metrics answers without a key.")
    tls: TlsFiles | None = Field(None, description="TLS on both faces.")
    internal_tls: TlsFiles | None = Field(None, description="Mutual TLS with workers and supervisor.")
    record: Path | None = Field(None, description="A file for the workload.")
    record_bytes: int = Field(64 << 20, ge=4096, description="When it is longer than this, another is begun.")
    drain_s: float = Field(10.0, ge=0, description="How long SIGTERM lets running requests finish, in seconds.")
    log_level: LogLevel = Field("info", description="Least severe level that is logged.")
    log_format: LogFormat = Field("pretty", description="Lines for people, or JSON.")


AskedWorker = tuple[str, Phase, tuple[tuple[int | None, int, float, str], ...], int]
"""A worker's name, its phase, threads (None: what there is), bytes, GPUs and kind of device of each of its ranks, and how many stages these
make."""


class RaySpec(_Spec):
    """The process that drives Ray: `python -m diptych.cluster.on_ray.driver --spec '<this as JSON>'`."""

    address: str | None = Field(None, description="A Ray cluster to join; by default a local one is started.")
    directory: Path = Field(description="For the session files and sockets of a local one.")
    cores: int = Field(ge=1, description="CPUs a local one has to give.")
    wanted: tuple[tuple[AskedWorker, ...], ...] = Field(min_length=1, description="The workers of the start, those of a pair together.")
    placing: Placing = Field(Placing.PACK, description="Which node of a joined one a worker goes to.")
    wait_s: float = Field(60.0, gt=0, description="How long a worker waits for a node of a joined one with room for it.")
    internal_tls: TlsFiles | None = Field(
        None, description="Handed to the processes of actors, which have no such files: see `identities`."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="Put over the environment of actors and their processes.")
    log_level: LogLevel = Field("info", description="Least severe level that is logged.")
    log_format: LogFormat = Field("pretty", description="Lines for people, or JSON.")


_S = TypeVar("_S", bound=_Spec)


def read_spec(kind: type[_S], text: str) -> _S:
    """The validated spec in `text` (JSON); `ConfigError` names the first wrong key."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "spec"
        raise ConfigError(f"{path}: {first['msg']}.", field=path) from None
