"""Certificates for tests: a cluster's own, and those that must not get anybody in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from diptych.cluster.process.certs import CA, Authority
from diptych.core.security import INTERNAL_NAME, TlsFiles

A_QUARTER_OF_AN_HOUR_AGO = -0.01
"""In days."""


@dataclass(frozen=True)
class Issued:
    """An authority in `directory`, and what it signs."""

    directory: Path
    authority: Authority

    @classmethod
    def below(cls, directory: Path) -> Issued:
        directory.mkdir(parents=True)
        authority = Authority.new("test", days=1)
        authority.write(directory)
        return cls(directory, authority)

    @property
    def ca(self) -> Path:
        return self.directory / CA

    def internal(self, stem: str = "internal", *, days: float = 1, name: str = INTERNAL_NAME) -> TlsFiles:
        """For a process of the cluster."""
        return replace(self.authority.write_leaf(self.directory, stem, [name], days=days), ca=self.ca)

    def public(self, stem: str = "server", *, days: float = 1) -> TlsFiles:
        """For a router on loopback."""
        return self.authority.write_leaf(self.directory, stem, ["localhost", "127.0.0.1"], days=days)


def strangers(directory: Path, ours: Issued) -> dict[str, TlsFiles]:
    """Who must not get in although he shows something, each by his fault. All trust our authority, so that it is they who are refused."""
    other = Issued.below(directory / "other")
    return {
        "of another authority": replace(other.internal(), ca=ours.ca),
        "expired": ours.internal("expired", days=A_QUARTER_OF_AN_HOUR_AGO),
    }
