"""Before any KV crosses a pair whose wire asks nobody who he is, each end proves to the other that it has heard what was said on their
lane.

gloo takes the first who connects to its port and says a small number. So the source says a secret on the lane, which only the two ends of
that lane hear, and each end sends over the connection what only one who knows it can make. It costs a pair one crossing when it is made.
Somebody in between, on the network, is not kept out: what crosses afterwards is neither encrypted nor signed.
"""

from __future__ import annotations

import logging
import secrets
from datetime import timedelta

import torch

from ...core.proofs import PROOF_BYTES, SECRET_BYTES, STRANGER, proof, proves
from .rendezvous import ToldStore
from .two_sided import SOURCE, Wire

log = logging.getLogger(__name__)

SECRET = "secret"


def agree(end: int, store: ToldStore) -> None:
    """The first thing of connecting, so that nobody has to wait for the secret later."""
    if end == SOURCE:
        store.set(SECRET, secrets.token_bytes(SECRET_BYTES))


def prove(wire: Wire, end: int, store: ToldStore, within_s: float) -> None:
    """The last thing of connecting. Raises `ConnectionError` if the other end is not the lane's."""
    secret, peer = store.get(SECRET), 1 - end
    heard = torch.empty(PROOF_BYTES, dtype=torch.uint8)
    shown = torch.frombuffer(bytearray(proof(secret, end, peer)), dtype=torch.uint8)
    works = [wire.receive(heard), wire.send(shown)]
    try:
        for work in works:
            work.wait(timedelta(seconds=within_s))
    except ConnectionError as error:
        log.warning("a pair is given up: the other end did not show that it knows what was said on the lane (%s)", error)
        raise
    if not proves(bytes(heard.tolist()), secret, peer, end):
        log.warning("a pair is given up: %s", STRANGER)
        raise ConnectionError(STRANGER)
