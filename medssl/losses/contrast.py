"""Contrast of two views in a batch: NT-Xent and the variants that can take its place.

Every function takes the two views of N samples, row i of both from one sample, and returns the mean over the 2N
anchors. An anchor's positive is the other view of its sample; its negatives are both views of all other samples. With
`groups` (the volume that a crop comes from) pairs of different samples of one group are neither: crops of one volume
may show the same tissue. A batch of one group then costs 0. `supcon` alone reads `groups` the other way, see there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.similarity import check_positive, checked_rows, leave_out, product, same_group, unit_rows
from medssl.losses.supcon import supcon


def nt_xent(first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy (SimCLR: Chen et al., ICML 2020, eq. 1).

    Args:
        first: Embeddings of the first views; normalised here. Shape: (N, D), N >= 2.
        second: Embeddings of the second views. Shape: (N, D).
        temperature: Cosines are divided by it.
        groups: Samples of one group are no negatives of each other. Shape: (N,), integer.

    Returns:
        A scalar, float32 or wider; ln(2N - 1) where all rows are equal.

    Raises:
        ValueError: If shapes differ, there are fewer than two samples, or the temperature is not positive.
    """
    pairs = _pairs("NT-Xent", first, second, temperature, groups)
    return pairs.mean(F.softplus(pairs.negatives - pairs.positive))


def dcl(first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """Return the decoupled contrastive loss: NT-Xent without the positive in the denominator (Yeh et al., ECCV 2022).

    Deliberate deviation: the mean over both directions, not their sum, so that its size is that of `nt_xent`.
    Arguments and errors as in `nt_xent`. Returns ln(2N - 2) where all rows are equal; it can be negative.
    """
    pairs = _pairs("DCL", first, second, temperature, groups)
    return pairs.mean(pairs.negatives - pairs.positive)


def dclw(
    first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None, sigma: float = 0.5
) -> Tensor:
    """Return the decoupled loss whose positives weigh the more, the less alike they are (Yeh et al., ECCV 2022).

    The weight of sample i is 2 - N softmax(s / sigma)_i over the cosines s of the N positives: 1 on average, and
    gradients pass through it, as in the paper. Arguments, errors and the mean over directions as in `dcl`.

    Args:
        first: Shape: (N, D), N >= 2.
        second: Shape: (N, D).
        temperature: Cosines are divided by it.
        groups: Samples of one group are no negatives of each other. Shape: (N,), integer.
        sigma: Width of the von Mises-Fisher weight; large values make it `dcl`.
    """
    check_positive("DCLW", sigma=sigma)
    pairs = _pairs("DCLW", first, second, temperature, groups)
    count = len(first)
    weights = 2 - count * torch.softmax(pairs.positive[:count] * (temperature / sigma), dim=0)
    return pairs.mean(pairs.negatives - weights.repeat(2) * pairs.positive)


def debiased(
    first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None, tau_plus: float = 0.1
) -> Tensor:
    """Return NT-Xent with the share of hidden positives taken out of the negatives (Chuang et al., NeurIPS 2020).

    With p the exponential of the positive, M negatives of sum n and their corrected sum
    g = max((n - tau_plus M p) / (1 - tau_plus), M exp(-1 / temperature)), the loss is -ln(p / (p + g)), computed in
    logarithms. M is the number of negatives that `groups` leave, 2N - 2 without. Arguments and errors as in `nt_xent`.

    Args:
        first: Shape: (N, D), N >= 2.
        second: Shape: (N, D).
        temperature: Cosines are divided by it.
        groups: Samples of one group are no negatives of each other. Shape: (N,), integer.
        tau_plus: Probability that a negative shows what the anchor shows, in [0, 1); 0 gives `nt_xent`.
    """
    if not 0 <= tau_plus < 1:
        raise ValueError(f"Debiased contrast needs a tau_plus in [0, 1), got {tau_plus}")
    pairs = _pairs("Debiased contrast", first, second, temperature, groups)
    if tau_plus == 0:
        return pairs.mean(F.softplus(pairs.negatives - pairs.positive))
    log_count = pairs.left.clamp(min=1).to(pairs.positive.dtype).log()
    # ln(n - tau_plus M p) = ln n + ln(1 - exp(excess)); where nothing is left, the floor below takes over.
    excess = math.log(tau_plus) + log_count + pairs.positive - pairs.negatives
    some = excess < 0
    rest = torch.log(-torch.expm1(torch.where(some, excess, -1.0)))
    floor = log_count - 1 / temperature
    corrected = torch.where(some, pairs.negatives + rest - math.log1p(-tau_plus), floor)
    return pairs.mean(F.softplus(torch.maximum(corrected, floor) - pairs.positive))


def additive_margin(
    first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None, margin: float = 0.1
) -> Tensor:
    """Return NT-Xent whose positive cosine must win by a margin (symmetric NT-Xent-AM: Lepage and Dehak, 2024).

    The paper's scale is 1 / temperature (33.3 there). Arguments and errors as in `nt_xent`.

    Args:
        first: Shape: (N, D), N >= 2.
        second: Shape: (N, D).
        temperature: Cosines are divided by it.
        groups: Samples of one group are no negatives of each other. Shape: (N,), integer.
        margin: Taken off the cosine of the positive; 0 gives `nt_xent`.
    """
    pairs = _pairs("Additive-margin contrast", first, second, temperature, groups)
    return pairs.mean(F.softplus(pairs.negatives - pairs.positive + margin / temperature))


OBJECTIVES: Mapping[str, Callable[..., Tensor]] = {
    "nt-xent": nt_xent,
    "dcl": dcl,
    "dclw": dclw,
    "debiased": debiased,
    "additive-margin": additive_margin,
    "supcon": supcon,
}
"""By name; each is called as `objective(first, second, temperature=..., groups=..., **its own settings)`."""


class _Pairs(NamedTuple):
    """The 2N anchors of a batch: first views, then second views.

    Attributes:
        positive: Logit of each anchor's positive. Shape: (2N,).
        negatives: Logarithm of the sum of exponentials of each anchor's negatives. Shape: (2N,).
        left: Number of negatives of each anchor. Shape: (2N,), integer.
    """

    positive: Tensor
    negatives: Tensor
    left: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over anchors; one without negatives, as in a batch of one group, counts as 0."""
        return torch.where(self.left > 0, values, 0.0).mean()


def _pairs(name: str, first: Tensor, second: Tensor, temperature: float, groups: Tensor | None) -> _Pairs:
    check_positive(name, temperature=temperature)
    first, second = checked_rows(name, first, second, least=2)
    first, second = unit_rows(first), unit_rows(second)
    rows = torch.cat([first, second])
    count = len(first)
    out = torch.eye(count, dtype=torch.bool, device=rows.device)
    alike = same_group(name, groups, count)
    if alike is not None:
        out = out | alike
    # Itself, its positive and whatever shares its group is no negative of an anchor.
    out = out.repeat(2, 2)
    logits = leave_out(product(rows, rows.T) / temperature, out)
    positive = ((first * second).sum(dim=1) / temperature).repeat(2)
    return _Pairs(positive, torch.logsumexp(logits, dim=1), (~out).sum(dim=1))
