"""What the ends of a connection show each other where nothing else asks them who they are: that both know one secret."""

from __future__ import annotations

import hmac

SECRET_BYTES = 32
PROOF_BYTES = 32
STRANGER = "who has connected does not know what was said between us"


def proof(secret: bytes, sender: int, receiver: int) -> bytes:
    """What `sender` shows to `receiver`, `PROOF_BYTES` long: HMAC-SHA256. Of no use to show to anybody else, nor to show back."""
    return hmac.digest(secret, b"%d to %d" % (sender, receiver), "sha256")


def proves(heard: bytes, secret: bytes, sender: int, receiver: int) -> bool:
    return hmac.compare_digest(heard, proof(secret, sender, receiver))
