"""The likeliest tokens of rows of logits, and what all their probabilities are divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import Native, native
from .threads import threads

SPAN = 64
"""likeliest.cpp looks at the largest of so many logits first: it gains nothing where more tokens are asked for than there are spans."""


def likeliest(logits: Tensor, rows: Tensor, count: int, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row `rows` (int64 [n]) of logits [rows, vocab], divided by the row's temperature (fp32 [n]), in fp32 [n,
    count], largest first, and their ids; on a CPU of equal ones the first."""
    vocab = logits.shape[1]
    kernels = _kernels(logits) if 0 < count <= vocab // SPAN else None
    if kernels is None:
        return likeliest_torch(logits, rows, count, temperatures)
    n, wide = rows.shape[0], logits.dtype is torch.float32
    values, tokens, kept = torch.empty(n, count), torch.empty(n, count, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
    kernels.likeliest(
        values.data_ptr(),
        tokens.data_ptr(),
        kept.data_ptr(),
        logits.data_ptr(),
        wide,
        vocab,
        logits.stride(0),
        rows.data_ptr(),
        temperatures.data_ptr(),
        n,
        count,
        threads(),
    )
    broken = int(kept.min()) < count
    return likeliest_torch(logits, rows, count, temperatures) if broken else (values, tokens)


def likeliest_torch(logits: Tensor, rows: Tensor, count: int, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch. On a GPU it names any of equal ones, and nothing waits."""
    wide = logits.index_select(0, rows).float()
    if not wide.is_cpu:
        values, tokens = wide.topk(count)
        return values / temperatures[:, None], tokens
    ordered = wide.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = ordered.topk(max(1, count)).values[:, -1:]
    above, level = ordered > least, ordered == least
    level &= level.cumsum(1) <= count - above.sum(1, keepdim=True)
    tokens = (above | level).nonzero()[:, 1].view(rows.shape[0], count)
    tokens = tokens.gather(1, ordered.gather(1, tokens).sort(dim=1, descending=True, stable=True).indices)
    return wide.gather(1, tokens) / temperatures[:, None], tokens


def log_totals(logits: Tensor, rows: Tensor, temperatures: Tensor) -> Tensor:
    """Of each row the logarithm of the sum of e to the logit / temperature, fp32 [n]; a token's log-probability is logit / temperature less
    this."""
    if (kernels := _kernels(logits)) is None:
        return log_totals_torch(logits, rows, temperatures)
    n, wide = rows.shape[0], logits.dtype is torch.float32
    totals = torch.empty(n)
    kernels.log_totals(
        totals.data_ptr(),
        logits.data_ptr(),
        wide,
        logits.shape[1],
        logits.stride(0),
        rows.data_ptr(),
        temperatures.data_ptr(),
        n,
        threads(),
    )
    return totals


def log_totals_torch(logits: Tensor, rows: Tensor, temperatures: Tensor) -> Tensor:
    """The same by torch: 290 us a row in place of 80."""
    return (logits.index_select(0, rows).float() / temperatures[:, None]).logsumexp(1)


def _kernels(logits: Tensor) -> Native | None:
    """The kernels, if they read such logits."""
    fits = logits.is_cpu and logits.dtype in (torch.float32, torch.bfloat16) and logits.stride(1) == 1
    return native() if fits else None
