"""How a config spreads a model over the ranks of its workers, and which ranks exchange KV. Pure."""

from __future__ import annotations

from ...core.config import ClusterConfig, WorkerGroup
from ...core.errors import ConfigError
from ...core.fleet import Phase
from ...core.layout import Layout
from ...core.model import ModelCard
from ...kv_transfer.slices import routes
from ..process.spec import BLOCK_SIZE

Layouts = dict[Phase, tuple[Layout, ...]]
"""Of each group of each phase, by the config's order."""


def section_of(config: ClusterConfig, phase: Phase, group: int) -> str:
    """Where the config describes this group of workers."""
    return f"{phase.value}.groups.{group}" if config.section(phase).groups else phase.value


def layouts(config: ClusterConfig, card: ModelCard) -> Layouts:
    """`ConfigError` names the key, the model, and what would work, if the model cannot be spread as the config says."""
    return {
        phase: tuple(
            _layout(card, group, section_of(config, phase, number)) for number, group in enumerate(config.section(phase).all_groups)
        )
        for phase in Phase
    }


def _layout(card: ModelCard, group: WorkerGroup, section: str) -> Layout:
    layers = card.decoder.layers
    if group.pp > layers:
        raise ConfigError(
            f"{section}.pp: pp {group.pp} is more than the {layers} layers of {card.name}; at most {layers} stages have one each.",
            field=f"{section}.pp",
        )
    try:
        return card.layout(block_size=BLOCK_SIZE, kv_tokens=group.kv_tokens or 0, tp=group.tp, stages=group.stages_of(layers))
    except ConfigError as error:
        key = f"{section}.{'stages' if error.field == 'pp' and group.stages else error.field}"
        raise ConfigError(f"{key}: {error.message}", field=key) from None


def pairs_of(config: ClusterConfig, spread: Layouts, phase: Phase, group: int) -> list[int]:
    """For each rank of this group's workers: with how many ranks of workers of the other phase it exchanges KV."""
    other = phase.other
    ours, counts = spread[phase][group], [0] * spread[phase][group].ranks
    for theirs, there in zip(spread[other], config.section(other).all_groups, strict=True):
        for route in routes(ours, theirs) if phase is Phase.PREFILL else routes(theirs, ours):
            counts[route.source if phase is Phase.PREFILL else route.destination] += there.workers
    return counts
