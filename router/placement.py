"""Where an attempt goes: Filter → Score → Pick over an immutable picture of the fleet. Pure.

Filters: alive and ready, has room for the request at all, can exchange KV with the other side, not just failed for this request (if
others exist). Scores lie in [0, 1] and are a worker's own, so that one hot worker changes nothing for the rest.

Where workers are paired an attempt goes to both of a pair, the one whose scores have the largest product. Only a prefill worker whose
partner is gone or full hands its KV to another decode worker, and its score is then halved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import field
from enum import StrEnum
from operator import attrgetter

from ..core.errors import ContextExceeded, Unavailable
from ..core.fleet import LocalPrefill, Member, Phase, WorkerReport, WorkerState
from ..core.value import value

_ACROSS = 0.5
"""What a prefill worker whose KV must leave its pair counts for: so that the others read up to a chunk each before it does."""
_HALF_LOAD_TOKENS = 512
"""Prompt tokens waiting that halve a prefill worker's score: one chunk of the default size."""


class Path(StrEnum):
    """The way an attempt takes; also the label of `diptych_attempts_total`."""

    DISAGGREGATED = "disaggregated"
    LOCAL = "local"
    PREFILL_ONLY = "prefill_only"


class Across(StrEnum):
    """Why KV leaves its pair, which is what keeps the prefill worker's partner from taking it: it is not there or takes nothing new; its
    pool has no room; the request has just failed there; its layout is of another kind. Also a label (`diptych_attempts_across_total`)."""

    GONE = "gone"
    FULL = "full"
    FAILED = "failed"
    UNLIKE = "unlike"


@value
class Candidate:
    """One member as the router sees it now. `choices` and `prompt_tokens` are what this router itself has open there
    (the prompts not yet answered by a token); `report` is the last one while it is fresh, and None means not alive."""

    member: Member
    report: WorkerReport | None
    choices: int = 0
    prompt_tokens: int = 0
    usable: bool = field(init=False, compare=False)
    room: int = field(init=False, compare=False)
    """Tokens of the longest request that it may be sent; 0 while it is not usable."""
    score: float = field(init=False, compare=False)
    """Of its phase. Reckoned once: who takes many pictures of a large fleet has most candidates from the last one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "usable", self.report is not None and self.report.state is WorkerState.READY)
        object.__setattr__(self, "room", self.member.capacity_tokens if self.usable else 0)
        object.__setattr__(self, "score", (prefill_score if self.member.phase is Phase.PREFILL else decode_score)(self))

    def holds_now(self, tokens: int) -> bool:
        """Whether its pool has as much free, by its last report."""
        return self.report is not None and self.report.blocks_free * self.member.layout.block_size >= tokens


@value
class Snapshot:
    """The fleet at one moment. `turn` breaks ties: equally good workers take turns as it counts up."""

    prefills: Sequence[Candidate]
    decodes: Sequence[Candidate]
    turn: int = 0

    @classmethod
    def of(cls, candidates: Iterable[Candidate], turn: int = 0) -> Snapshot:
        """Of members of both phases."""
        sides: dict[Phase, list[Candidate]] = {phase: [] for phase in Phase}
        for candidate in candidates:
            sides[candidate.member.phase].append(candidate)
        return cls(tuple(sides[Phase.PREFILL]), tuple(sides[Phase.DECODE]), turn)


@value
class Policy:
    """The part of the router's config that decides who reads a prompt."""

    local_prefill: LocalPrefill = LocalPrefill.AUTO
    local_prefill_below: int = 16


@value
class Demand:
    """What is to be placed: `context_tokens` to compute before anything is drawn (the prompt, with one choice also what it has
    generated), and behind them up to `output_tokens` of each of `choices`.

    A worker that can hold one choice can write them all, one after the other if it must. `avoid`: workers on which this request has
    just failed. `local`: the last attempt, which should depend on one worker only.
    """

    context_tokens: int
    output_tokens: int
    choices: int = 1
    avoid: frozenset[str] = frozenset()
    local: bool = False


@value
class Placement:
    """`across`: why KV leaves its pair; None if it does not, or workers are not paired."""

    prefill: Member | None
    decode: Member | None
    across: Across | None = None

    @property
    def path(self) -> Path:
        if self.prefill is None:
            return Path.LOCAL
        return Path.DISAGGREGATED if self.decode else Path.PREFILL_ONLY


def place(snapshot: Snapshot, demand: Demand, policy: Policy) -> Placement:
    """The workers of the next attempt.

    Raises `ContextExceeded` if no member of the fleet, alive or not, could ever hold the request, and `Unavailable` if nobody
    who could is there now.
    """
    if demand.output_tokens == 1 and not _wants_local(demand, policy):
        check_fits(snapshot, demand, policy)
        prefill = _pick(_prefills(snapshot, demand), demand, snapshot.turn)
        if prefill:
            return Placement(prefill.member, None)
    decodes = _decodes(snapshot, demand)
    if not _wants_local(demand, policy):
        prefills = _prefills(snapshot, demand)
        paired = any(map(_partner, prefills))
        two = (_pick_partners if paired else _pick_two)(decodes, prefills, demand, snapshot.turn)
        if two:
            return _both(*two, snapshot, demand)
    if policy.local_prefill is not LocalPrefill.NEVER:
        decode = _pick(decodes, demand, snapshot.turn)
        if decode:
            return Placement(None, decode.member)
    check_fits(snapshot, demand, policy)  # who has found a place does
    raise Unavailable(_why_nobody(snapshot, policy))


def capacity(snapshot: Snapshot) -> int | None:
    """Tokens of the longest request any decode worker of the fleet can hold; None while the fleet has none."""
    return max([candidate.member.capacity_tokens for candidate in snapshot.decodes], default=None)


def check_fits(snapshot: Snapshot, demand: Demand, policy: Policy) -> None:
    """Raise `ContextExceeded` if the fleet is known and the demand fits nowhere in it."""
    decode_room = capacity(snapshot)
    if decode_room is None:
        return
    if demand.context_tokens >= decode_room:
        raise ContextExceeded(
            f"The prompt has {demand.context_tokens} tokens; the largest decode worker's KV pool holds {decode_room}, output included.",
            field="prompt",
        )
    wanted = demand.context_tokens + demand.output_tokens
    if wanted > decode_room:
        raise ContextExceeded(
            f"The prompt's {demand.context_tokens} tokens and {demand.output_tokens} of output make {wanted}; "
            f"the largest decode worker's KV pool holds {decode_room}.",
            field="max_tokens",
        )
    if policy.local_prefill is not LocalPrefill.NEVER:
        return
    prefill_room = max([candidate.member.capacity_tokens for candidate in snapshot.prefills], default=None)
    if prefill_room is not None and demand.context_tokens > prefill_room:
        raise ContextExceeded(
            f"The prompt has {demand.context_tokens} tokens; the largest prefill worker's KV pool holds {prefill_room}.", field="prompt"
        )


def unavailable(snapshot: Snapshot, policy: Policy) -> str | None:
    """Why no request could be served now, or None if one could."""
    try:
        place(snapshot, Demand(1, 1), policy)
        place(snapshot, Demand(max(1, policy.local_prefill_below), 2), policy)
    except (Unavailable, ContextExceeded) as error:
        return error.message
    return None


def prefill_score(candidate: Candidate) -> float:
    """1 when idle, falling with the prompt tokens that wait. A report lags behind what we have just sent, and counts what other
    routers sent: the larger of the two is the better guess."""
    waiting = max(candidate.prompt_tokens, candidate.report.prompt_tokens_waiting if candidate.report else 0)
    return 1.0 / (1.0 + waiting / _HALF_LOAD_TOKENS)


def decode_score(candidate: Candidate) -> float:
    """1 when idle and empty: the mean of how few choices it writes and how much of its KV pool is free."""
    report = candidate.report
    reported, free = (report.waiting + report.running, report.blocks_free / max(1, report.blocks_total)) if report else (0, 1.0)
    return 0.5 / (1.0 + max(candidate.choices, reported)) + 0.5 * min(1.0, free)


def _wants_local(demand: Demand, policy: Policy) -> bool:
    if policy.local_prefill is LocalPrefill.AUTO:
        return demand.local or demand.context_tokens < policy.local_prefill_below
    return policy.local_prefill is LocalPrefill.ALWAYS


def _prefills(snapshot: Snapshot, demand: Demand) -> list[Candidate]:
    return [c for c in snapshot.prefills if c.room >= demand.context_tokens]


def _decodes(snapshot: Snapshot, demand: Demand) -> list[Candidate]:
    """Those that can hold all choices at once, or if there are none those that can hold one."""
    one, more = demand.context_tokens + demand.output_tokens, (demand.choices - 1) * demand.output_tokens
    able = [c for c in snapshot.decodes if c.room >= one]
    return [c for c in able if c.room >= one + more] or able if more else able


_own_score, _partner = attrgetter("score"), attrgetter("member.partner")
Two = tuple[Candidate, Candidate]
"""A prefill and a decode worker."""


def _pick_two(decodes: Sequence[Candidate], prefills: Sequence[Candidate], demand: Demand, turn: int) -> Two | None:
    """The best decode worker that any prefill worker can hand KV to, and the best of those prefill workers.

    Layouts are compared only as far as that takes: to compare all of 500 with all of 500 took half a second.
    """
    while (decode := _pick(decodes, demand, turn)) is not None:
        able = prefills
        while (prefill := _pick(able, demand, turn)) is not None:
            if _alike(prefill, decode):
                return prefill, decode
            able = [candidate for candidate in able if candidate is not prefill]
        decodes = [candidate for candidate in decodes if candidate is not decode]
    return None


def _pick_partners(decodes: Sequence[Candidate], prefills: Sequence[Candidate], demand: Demand, turn: int) -> Two | None:
    """Both of a pair; or a prefill worker whose partner cannot take the prompt, and the best decode worker that can, if that is better
    by far. Where every decode worker is full none is: KV waits within its pair."""
    fresh = _fresh(decodes, demand)
    roomy = [decode for decode in fresh if decode.holds_now(demand.context_tokens)] or fresh
    partners = {decode.member.worker_id: decode for decode in roomy}
    whole: list[Two] = []
    alone: list[Candidate] = []
    for prefill in _fresh(prefills, demand):
        partner = partners.get(prefill.member.partner or "")
        if partner is None:
            alone.append(prefill)
        else:
            whole.append((prefill, partner))
    inside = _best(whole, turn)
    across = _pick_two(roomy, alone, demand, turn)
    if inside and across:
        return inside if _score(inside) >= _ACROSS * _score(across) else across
    return inside or across or _pick_two(decodes, prefills, demand, turn)


def _best(pairs: Sequence[Two], turn: int) -> Two | None:
    """Of those that can exchange KV."""
    while pairs:
        start = turn % len(pairs)
        best = max([*pairs[start:], *pairs[:start]], key=_score)
        if _alike(*best):
            return best
        pairs = [pair for pair in pairs if pair is not best]
    return None


def _score(two: Two) -> float:
    prefill, decode = two
    return prefill.score * decode.score


def _alike(prefill: Candidate, decode: Candidate) -> bool:
    return prefill.member.layout.difference(decode.member.layout) is None


def _both(prefill: Candidate, decode: Candidate, snapshot: Snapshot, demand: Demand) -> Placement:
    wanted = prefill.member.partner
    across = None if wanted in (None, decode.member.worker_id) else _why_across(prefill, snapshot, demand)
    return Placement(prefill.member, decode.member, across)


def _why_across(prefill: Candidate, snapshot: Snapshot, demand: Demand) -> Across:
    partner = next((candidate for candidate in snapshot.decodes if candidate.member.worker_id == prefill.member.partner), None)
    if partner is None or not partner.usable:
        return Across.GONE
    if partner.member.worker_id in demand.avoid:
        return Across.FAILED
    return Across.FULL if _alike(prefill, partner) else Across.UNLIKE


def _fresh(candidates: Sequence[Candidate], demand: Demand) -> Sequence[Candidate]:
    """Those on which this request has not just failed, if there are any."""
    return [c for c in candidates if c.member.worker_id not in demand.avoid] or candidates if demand.avoid else candidates


def _pick(candidates: Sequence[Candidate], demand: Demand, turn: int) -> Candidate | None:
    fresh = _fresh(candidates, demand)
    if not fresh:
        return None
    start = turn % len(fresh)
    return max([*fresh[start:], *fresh[:start]], key=_own_score)


def _why_nobody(snapshot: Snapshot, policy: Policy) -> str:
    decodes, prefills = snapshot.decodes, snapshot.prefills
    alive = sum(c.usable for c in decodes)
    if not alive:
        return f"No decode worker is ready ({len(decodes)} in the fleet)."
    if policy.local_prefill is LocalPrefill.NEVER and not any(c.usable for c in prefills):
        return f"No prefill worker is ready ({len(prefills)} in the fleet), and router.local_prefill is never."
    return "No ready worker has room for a request of this length."
