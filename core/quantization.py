"""Weights in fewer bits than the model computes with: what there is, what it takes, where it may be cut.

Numbers of 8 or 4 bits times a scale: of int8 each row of a matrix, one output's inputs, has a scale; of int4 each `GROUP` inputs of a row.
Embedding, head and the products of the layers are stored so, embedding and head always as int8. Norms, biases and learned positions are
as they are without.
"""

from __future__ import annotations

from enum import StrEnum

GROUP = 32
"""Inputs that share an int4 scale."""
RUN = 128
"""Inputs in one run of int4 numbers, 64 bytes: a row ends with a whole run, padded."""
_SCALE_BYTES = {"int8": 4, "int4": 2}


class Quantization(StrEnum):
    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Of a number of a quantised matrix."""
        return 8 if self is Quantization.INT8 else 4

    @property
    def of_tables(self) -> Quantization:
        """What embedding and head are stored as: with int4 there too the perplexity of Gemma 3 270M is 60 % higher."""
        return Quantization.INT8 if self is Quantization.INT4 else self

    def matrix_bytes(self, outputs: int, inputs: int, itemsize: int) -> int:
        """Bytes of a matrix, scales included; `itemsize`: bytes of a number that is not quantised."""
        if self is Quantization.NONE:
            return outputs * inputs * itemsize
        return outputs * (self.row_bytes(inputs) + self.groups(inputs) * _SCALE_BYTES[self])

    def row_bytes(self, inputs: int) -> int:
        """Bytes of the numbers of one row of a quantised matrix."""
        return inputs if self is Quantization.INT8 else -(-inputs // RUN) * RUN // 2

    def groups(self, inputs: int) -> int:
        """Scales of one row of a quantised matrix."""
        return 1 if self is Quantization.INT8 else inputs // GROUP

    def can_cut(self, inputs: int) -> bool:
        """Whether a row may begin or end at this input."""
        return self is not Quantization.INT4 or inputs % GROUP == 0


def precision(dtype: str, quantization: Quantization) -> str:
    """What a model computes with and is stored as, in words."""
    return str(dtype) if quantization is Quantization.NONE else f"{dtype}, {quantization} weights"
