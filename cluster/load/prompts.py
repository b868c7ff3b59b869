"""What is asked: prompts that share no prefix, so that nothing comes from a prefix cache unless the server was asked before."""

from __future__ import annotations

import random

FIRST_ID = 10
"""Ids below are special tokens in most vocabularies."""

_TEXT = """
and the of to in that was his with for as had you not be on at by which have or from this him but all she they were my are me one
their so an said them we who would been will no when there if more out up into do any your what has man could other than our some
very time upon about may its only now like little then can made should did us such great before must two these see know over much
down after first good men own never most old day where those came himself way work life without go make well
"""
WORDS = _TEXT.split()
"""Frequent English words, nearly all of them one token in vocabularies of today."""


def token_ids(count: int, vocabulary: int, seed: int, variant: int, number: int) -> list[int]:
    """Prompt `number` of a load's variant: `count` random ids from `FIRST_ID` to below `vocabulary`."""
    draw = random.Random(f"prompt {seed} {variant} {number}")
    return draw.choices(range(min(FIRST_ID, vocabulary - 1), vocabulary), k=count)


def text(count: int, seed: int, variant: int, number: int) -> str:
    """Prompt `number` as text of `count` words: about as many tokens. How many the server says."""
    draw = random.Random(f"prompt {seed} {variant} {number}")
    return " ".join(draw.choices(WORDS, k=count))
