"""Devices as their makers describe them: dense bf16 FLOP/s, memory and its bandwidth, NVLink or PCIe per direction.

Estimates all: a profile made of these says so, and `diptych profile` replaces it by measured times. Source: NVIDIA's data sheets of
A100 SXM (2021), H100 SXM (2023), H200 SXM (2024), B200 (2025), L40S (2023).
"""

from __future__ import annotations

from ...core.errors import ConfigError
from .latency import Arithmetic, Device, roofline
from .profile import DeviceShare, Link, Model, Parallelism, Profile

DEVICES = {
    device.name: device
    for device in (
        Device("A100", flops=312e12, bandwidth=2.039e12, memory_bytes=80e9, link=300e9),
        Device("H100", flops=989e12, bandwidth=3.35e12, memory_bytes=80e9, link=450e9),
        Device("H200", flops=989e12, bandwidth=4.8e12, memory_bytes=141e9, link=450e9),
        Device("B200", flops=2250e12, bandwidth=8.0e12, memory_bytes=180e9, link=900e9),
        Device("L40S", flops=362e12, bandwidth=0.864e12, memory_bytes=48e9, link=32e9),
    )
}
NETWORK = 50e9 / 2
"""Bytes/s between nodes, per device: half of a 400 Gbit/s port."""
ERROR = 0.4
"""How far times from a data sheet may be off."""


def device_of(name: str) -> Device:
    """`ConfigError` lists those known."""
    if name.upper() not in DEVICES:
        raise ConfigError(
            f"There is no data sheet of {name!r}; there are {', '.join(DEVICES)}. Or measure: `diptych profile`.", field="device"
        )
    return DEVICES[name.upper()]


def estimate(model: Model, device: Device, tps: tuple[int, ...] = (1, 2, 4, 8)) -> Profile:
    """A profile from the device's data sheet, for every tp that splits the model's heads."""
    arithmetic = Arithmetic(
        parameters=model.weight_bytes / (4 if model.dtype == "float32" else 2),
        layers=model.layers,
        attention_width=int(model.kv_token_bytes / model.layers / (4 if model.dtype != "float32" else 8) * model.heads / model.kv_heads),
        kv_bytes=model.kv_token_bytes,
        weight_bytes=model.weight_bytes,
    )
    return Profile(
        source=f"data sheet of {device.name}",
        estimate=True,
        model=model,
        device=DeviceShare(name=device.name, memory_bytes=device.memory_bytes),
        parallelisms=tuple(Parallelism(tp=tp, times=roofline(arithmetic, device, tp), error=ERROR) for tp in tps if model.heads % tp == 0),
        links={"node": Link(bytes_per_s=device.link * 0.7), "network": Link(bytes_per_s=NETWORK * 0.8, latency=2e-5)},
    )
