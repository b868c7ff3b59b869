"""The public call: what a client asks and what it is told. gRPC, HTTP and the Python client all speak these types."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import FinishReason, Token
from .sampling import SamplingParams

MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class Generate:
    """Continue `prompt` (text, or token ids taken as they are). An empty `model` means the one the cluster serves.

    `stop`: at most `MAX_STOP_STRINGS` strings that end the text and are not part of it. `tenant`: whose request it is; the router's faces
    know it by the API key, and no message carries it.
    """

    prompt: str | tuple[int, ...]
    model: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    request_id: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """`output_tokens` of all choices; the prompt counts once."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds on the router's clock. `ttft` to the first token of any choice. `tpot`: the mean over the choices of more than one token;
    None if there is none. `handover_gap` (from token 1 to 2 of the first choice to have two) only for disaggregated requests.
    `kv_bytes`, `transfer_seconds`, `transport` of the transfer, if there was one."""

    ttft: float
    tpot: float | None = None
    handover_gap: float | None = None
    kv_bytes: int = 0
    transfer_seconds: float = 0.0
    transport: str = ""
    prefill_worker: str = ""
    decode_worker: str = ""
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Finish:
    """All choices are complete."""

    usage: Usage
    timing: Timing


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of the answer: new text (whole characters) of one choice and the tokens behind it. `reason`: that choice has ended;
    exactly one chunk of each choice has it, the last to bring anything of it. The last chunk of the call, and no other, has `finish`,
    and perhaps nothing else; a failed request raises instead."""

    request_id: str
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    choice: int = 0
    reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Model:
    id: str
    max_context: int
    vocab_size: int
    has_chat_template: bool
