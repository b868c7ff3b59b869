"""Fleet, members, layouts and reports ↔ their messages: exact inverses."""

from __future__ import annotations

from ..core.fleet import Fleet, Measure, Member, Phase, WorkerReport, WorkerState
from ..core.layout import CacheGroup, CacheKind, DType, Layout
from ..proto import worker_pb2 as pb
from .codec_fields import finite, parse, present, word

FleetStatus = tuple[Fleet, tuple[WorkerReport, ...]]


def write_layout(layout: Layout) -> pb.Layout:
    return pb.Layout(
        fingerprint=layout.fingerprint,
        groups=[
            pb.CacheGroup(
                kind=group.kind,
                layers=group.layers,
                kv_heads=group.kv_heads,
                head_dim=group.head_dim,
                dtype=group.dtype,
                window=group.window,
            )
            for group in layout.groups
        ],
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        tp=layout.tp,
        stages=layout.stages,
    )


def read_layout(message: pb.Layout) -> Layout:
    return Layout(
        fingerprint=message.fingerprint,
        groups=tuple(_read_group(group) for group in message.groups),
        block_size=message.block_size,
        num_blocks=tuple(message.num_blocks),
        tp=message.tp,
        stages=tuple(message.stages),
    )


def _read_group(message: pb.CacheGroup) -> CacheGroup:
    return CacheGroup(
        kind=word(CacheKind, message.kind, "layout.groups.kind"),
        layers=tuple(message.layers),
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        dtype=word(DType, message.dtype, "layout.groups.dtype"),
        window=message.window,
    )


def _write_fleet(fleet: Fleet) -> pb.Fleet:
    return pb.Fleet(
        version=fleet.version,
        members=[
            pb.Member(
                worker_id=member.worker_id,
                address=member.address,
                phase=member.phase,
                incarnation=member.incarnation,
                layout=write_layout(member.layout),
                capacity_tokens=member.capacity_tokens,
                partner=member.partner or "",
            )
            for member in fleet.members
        ],
    )


def _read_fleet(message: pb.Fleet) -> Fleet:
    return Fleet(version=message.version, members=tuple(_read_member(member) for member in message.members))


def _read_member(message: pb.Member) -> Member:
    present(message, "layout", "members.layout")
    return Member(
        worker_id=message.worker_id,
        address=message.address,
        phase=word(Phase, message.phase, "members.phase"),
        incarnation=message.incarnation,
        layout=read_layout(message.layout),
        capacity_tokens=message.capacity_tokens,
        partner=message.partner or None,
    )


def _write_report(report: WorkerReport) -> pb.WorkerReport:
    return pb.WorkerReport(
        worker_id=report.worker_id,
        incarnation=report.incarnation,
        state=report.state,
        waiting=report.waiting,
        running=report.running,
        prompt_tokens_waiting=report.prompt_tokens_waiting,
        blocks_free=report.blocks_free,
        blocks_total=report.blocks_total,
        leases=report.leases,
        counters=[pb.Counter(name=name, value=value) for name, value in report.counters],
        measures=[pb.Measure(name=measure.name, value=measure.value, label=measure.label) for measure in report.measures],
    )


def _read_report(message: pb.WorkerReport) -> WorkerReport:
    return WorkerReport(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        state=word(WorkerState, message.state, "state"),
        waiting=message.waiting,
        running=message.running,
        prompt_tokens_waiting=message.prompt_tokens_waiting,
        blocks_free=message.blocks_free,
        blocks_total=message.blocks_total,
        leases=message.leases,
        counters=tuple((counter.name, finite(counter.value, "counters")) for counter in message.counters),
        measures=tuple(Measure(measure.name, finite(measure.value, "measures"), measure.label) for measure in message.measures),
    )


def encode_fleet(fleet: Fleet) -> bytes:
    return _write_fleet(fleet).SerializeToString()


def decode_fleet(data: bytes) -> Fleet:
    return _read_fleet(parse(pb.Fleet, data))


def encode_report(report: WorkerReport) -> bytes:
    return _write_report(report).SerializeToString()


def decode_report(data: bytes) -> WorkerReport:
    return _read_report(parse(pb.WorkerReport, data))


def encode_fleet_status(status: FleetStatus) -> bytes:
    fleet, reports = status
    return pb.FleetStatus(fleet=_write_fleet(fleet), reports=[_write_report(report) for report in reports]).SerializeToString()


def decode_fleet_status(data: bytes) -> FleetStatus:
    message = parse(pb.FleetStatus, data)
    return _read_fleet(message.fleet), tuple(_read_report(report) for report in message.reports)
