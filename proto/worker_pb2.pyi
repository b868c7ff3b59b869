from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos", "logprobs", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "n")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    min_tokens: int
    n: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., min_tokens: _Optional[int] = ..., n: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: Tokens
    def __init__(self, tokens: _Optional[_Union[Tokens, _Mapping]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("request_id", "model", "prompt", "sampling", "generated", "adapter", "tenant", "priority", "slo_ttft", "slo_tpot", "finished")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SLO_TTFT_FIELD_NUMBER: _ClassVar[int]
    SLO_TPOT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt: _containers.RepeatedCompositeFieldContainer[Part]
    sampling: Sampling
    generated: _containers.RepeatedCompositeFieldContainer[Tokens]
    adapter: str
    tenant: str
    priority: int
    slo_ttft: float
    slo_tpot: float
    finished: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., generated: _Optional[_Iterable[_Union[Tokens, _Mapping]]] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., priority: _Optional[int] = ..., slo_ttft: _Optional[float] = ..., slo_tpot: _Optional[float] = ..., finished: _Optional[_Iterable[int]] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("prefill", "decode", "stop")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    prefill: Prefill
    decode: Decode
    stop: Stop
    def __init__(self, prefill: _Optional[_Union[Prefill, _Mapping]] = ..., decode: _Optional[_Union[Decode, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Prefill(_message.Message):
    __slots__ = ("attempt_id", "request", "destination")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    attempt_id: str
    request: Request
    destination: str
    def __init__(self, attempt_id: _Optional[str] = ..., request: _Optional[_Union[Request, _Mapping]] = ..., destination: _Optional[str] = ...) -> None: ...

class Decode(_message.Message):
    __slots__ = ("attempt_id", "request", "local_prefill")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    attempt_id: str
    request: Request
    local_prefill: bool
    def __init__(self, attempt_id: _Optional[str] = ..., request: _Optional[_Union[Request, _Mapping]] = ..., local_prefill: _Optional[bool] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("attempt_id", "choice")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    attempt_id: str
    choice: int
    def __init__(self, attempt_id: _Optional[str] = ..., choice: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("index", "id", "logprob", "top", "choice")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    index: int
    id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    choice: int
    def __init__(self, index: _Optional[int] = ..., id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., choice: _Optional[int] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("id", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "field")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    field: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class StepEvents(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("attempt_id", "first_tokens", "handed_over", "new_tokens", "finished", "failed", "choice_finished", "movable")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FINISHED_FIELD_NUMBER: _ClassVar[int]
    MOVABLE_FIELD_NUMBER: _ClassVar[int]
    attempt_id: str
    first_tokens: FirstTokens
    handed_over: HandedOver
    new_tokens: NewTokens
    finished: Finished
    failed: Error
    choice_finished: ChoiceFinished
    movable: Movable
    def __init__(self, attempt_id: _Optional[str] = ..., first_tokens: _Optional[_Union[FirstTokens, _Mapping]] = ..., handed_over: _Optional[_Union[HandedOver, _Mapping]] = ..., new_tokens: _Optional[_Union[NewTokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failed: _Optional[_Union[Error, _Mapping]] = ..., choice_finished: _Optional[_Union[ChoiceFinished, _Mapping]] = ..., movable: _Optional[_Union[Movable, _Mapping]] = ...) -> None: ...

class FirstTokens(_message.Message):
    __slots__ = ("tokens", "finishes", "queued", "computed", "cached_tokens")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    finishes: _containers.RepeatedScalarFieldContainer[str]
    queued: float
    computed: float
    cached_tokens: int
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., finishes: _Optional[_Iterable[str]] = ..., queued: _Optional[float] = ..., computed: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class HandedOver(_message.Message):
    __slots__ = ("kv_bytes", "seconds", "transport", "exposed")
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_FIELD_NUMBER: _ClassVar[int]
    kv_bytes: int
    seconds: float
    transport: str
    exposed: float
    def __init__(self, kv_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., transport: _Optional[str] = ..., exposed: _Optional[float] = ...) -> None: ...

class NewTokens(_message.Message):
    __slots__ = ("tokens", "queued")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    queued: float
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., queued: _Optional[float] = ...) -> None: ...

class ChoiceFinished(_message.Message):
    __slots__ = ("choice", "finish")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    choice: int
    finish: str
    def __init__(self, choice: _Optional[int] = ..., finish: _Optional[str] = ...) -> None: ...

class Movable(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Finished(_message.Message):
    __slots__ = ("cached_tokens", "local_prefill_tokens", "recomputed_tokens")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    local_prefill_tokens: int
    recomputed_tokens: int
    def __init__(self, cached_tokens: _Optional[int] = ..., local_prefill_tokens: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ...) -> None: ...

class CacheGroup(_message.Message):
    __slots__ = ("kind", "layers", "kv_heads", "head_dim", "dtype", "window")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    kind: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    kv_heads: int
    head_dim: int
    dtype: str
    window: int
    def __init__(self, kind: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., window: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("fingerprint", "groups", "block_size", "num_blocks", "tp", "stages")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    groups: _containers.RepeatedCompositeFieldContainer[CacheGroup]
    block_size: int
    num_blocks: _containers.RepeatedScalarFieldContainer[int]
    tp: int
    stages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, fingerprint: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[CacheGroup, _Mapping]]] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[_Iterable[int]] = ..., tp: _Optional[int] = ..., stages: _Optional[_Iterable[int]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("worker_id", "incarnation", "state", "waiting", "running", "prompt_tokens_waiting", "blocks_free", "blocks_total", "leases", "counters", "measures")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    MEASURES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    state: str
    waiting: int
    running: int
    prompt_tokens_waiting: int
    blocks_free: int
    blocks_total: int
    leases: int
    counters: _containers.RepeatedCompositeFieldContainer[Counter]
    measures: _containers.RepeatedCompositeFieldContainer[Measure]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., state: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., prompt_tokens_waiting: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_total: _Optional[int] = ..., leases: _Optional[int] = ..., counters: _Optional[_Iterable[_Union[Counter, _Mapping]]] = ..., measures: _Optional[_Iterable[_Union[Measure, _Mapping]]] = ...) -> None: ...

class Counter(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Measure(_message.Message):
    __slots__ = ("name", "value", "label")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    label: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., label: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout",)
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    timeout: float
    def __init__(self, timeout: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("unfinished",)
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    unfinished: int
    def __init__(self, unfinished: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("worker_id", "address", "phase", "incarnation", "layout", "capacity_tokens", "partner")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARTNER_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    phase: str
    incarnation: int
    layout: Layout
    capacity_tokens: int
    partner: str
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., phase: _Optional[str] = ..., incarnation: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., capacity_tokens: _Optional[int] = ..., partner: _Optional[str] = ...) -> None: ...

class Fleet(_message.Message):
    __slots__ = ("version", "members")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, version: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class PublishFleetResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class DescribeFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FleetStatus(_message.Message):
    __slots__ = ("fleet", "reports")
    FLEET_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    fleet: Fleet
    reports: _containers.RepeatedCompositeFieldContainer[WorkerReport]
    def __init__(self, fleet: _Optional[_Union[Fleet, _Mapping]] = ..., reports: _Optional[_Iterable[_Union[WorkerReport, _Mapping]]] = ...) -> None: ...

class DescribeWorkloadRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class Workload(_message.Message):
    __slots__ = ("seconds", "age", "prompt_tokens", "cached_tokens", "output_tokens", "ttft", "tpot", "ended")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    age: _containers.RepeatedScalarFieldContainer[float]
    prompt_tokens: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: _containers.RepeatedScalarFieldContainer[int]
    output_tokens: _containers.RepeatedScalarFieldContainer[int]
    ttft: _containers.RepeatedScalarFieldContainer[float]
    tpot: _containers.RepeatedScalarFieldContainer[float]
    ended: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, seconds: _Optional[float] = ..., age: _Optional[_Iterable[float]] = ..., prompt_tokens: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[_Iterable[int]] = ..., output_tokens: _Optional[_Iterable[int]] = ..., ttft: _Optional[_Iterable[float]] = ..., tpot: _Optional[_Iterable[float]] = ..., ended: _Optional[_Iterable[bool]] = ...) -> None: ...

class LaneMessage(_message.Message):
    __slots__ = ("hello", "offer", "grant", "refused", "ready", "commit", "ack", "cancel", "keep_alive", "rendezvous", "nearly_done", "rest")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    NEARLY_DONE_FIELD_NUMBER: _ClassVar[int]
    REST_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    offer: Offer
    grant: Grant
    refused: Refused
    ready: Ready
    commit: Commit
    ack: Ack
    cancel: Cancel
    keep_alive: KeepAlive
    rendezvous: Rendezvous
    nearly_done: NearlyDone
    rest: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., keep_alive: _Optional[_Union[KeepAlive, _Mapping]] = ..., rendezvous: _Optional[_Union[Rendezvous, _Mapping]] = ..., nearly_done: _Optional[_Union[NearlyDone, _Mapping]] = ..., rest: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "layout", "shm", "protocol_version", "transports")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    layout: Layout
    shm: _containers.RepeatedCompositeFieldContainer[ShmEndpoint]
    protocol_version: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., shm: _Optional[_Iterable[_Union[ShmEndpoint, _Mapping]]] = ..., protocol_version: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ...) -> None: ...

class ShmEndpoint(_message.Message):
    __slots__ = ("socket", "nonce")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    socket: str
    nonce: bytes
    def __init__(self, socket: _Optional[str] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class Rendezvous(_message.Message):
    __slots__ = ("key", "value", "route")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    route: int
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ..., route: _Optional[int] = ...) -> None: ...

class Epoch(_message.Message):
    __slots__ = ("incarnation", "counter")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    counter: int
    def __init__(self, incarnation: _Optional[int] = ..., counter: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("transfer_id", "prompt_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    prompt_tokens: int
    def __init__(self, transfer_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class NearlyDone(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    def __init__(self, transfer_id: _Optional[str] = ...) -> None: ...

class GroupGrant(_message.Message):
    __slots__ = ("first_position", "blocks")
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    first_position: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, first_position: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("transfer_id", "epoch", "groups")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: Epoch
    groups: _containers.RepeatedCompositeFieldContainer[GroupGrant]
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[GroupGrant, _Mapping]]] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("transfer_id", "reason", "message")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    reason: str
    message: str
    def __init__(self, transfer_id: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("transfer_id", "epoch", "seq", "group", "layers", "start", "stop", "blocks", "slot", "word", "route")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: Epoch
    seq: int
    group: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    start: int
    stop: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    slot: int
    word: int
    route: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., seq: _Optional[int] = ..., group: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., slot: _Optional[int] = ..., word: _Optional[int] = ..., route: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("transfer_id", "pieces", "first_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    pieces: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, transfer_id: _Optional[str] = ..., pieces: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("transfer_id", "kv_bytes", "seconds")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    kv_bytes: int
    seconds: float
    def __init__(self, transfer_id: _Optional[str] = ..., kv_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("transfer_id", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    reason: str
    def __init__(self, transfer_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class KeepAlive(_message.Message):
    __slots__ = ("transfer_ids",)
    TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    transfer_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, transfer_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SpansCommand(_message.Message):
    __slots__ = ("begin", "end")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    begin: BeginSpans
    end: EndSpans
    def __init__(self, begin: _Optional[_Union[BeginSpans, _Mapping]] = ..., end: _Optional[_Union[EndSpans, _Mapping]] = ...) -> None: ...

class BeginSpans(_message.Message):
    __slots__ = ("seconds", "most")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    most: int
    def __init__(self, seconds: _Optional[float] = ..., most: _Optional[int] = ...) -> None: ...

class EndSpans(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SpansAnswer(_message.Message):
    __slots__ = ("begun", "spans", "ended")
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    begun: SpansBegun
    spans: Spans
    ended: SpansEnded
    def __init__(self, begun: _Optional[_Union[SpansBegun, _Mapping]] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., ended: _Optional[_Union[SpansEnded, _Mapping]] = ...) -> None: ...

class SpansBegun(_message.Message):
    __slots__ = ("host", "now", "pid")
    HOST_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    host: str
    now: int
    pid: int
    def __init__(self, host: _Optional[str] = ..., now: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("kinds", "kind", "thread", "began", "lasted", "ran")
    KINDS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    THREAD_FIELD_NUMBER: _ClassVar[int]
    BEGAN_FIELD_NUMBER: _ClassVar[int]
    LASTED_FIELD_NUMBER: _ClassVar[int]
    RAN_FIELD_NUMBER: _ClassVar[int]
    kinds: _containers.RepeatedCompositeFieldContainer[SpanKind]
    kind: _containers.RepeatedScalarFieldContainer[int]
    thread: _containers.RepeatedScalarFieldContainer[int]
    began: _containers.RepeatedScalarFieldContainer[int]
    lasted: _containers.RepeatedScalarFieldContainer[int]
    ran: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kinds: _Optional[_Iterable[_Union[SpanKind, _Mapping]]] = ..., kind: _Optional[_Iterable[int]] = ..., thread: _Optional[_Iterable[int]] = ..., began: _Optional[_Iterable[int]] = ..., lasted: _Optional[_Iterable[int]] = ..., ran: _Optional[_Iterable[int]] = ...) -> None: ...

class SpanKind(_message.Message):
    __slots__ = ("doing", "step", "who")
    DOING_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    doing: str
    step: int
    who: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, doing: _Optional[str] = ..., step: _Optional[int] = ..., who: _Optional[_Iterable[str]] = ...) -> None: ...

class SpansEnded(_message.Message):
    __slots__ = ("began", "ended", "lost", "threads")
    BEGAN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    began: int
    ended: int
    lost: int
    threads: _containers.RepeatedCompositeFieldContainer[ThreadTime]
    def __init__(self, began: _Optional[int] = ..., ended: _Optional[int] = ..., lost: _Optional[int] = ..., threads: _Optional[_Iterable[_Union[ThreadTime, _Mapping]]] = ...) -> None: ...

class ThreadTime(_message.Message):
    __slots__ = ("thread", "name", "ran", "ready")
    THREAD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RAN_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    thread: int
    name: str
    ran: int
    ready: int
    def __init__(self, thread: _Optional[int] = ..., name: _Optional[str] = ..., ran: _Optional[int] = ..., ready: _Optional[int] = ...) -> None: ...
