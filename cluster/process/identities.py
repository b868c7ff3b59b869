"""What processes of a cluster know each other by: files of the config, or an authority that lives as long as the cluster.

The latter's files are in the cluster's scratch directory, which is its user's alone. To other hosts they come through Ray, in the
environment of the process, and become files in memory there: as secret as whatever else a Ray cluster is told, its own token included.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from pathlib import Path

from ...core.config import ClusterConfig
from ...core.security import INTERNAL_NAME, Internal, TlsFiles
from ...core.tls import read_pems

VARIABLE = "DIPTYCH_INTERNAL_TLS"


def is_mutual(config: ClusterConfig) -> bool:
    """Whether processes of the cluster speak mutual TLS."""
    security = config.security
    given = security.internal_tls is not None or security.internal is Internal.MUTUAL
    return given or (security.internal is Internal.AUTO and config.ray.joined)


def internal_files(config: ClusterConfig, scratch: Path) -> TlsFiles | None:
    """The files for mutual TLS, made below `scratch` if the config names none; None if it is not wanted."""
    if not is_mutual(config):
        return None
    if (given := config.security.internal_tls) is not None:
        return TlsFiles(*(Path(path).absolute() for path in (given.cert, given.key, given.ca)))
    from .certs import Authority

    directory = scratch / "tls"
    directory.mkdir(mode=0o700)
    authority = Authority.new("Diptych, this cluster alone", days=LIFE_DAYS)
    return authority.write_leaf(directory, "internal", [INTERNAL_NAME], days=LIFE_DAYS, authority_file="ca.pem")


LIFE_DAYS = 3650
"""The authority's key is forgotten at once, so these certificates end with their cluster and cannot be renewed before."""


def to_environment(files: TlsFiles) -> dict[str, str]:
    """What `from_environment` reads at the other end."""
    pems = read_pems(files)
    assert pems.ca is not None, "a cluster's processes know each other by an authority"
    return {VARIABLE: json.dumps({"cert": pems.cert.decode(), "key": pems.key.decode(), "ca": pems.ca.decode()})}


def from_environment(environment: MutableMapping[str, str] = os.environ) -> TlsFiles | None:
    """Files in memory, which a program that takes this process's place has too; None if nothing was said. It is said once."""
    said = environment.pop(VARIABLE, None)
    if said is None:
        return None
    pems: dict[str, str] = json.loads(said)
    return TlsFiles(*(_in_memory(name, pems[name]) for name in ("cert", "key", "ca")))


def _in_memory(name: str, text: str) -> Path:
    handle = os.memfd_create(f"diptych-{name}", 0)  # 0: it outlives an exec
    os.write(handle, text.encode())
    return Path(f"/proc/self/fd/{handle}")
