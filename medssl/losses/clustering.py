"""Prediction of soft assignments to prototypes: SwAV with Sinkhorn-Knopp codes, and DINO's centred teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import check_positive, checked_rows


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return codes that spread the samples evenly over the prototypes (SwAV: Caron et al., NeurIPS 2020, sec. 3.1).

    Sinkhorn-Knopp (Cuturi, NeurIPS 2013) in logarithms and float32: exp(1 / 0.05) overflows float16. The batch must be
    the global one, since every step divides by sums over all samples.

    Args:
        scores: Cosine of each sample to each prototype. Shape: (N, K).
        epsilon: Entropy of the codes; small values make them hard.
        iterations: Rounds of giving each prototype, then each sample, the same mass.

    Returns:
        Codes whose rows sum to 1, without gradient. Shape: (N, K), float32 or wider.

    Raises:
        ValueError: If the shape is not (N, K), epsilon is not positive or there is no iteration.
    """
    check_positive("Sinkhorn", epsilon=epsilon, iterations=iterations)
    (scores,) = checked_rows("Sinkhorn", scores)
    logs = scores / epsilon
    for _ in range(iterations):
        logs = logs - torch.logsumexp(logs, dim=0, keepdim=True)
        logs = logs - torch.logsumexp(logs, dim=1, keepdim=True)
    return logs.exp()


def swapped_prediction(scores: Tensor, codes: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Return the cross-entropy of one view's scores with another view's codes (SwAV, eq. 2).

    Args:
        scores: Cosine of each sample to each prototype. Shape: (N, K).
        codes: Target distributions, without gradient. Shape: (N, K).
        temperature: Scores are divided by it.

    Returns:
        The mean over samples, a scalar, float32 or wider.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    check_positive("SwAV", temperature=temperature)
    scores, codes = checked_rows("SwAV", scores, codes)
    return _cross_entropy(codes.detach(), torch.log_softmax(scores / temperature, dim=1))


def swav(
    scores_a: Tensor,
    scores_b: Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue_a: Tensor | None = None,
    queue_b: Tensor | None = None,
) -> Tensor:
    """Return the mean of predicting b's codes from a and a's codes from b (SwAV: Caron et al., NeurIPS 2020).

    As in the authors' code it is the mean over directions, where the paper's eq. 1 has their sum.

    Args:
        scores_a: Cosine of view a of each sample to each prototype, of the global batch. Shape: (N, K).
        scores_b: Those of view b. Shape: (N, K).
        temperature: Scores are divided by it when they predict.
        epsilon: Entropy of the codes, see `sinkhorn`.
        iterations: See `sinkhorn`.
        queue_a: Scores of earlier samples that help to spread a's codes where the batch is smaller than the number of
            prototypes. Shape: (Q, K).
        queue_b: Those for b's codes. Shape: (Q, K).

    Returns:
        A scalar, float32 or wider; ln K where all scores are equal.

    Raises:
        ValueError: If shapes do not fit, or a temperature is not positive.
    """
    codes_a = _codes(scores_a, queue_a, epsilon, iterations)
    codes_b = _codes(scores_b, queue_b, epsilon, iterations)
    forth = swapped_prediction(scores_a, codes_b, temperature=temperature)
    back = swapped_prediction(scores_b, codes_a, temperature=temperature)
    return (forth + back) / 2


def dino(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    centre: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Return the cross-entropy of the student's views with the teacher's other views (DINO: Caron et al., ICCV 2021).

    Args:
        student: Outputs for each view, the teacher's views first and in the same order. Shape of each: (N, K).
        teacher: Outputs for the global views, without gradient. Shape of each: (N, K).
        centre: Running mean of the teacher's outputs, see `updated_centre`. Shape: (K,).
        student_temperature: Sharpness of the student.
        teacher_temperature: Sharpness of the teacher; below the student's.

    Returns:
        The mean over samples and pairs of different views, a scalar, float32 or wider; ln K where all outputs are
        uniform.

    Raises:
        ValueError: If shapes do not fit, there is no pair of different views, or a temperature is not positive.
    """
    check_positive("DINO", student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    if not teacher or len(student) < max(2, len(teacher)):
        raise ValueError(
            "DINO needs the student's outputs for at least two views, those of the teacher included: "
            f"got {len(student)} views of the student and {len(teacher)} of the teacher"
        )
    checked_rows("DINO", *student, *teacher)
    targets = [centred_target(output, centre, temperature=teacher_temperature) for output in teacher]
    guesses = [torch.log_softmax(at_least_float32(output) / student_temperature, dim=1) for output in student]
    errors = [
        _cross_entropy(target, guess)
        for i, target in enumerate(targets)
        for j, guess in enumerate(guesses)
        if i != j  # the same view would teach nothing but itself
    ]
    return torch.stack(errors).mean()


@torch.no_grad()
def centred_target(output: Tensor, centre: Tensor, *, temperature: float = 0.04) -> Tensor:
    """Return what the teacher asks for: the softmax of its centred and sharpened output, without gradient.

    Args:
        output: The teacher's output for a view. Shape: (N, K).
        centre: Shape: (K,).
        temperature: Sharpness.

    Returns:
        Rows that sum to 1. Shape: (N, K), float32 or wider.

    Raises:
        ValueError: If the centre has not one value for each output.
    """
    if centre.shape != output.shape[1:]:
        raise ValueError(f"DINO needs a centre of shape {tuple(output.shape[1:])}, got {tuple(centre.shape)}")
    return torch.softmax((at_least_float32(output) - at_least_float32(centre)) / temperature, dim=1)


@torch.no_grad()
def updated_centre(centre: Tensor, teacher: Sequence[Tensor], *, momentum: float = 0.9) -> Tensor:
    """Return the centre moved towards the mean of the teacher's outputs, which must be those of the global batch.

    Args:
        centre: Shape: (K,).
        teacher: Outputs for the global views. Shape of each: (N, K).
        momentum: Share of the old centre, in [0, 1].

    Returns:
        Shape: (K,), in the centre's precision.

    Raises:
        ValueError: If shapes do not fit or the momentum is not in [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"The centre needs a momentum in [0, 1], got {momentum}")
    if not teacher or any(output.shape[1:] != centre.shape for output in teacher):
        raise ValueError(
            f"A centre of shape {tuple(centre.shape)} needs outputs (N, K) of that width, "
            f"got {[tuple(output.shape) for output in teacher]}"
        )
    mean = torch.stack([at_least_float32(output).mean(dim=0) for output in teacher]).mean(dim=0)
    return torch.lerp(mean, at_least_float32(centre), momentum).to(centre.dtype)


def _cross_entropy(target: Tensor, log_guess: Tensor) -> Tensor:
    return -(target * log_guess).sum(dim=1).mean()


def _codes(scores: Tensor, queue: Tensor | None, epsilon: float, iterations: int) -> Tensor:
    if queue is None:
        return sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    if queue.ndim != 2 or queue.shape[1:] != scores.shape[1:]:
        raise ValueError(
            f"SwAV with scores {tuple(scores.shape)} needs a queue of that width, got {tuple(queue.shape)}"
        )
    everyone = torch.cat([at_least_float32(scores), at_least_float32(queue)])
    return sinkhorn(everyone, epsilon=epsilon, iterations=iterations)[: len(scores)]
