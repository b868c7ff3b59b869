"""The one config file. Every key is here, with its default and its meaning; unknown keys are refused by name."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator

from .errors import ConfigError
from .fleet import LocalPrefill, Phase
from .layout import DType, even_stages
from .quantization import Quantization
from .section import Section
from .security import SecuritySection
from .transfer import Transport

LogFormat = Literal["pretty", "json"]


class ModelSection(Section):
    source: str | None = Field(
        None,
        description="A prepared model, a Hugging Face directory, a GGUF file or a hub name. "
        "Without one: the demo model, if its package is installed.",
    )
    name: str | None = Field(None, description="The name clients use; by default the source's own.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Type of the weights.")
    kv_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="Type of the KV cache: auto is the weights'; int8, with a scale for every 32 numbers of a head, takes 53 % of "
        "bfloat16's memory and of what is handed over then, at some cost of quality ([performance](performance.md)). For workers on a CPU.",
    )
    quantization: Quantization = Field(
        Quantization.NONE,
        description="Weights of fewer bits, from which the dtype's are made when they are multiplied: int8 takes half of the memory that "
        "bfloat16 does and nearly half of the time of a decode step, int4 less still, at some cost of quality "
        "([performance](performance.md)). For workers on a CPU.",
    )
    chat_template: str | None = Field(None, description="A Jinja file to use as the chat template in place of the model's own.")

    @property
    def held_as(self) -> DType | None:
        """The KV cache's dtype; None for that of the weights."""
        return None if self.kv_dtype == "auto" else DType(self.kv_dtype)


_THREADS = (
    "CPU threads of each rank. By default the host's cores shared among its ranks; on a joined Ray cluster the most with which all "
    "workers find a node, so leave room there by a number if workers shall join later."
)
_TP = "Tensor parallelism: ranks that share every layer of a worker, each with a part of its heads."
_PP = "Pipeline parallelism: stages that the layers of a worker are cut into. A worker has tp × pp ranks, each a process."

_KV_TOKENS = (
    "Tokens the KV pool of one worker holds, over all its ranks. By default as many as the rank with the least memory has room for when "
    "weights are loaded and a step has been computed; on a CPU at most 1,024 for each request of a batch (`decode.max_running`), so that a "
    "laptop's memory is not taken: name a number for more."
)
_MEMORY_FRACTION = (
    "How much of its device's memory each rank may take where kv_tokens is not named: of its GPU's, and workers whose fractions have a "
    "sum of at most 1 share one; by default 0.9, or where workers of one rank are more than GPUs, and none has a fraction, its even part "
    "(0.45 for two on one GPU). On a CPU of what the host has available beside the weights, by default all ranks together half."
)
_ACCELERATOR = (
    "Kind of device that its ranks are on, as Ray calls it: H100, L40S (a node's resource `accelerator_type:H100`). For a Ray cluster that "
    "is joined, with `device` named too. By default any."
)


class WorkerGroup(Section):
    """Workers of one phase that are alike."""

    workers: int = Field(1, ge=0, description="Number of workers of this group.")
    tp: int = Field(1, ge=1, description=_TP)
    pp: int = Field(1, ge=1, description=_PP)
    stages: tuple[PositiveInt, ...] = Field(
        (), min_length=2, description="How many layers each stage has, in place of pp; by default as even as can be, the first longer."
    )
    accelerator: str | None = Field(None, min_length=1, description="Kind of device its ranks are on; by default as for the other groups.")
    threads: int | None = Field(None, ge=1, description="CPU threads of each rank; by default as for the other groups.")
    kv_tokens: int | None = Field(None, ge=256, description="Tokens the KV pool of one worker holds; by default as for the other groups.")
    memory_fraction: float | None = Field(None, gt=0, le=1, description="Of its device's memory; by default as for the other groups.")

    def stages_of(self, layers: int) -> tuple[int, ...]:
        """`Layout.stages` for a model of so many layers, at least `pp`."""
        return self.stages or even_stages(layers, self.pp)

    def __str__(self) -> str:
        stages = f"stages of {', '.join(map(str, self.stages))} layers" if self.stages else f"pp {self.pp}"
        return f"tp {self.tp}, {stages}"


class _PhaseSection(Section):
    workers: int = Field(1, ge=0, description="Number of workers.")
    tp: int = Field(1, ge=1, description=_TP)
    pp: int = Field(1, ge=1, description=_PP)
    groups: tuple[WorkerGroup, ...] = Field(
        (), description="In place of workers, tp and pp: groups of workers, each with a parallelism of its own."
    )
    accelerator: str | None = Field(None, min_length=1, description=_ACCELERATOR)
    threads: int | None = Field(None, ge=1, description=_THREADS)
    kv_tokens: int | None = Field(None, ge=256, description=_KV_TOKENS)
    memory_fraction: float | None = Field(None, gt=0, le=1, description=_MEMORY_FRACTION)

    @property
    def all_groups(self) -> tuple[WorkerGroup, ...]:
        """The groups, or the one that this section describes by itself; each with what holds for it of the keys that both have."""
        groups = self.groups or (WorkerGroup(workers=self.workers, tp=self.tp, pp=self.pp),)
        ours = {key: getattr(self, key) for key in ("accelerator", "kv_tokens", "threads", "memory_fraction")}
        return tuple(group.model_copy(update={key: getattr(group, key) or value for key, value in ours.items()}) for group in groups)

    @property
    def all_workers(self) -> int:
        """How many workers the phase has."""
        return sum(group.workers for group in self.all_groups)


class PrefillSection(_PhaseSection):
    workers: int = Field(1, ge=0, description="Number of prefill workers.")
    chunk_tokens: int = Field(512, ge=16, description="Prompt tokens computed per step, over all requests of the batch.")


class DecodeSection(_PhaseSection):
    workers: int = Field(1, ge=1, description="Number of decode workers.")
    max_running: int = Field(32, ge=1, le=1024, description="Requests decoded in one batch.")
    chunk_tokens: int = Field(
        64, ge=16, description="Prompt tokens a decode worker computes beside one step of its decodes (local prefill)."
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU decode steps are captured when a worker starts, and each is then one launch; false is for finding faults. "
        "Where they cannot be captured, and in larger batches, kernels are launched one by one, which the log and a metric say.",
    )


class TransferSection(Section):
    transports: tuple[Transport, ...] = Field(
        (Transport.SHM, Transport.GLOO),
        min_length=1,
        description="How KV may move, the best first: shm within a host, gloo (TCP) between hosts; of workers on GPUs cuda_ipc within a "
        "host, nccl between any, which are their default. Each pair of workers takes the first that works between them; with one alone, "
        "that or nothing.",
    )
    lease_s: float = Field(10.0, gt=0, description="A grant ends when neither piece nor keep-alive has come for this long, in seconds.")
    offer_wait_s: float = Field(5.0, gt=0, description="How long an Offer waits for its Decode, in seconds.")


class LimitsSection(Section):
    body_bytes: int = Field(4 << 20, ge=1024, description="Largest HTTP body or gRPC message from a client.")
    running: int = Field(1024, ge=1, description="Requests at once, each counted as often as it has choices; more are refused with 429.")
    connections: int = Field(4096, ge=1, description="Connections to the HTTP face at once; who comes beyond them is hung up on.")
    request_s: float = Field(600.0, gt=0, description="A request that has not ended by then is ended with an error, in seconds.")
    write_s: float = Field(30.0, gt=0, description="A client that reads nothing for this long is gone, in seconds.")
    retries: int = Field(2, ge=0, le=2, description="Further attempts after one failed; the last prefills on the decode worker.")


class RouterSection(Section):
    host: str = Field("127.0.0.1", description="Address both faces listen on.")
    http_port: int = Field(8000, ge=0, le=65535, description="OpenAI HTTP; 0 takes a free port.")
    grpc_port: int = Field(50051, ge=0, le=65535, description="gRPC; 0 takes a free port.")
    local_prefill: LocalPrefill = Field(
        LocalPrefill.AUTO,
        description="Whether decode workers read prompts themselves: never; auto (short prompts, or no prefill worker lives); "
        "always (a colocated server).",
    )
    local_prefill_below: int = Field(16, ge=0, description="With auto: prompts of fewer tokens are read by the decode worker.")
    limits: LimitsSection = Field(default_factory=LimitsSection, description="What a client may use.")
    record: str | None = Field(
        None,
        description="A CSV file for what comes: of each request that has ended when it came, how long prompt, cached part and answer "
        "were, TTFT and TPOT, no text. `diptych simulate` and `diptych workload fit` read it.",
    )
    record_bytes: int = Field(
        64 << 20, ge=4096, description="When the file is longer than this it becomes FILE.1, in place of the last one."
    )


class Placing(StrEnum):
    """`pack` fills a node before it takes another; `spread` takes the node with the fewest of our ranks."""

    PACK = "pack"
    SPREAD = "spread"


class RaySection(Section):
    enabled: bool = Field(True, description="Place workers with Ray; false starts plain processes on this host.")
    address: str | None = Field(None, description="A running Ray cluster to join; by default a local one is started.")
    placement: Placing = Field(
        Placing.PACK,
        description="On a joined cluster of several nodes: pack fills a node before it takes another (within a node KV moves through "
        "shared memory), spread takes the node with the fewest ranks. The ranks of one worker share a node if one has room for all.",
    )
    wait_s: float = Field(
        60.0,
        gt=0,
        description="On a joined cluster: how long a worker waits for a node with room for it before it is refused, in seconds. More where "
        "nodes are still being made.",
    )

    @property
    def joined(self) -> bool:
        """Whether the workers go to nodes of a Ray cluster that is not our own."""
        return self.enabled and self.address is not None


class AutoplanSection(Section):
    mode: Literal["off", "propose", "apply"] = Field(
        "off",
        description="When the load has changed, simulate other numbers of workers under it: propose says in log and `diptych status` which "
        "would be better, apply has workers change their role, join and leave.",
    )
    profile: str | None = Field(None, description="The file that `diptych profile` wrote for this model on these devices.")
    slo: str | None = Field(None, description="Limits that requests are to meet jointly, as in ttft=1s,tpot=100ms.")
    target: float = Field(0.9, gt=0, lt=1, description="The share of requests that shall meet them.")
    margin: float = Field(0.05, gt=0, lt=1, description="How much larger the share must be in simulation for a change to be worth it.")
    window_s: float = Field(120.0, ge=5, description="How much of the past a plan is made for, in seconds.")
    every_s: float = Field(15.0, ge=1, description="How often the load is looked at, in seconds.")
    cool_down_s: float = Field(300.0, ge=0, description="How long nothing is planned after a change or a proposal, in seconds.")
    least_requests: int = Field(60, ge=20, description="A load of fewer requests is not judged.")
    most_workers: int | None = Field(
        None, ge=2, description="Workers there may be of both phases together; by default as many as there are, and none joins or leaves."
    )
    least_workers: int | None = Field(None, ge=2, description="Workers there are at least; by default as many as there are.")

    @field_validator("mode", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value


class LogSection(Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level that is logged.")
    format: LogFormat = Field("pretty", description="Lines for people, or one JSON object a line.")
    directory: str | None = Field(
        None, description="Where each process writes its log; by default a directory of the cluster's own, removed by `down`."
    )


class ClusterConfig(Section):
    """A cluster: one model, its workers, its router."""

    name: str = Field(
        "default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="The cluster's name on this host, for `status` and `down`."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="What the workers compute on: cuda takes the host's GPUs (those in CUDA_VISIBLE_DEVICES, if it is set), one for each "
        "rank unless there are fewer, or a memory_fraction lets workers share one; auto does so if torch, the driver and a GPU of compute "
        "capability 8.0 or newer are there, and takes the CPU if not. On a joined Ray cluster auto takes CPUs, and cuda the nodes' GPUs, "
        "as Ray gives them.",
    )
    paired: bool = Field(
        False,
        description="Each prefill worker and the decode worker of the same number are a pair: they share a node, and KV is handed over "
        "within it while both live and have room. For nodes with slow links between them. There are as many workers of both phases then, "
        "group by group.",
    )
    model: ModelSection = Field(default_factory=ModelSection, description="What is served.")
    prefill: PrefillSection = Field(default_factory=PrefillSection, description="Workers that read prompts.")
    decode: DecodeSection = Field(default_factory=DecodeSection, description="Workers that write answers.")
    transfer: TransferSection = Field(default_factory=TransferSection, description="KV hand-over.")
    router: RouterSection = Field(default_factory=RouterSection, description="Faces, placement and limits.")
    ray: RaySection = Field(default_factory=RaySection, description="Placement.")
    autoplan: AutoplanSection = Field(
        default_factory=AutoplanSection, description="Planning again while the cluster serves ([planning](planner.md))."
    )
    security: SecuritySection = Field(default_factory=SecuritySection, description="Who may come in, and what is encrypted.")
    log: LogSection = Field(default_factory=LogSection, description="Logs.")

    def section(self, phase: Phase) -> PrefillSection | DecodeSection:
        return self.prefill if phase is Phase.PREFILL else self.decode


def load_config(values: dict[str, Any]) -> ClusterConfig:
    """A validated config from parsed YAML; `ConfigError` names the first wrong key by its path."""
    try:
        config = ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise _first_of(error) from None
    for phase in Phase:
        _check_groups(phase.value, config.section(phase))
    counted = "prefill.groups" if config.prefill.groups else "prefill.workers"
    if config.prefill.all_workers == 0 and config.router.local_prefill is LocalPrefill.NEVER:
        raise ConfigError(f"{counted}: there are none, and router.local_prefill is never: nobody could read a prompt.", field=counted)
    if config.prefill.all_workers > 0 and config.router.local_prefill is LocalPrefill.ALWAYS:
        instead = ", in place of prefill.groups" if config.prefill.groups else ""
        raise ConfigError(
            f"router.local_prefill is always, so prefill workers would have nothing to do: set prefill.workers to 0 as well{instead}.",
            field=counted,
        )
    if config.decode.all_workers == 0:
        raise ConfigError("decode.groups have no worker: nobody could write an answer.", field="decode.groups")
    _check_pairs(config)
    _check_autoplan(config)
    return config


def _check_pairs(config: ClusterConfig) -> None:
    prefills, decodes = ([group.workers for group in config.section(phase).all_groups] for phase in Phase)
    if config.paired and prefills != decodes:
        ours, theirs = (" + ".join(map(str, numbers)) for numbers in (prefills, decodes))
        raise ConfigError(
            f"paired: there are {ours} prefill and {theirs} decode workers. A pair is one of each, of the same group: have as many of both "
            "(`diptych scale` takes both numbers at once).",
            field="paired",
        )

    for ours, theirs in zip(*(config.section(phase).all_groups for phase in Phase), strict=True) if config.paired else ():
        if ours.accelerator != theirs.accelerator:
            raise ConfigError(
                f"paired: a pair shares a node, which has devices of one kind; prefill is to be on {ours.accelerator or 'any'} and decode "
                f"on {theirs.accelerator or 'any'}. Name the same accelerator for both, or leave paired out.",
                field="paired",
            )


def _check_autoplan(config: ClusterConfig) -> None:
    if config.autoplan.mode == "off":
        return
    kinds = {group.accelerator for phase in Phase for group in config.section(phase).all_groups}
    if len(kinds) > 1:
        named = " and ".join(sorted(kind or "any" for kind in kinds))
        raise ConfigError(
            f"autoplan.mode: workers are on {named}, and it knows of one kind of device: plan with `diptych plan`, and set it to off.",
            field="autoplan.mode",
        )
    for key in ("profile", "slo"):
        if getattr(config.autoplan, key) is None:
            raise ConfigError(f"autoplan.{key}: it is needed with autoplan.mode {config.autoplan.mode}.", field=f"autoplan.{key}")
    if config.prefill.all_workers == 0 or config.router.local_prefill is LocalPrefill.ALWAYS:
        raise ConfigError(
            "autoplan.mode: there are no prefill workers, so there is no number of them to plan: set it to off.", field="autoplan.mode"
        )
    if config.paired and config.autoplan.most_workers is None and config.autoplan.least_workers is None:
        raise ConfigError(
            "autoplan.mode: workers of pairs keep their roles. Name autoplan.most_workers or autoplan.least_workers, so that pairs may "
            "join or leave, or set it to off.",
            field="autoplan.mode",
        )


def _check_groups(name: str, section: _PhaseSection) -> None:
    """`ConfigError` for what contradicts itself in how workers are spread over ranks."""
    for key in ("workers", "tp", "pp"):
        if section.groups and key in section.model_fields_set:
            raise ConfigError(
                f"{name}.{key} and {name}.groups are both given; each group has its own {key}, so leave {name}.{key} out.",
                field=f"{name}.{key}",
            )
    for number, group in enumerate(section.groups):
        if group.stages and "pp" in group.model_fields_set and group.pp != len(group.stages):
            path = f"{name}.groups.{number}.pp"
            raise ConfigError(f"{path} is {group.pp}, and its stages are {len(group.stages)}: leave pp out.", field=path)


def _first_of(error: ValidationError) -> ConfigError:
    """The first thing pydantic found, in our words."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *sections, key = (str(part) for part in first["loc"])
        near = difflib.get_close_matches(key, _keys(sections), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return ConfigError(f"{path}: no such key.{hint} `diptych config schema` lists them all.", field=path)
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ConfigError(f"{path}: {message} (got {first['input']!r}).", field=path)


def _keys(path: list[str]) -> list[str]:
    """The keys of the section at this path; a list's entries have numbers."""
    model: type[BaseModel] = ClusterConfig
    for name in path:
        if not name.isdecimal():
            model = section_in(model.model_fields[name].annotation) or model
    return list(model.model_fields)


def section_in(kind: Any) -> type[BaseModel] | None:
    """The section that a key of this type holds, a list of it, or one that may be left out; None for a plain value."""
    inner = get_args(kind)[0] if get_args(kind) and get_origin(kind) is not Literal else kind
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
