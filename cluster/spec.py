"""What the supervisor tells a process it starts: one JSON object after `--spec`.

Every process it starts answers on stdout, one JSON object per line: `{"event": "progress", "what": …}` while it loads, then either
`{"event": "ready", …}` or `{"event": "failed", "message": …, "field": …}`. Logs go to stderr.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.config import LimitsSection
from ..core.fleet import LocalPrefill, Phase

LogLevel = Literal["debug", "info", "warning", "error"]


class RankSpec(BaseModel):
    """A worker's process. `listen`: host:port, port 0 takes a free one. `cpus`: cores it may use, None for all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker_id: str
    phase: Phase
    model_dir: str
    listen: str = "127.0.0.1:0"
    threads: int = Field(1, ge=1)
    cpus: tuple[int, ...] | None = None
    kv_tokens: int = Field(ge=16)
    chunk_tokens: int = Field(ge=16)
    max_running: int = Field(32, ge=1)
    lease_s: float = Field(10.0, gt=0)
    offer_wait_s: float = Field(5.0, gt=0)
    log_level: LogLevel = "info"


class RouteSpec(BaseModel):
    """The router's process. `model_name`: the name clients use; None takes the card's. `chat_template`: a file in place of the
    model's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_dir: str
    model_name: str | None = None
    chat_template: str | None = None
    host: str = "127.0.0.1"
    http_port: int = Field(0, ge=0, le=65535)
    grpc_port: int = Field(0, ge=0, le=65535)
    local_prefill: LocalPrefill = LocalPrefill.AUTO
    local_prefill_below: int = Field(16, ge=0)
    limits: LimitsSection = Field(default_factory=LimitsSection)
    log_level: LogLevel = "info"
