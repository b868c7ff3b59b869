"""The one config file. Every key is here, with its default and its meaning; unknown keys are refused by name."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError
from .fleet import LocalPrefill
from .transfer import Transport


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    source: str | None = Field(
        None,
        description="A prepared model, a Hugging Face directory, a GGUF file or a hub name. "
        "Without one: the demo model, if its package is installed.",
    )
    name: str | None = Field(None, description="The name clients use; by default the source's own.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type of weights and KV cache.")
    chat_template: str | None = Field(None, description="A Jinja file to use as the chat template in place of the model's own.")


_THREADS = (
    "CPU threads per worker. By default the host's cores shared among its workers; on a joined Ray cluster the most with which all "
    "workers find a node, so leave room there by a number if workers shall join later."
)


class PrefillSection(_Section):
    workers: int = Field(1, ge=0, description="Number of prefill workers.")
    threads: int | None = Field(None, ge=1, description=_THREADS)
    kv_tokens: int = Field(8192, ge=256, description="Tokens the KV pool of one worker holds.")
    chunk_tokens: int = Field(512, ge=16, description="Prompt tokens computed per step, over all requests of the batch.")


class DecodeSection(_Section):
    workers: int = Field(1, ge=1, description="Number of decode workers.")
    threads: int | None = Field(None, ge=1, description=_THREADS)
    kv_tokens: int = Field(16384, ge=256, description="Tokens the KV pool of one worker holds.")
    max_running: int = Field(32, ge=1, le=1024, description="Requests decoded in one batch.")
    chunk_tokens: int = Field(
        64, ge=16, description="Prompt tokens a decode worker computes beside one step of its decodes (local prefill)."
    )


class TransferSection(_Section):
    transports: tuple[Transport, ...] = Field(
        (Transport.SHM, Transport.GLOO),
        min_length=1,
        description="How KV may move, the best first: shm within a host, gloo (TCP) between hosts. Each pair of workers takes the first "
        "that works between them; with one alone, that or nothing.",
    )
    lease_s: float = Field(10.0, gt=0, description="A grant ends when neither piece nor keep-alive has come for this long, in seconds.")
    offer_wait_s: float = Field(5.0, gt=0, description="How long an Offer waits for its Decode, in seconds.")


class LimitsSection(_Section):
    body_bytes: int = Field(4 << 20, ge=1024, description="Largest HTTP body or gRPC message from a client.")
    running: int = Field(1024, ge=1, description="Requests at once, each counted as often as it has choices; more are refused with 429.")
    request_s: float = Field(600.0, gt=0, description="A request that has not ended by then is ended with an error, in seconds.")
    write_s: float = Field(30.0, gt=0, description="A client that reads nothing for this long is gone, in seconds.")
    retries: int = Field(2, ge=0, le=2, description="Further attempts after one failed; the last prefills on the decode worker.")


class RouterSection(_Section):
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


class Placing(StrEnum):
    """`pack` fills a node before it takes another; `spread` takes the node with the fewest workers."""

    PACK = "pack"
    SPREAD = "spread"


class RaySection(_Section):
    enabled: bool = Field(True, description="Place workers with Ray; false starts plain processes on this host.")
    address: str | None = Field(None, description="A running Ray cluster to join; by default a local one is started.")
    placement: Placing = Field(
        Placing.PACK,
        description="On a joined cluster of several nodes: pack fills a node before it takes another (within a node KV moves through "
        "shared memory), spread takes the node with the fewest workers.",
    )

    @property
    def joined(self) -> bool:
        """Whether the workers go to nodes of a Ray cluster that is not our own."""
        return self.enabled and self.address is not None


class LogSection(_Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level that is logged.")
    directory: str | None = Field(
        None, description="Where each process writes its log; by default a directory of the cluster's own, removed by `down`."
    )


class ClusterConfig(_Section):
    """A cluster: one model, its workers, its router."""

    name: str = Field(
        "default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="The cluster's name on this host, for `status` and `down`."
    )
    model: ModelSection = Field(default_factory=ModelSection, description="What is served.")
    prefill: PrefillSection = Field(default_factory=PrefillSection, description="Workers that read prompts.")
    decode: DecodeSection = Field(default_factory=DecodeSection, description="Workers that write answers.")
    transfer: TransferSection = Field(default_factory=TransferSection, description="KV hand-over.")
    router: RouterSection = Field(default_factory=RouterSection, description="Faces, placement and limits.")
    ray: RaySection = Field(default_factory=RaySection, description="Placement.")
    log: LogSection = Field(default_factory=LogSection, description="Logs.")


def load_config(values: dict[str, Any]) -> ClusterConfig:
    """A validated config from parsed YAML; `ConfigError` names the first wrong key by its path."""
    try:
        config = ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise _first_of(error) from None
    if config.prefill.workers == 0 and config.router.local_prefill is LocalPrefill.NEVER:
        raise ConfigError("prefill.workers is 0 and router.local_prefill is never: nobody could read a prompt.", field="prefill.workers")
    if config.prefill.workers > 0 and config.router.local_prefill is LocalPrefill.ALWAYS:
        raise ConfigError(
            "router.local_prefill is always, so prefill workers would have nothing to do: set prefill.workers to 0 as well.",
            field="prefill.workers",
        )
    return config


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


def _keys(sections: list[str]) -> list[str]:
    """The keys of the section at this path."""
    model: type[BaseModel] = ClusterConfig
    for name in sections:
        section = model.model_fields[name].annotation
        assert isinstance(section, type)
        model = section
    return list(model.model_fields)
