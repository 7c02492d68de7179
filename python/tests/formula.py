"""SPEC 1-4 in dense NumPy float64, square and rectangular: the truth for the package's tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddtas import Settings


@dataclass
class Expected:
    """Loss, gradients and mined pairs."""

    loss: float
    gradient: np.ndarray
    reference_gradient: np.ndarray
    count_pos: np.ndarray
    count_neg: np.ndarray
    gamma_pos: float
    gamma_neg: float
    dloss_dlambda_pos: float
    dloss_dlambda_neg: float


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def tolerances(similarity, positive, min_pos, negative, settings: Settings) -> tuple[float, float]:
    gamma = settings.gamma
    if settings.mining == "none":
        return np.inf, np.inf
    if settings.mining == "symmetric":
        return gamma, gamma
    gamma_neg = gamma * settings.negative_ratio
    probe = (negative & (similarity > min_pos[:, None] - gamma * settings.probe_ratio)).sum()
    if settings.mining == "asms" or not positive.any() or probe <= positive.sum():
        return gamma, gamma_neg
    t = settings.tolerance * sigmoid(probe / positive.sum())
    return gamma * (1 + t), gamma_neg * (1 - t)


def expected(anchors, labels, references=None, reference_labels=None, settings=Settings(), own=None) -> Expected:
    """`own`, booleans `[B, N]`, says which references are the anchors themselves, by index in place of similarity."""
    square = references is None
    a = np.asarray(anchors, np.float64)
    r, s_labels = (a, labels) if square else (np.asarray(references, np.float64), reference_labels)
    similarity = a @ r.T
    known = (labels >= 0)[:, None] & (s_labels >= 0)[None, :]
    same = labels[:, None] == s_labels[None, :]
    if square:
        own = np.eye(len(a), dtype=bool)
    duplicate = (1 - 1e-6) * np.maximum((a * a).sum(1)[:, None], (r * r).sum(1)[None, :])
    positive = known & same & (similarity < duplicate)
    if own is not None:
        positive &= ~own
    negative = known & ~same
    min_pos = np.where(positive, similarity, np.inf).min(1)
    max_neg = np.where(negative, similarity, -np.inf).max(1)
    gamma_pos, gamma_neg = tolerances(similarity, positive, min_pos, negative, settings)
    with np.errstate(invalid="ignore"):
        kept_pos = positive & (max_neg > -np.inf)[:, None] & (similarity < max_neg[:, None] + gamma_pos)
        kept_neg = negative & (min_pos < np.inf)[:, None] & (similarity > min_pos[:, None] - gamma_neg)
    count_pos, count_neg = kept_pos.sum(1), kept_neg.sum(1)
    active = (count_pos > 0) & (count_neg > 0)

    beta, alpha, batch = settings.beta, settings.alpha, len(a)
    share_pos = np.where(active, 2 / (batch * np.maximum(count_pos, 1)), 0)[:, None] * kept_pos
    share_neg = np.where(active, 2 / (batch * np.maximum(count_neg, 1)), 0)[:, None] * kept_neg
    x_pos, x_neg = -beta * (similarity - settings.lambda_pos), alpha * (similarity - settings.lambda_neg)
    loss = (share_pos / beta * np.logaddexp(0, x_pos) + share_neg / alpha * np.logaddexp(0, x_neg)).sum()
    g_pos, g_neg = -share_pos * sigmoid(x_pos), share_neg * sigmoid(x_neg)
    g = g_pos + g_neg
    return Expected(
        loss=loss,
        gradient=(g + g.T) @ a if square else g @ r,
        reference_gradient=g.T @ a,
        count_pos=count_pos,
        count_neg=count_neg,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        dloss_dlambda_pos=-g_pos.sum(),
        dloss_dlambda_neg=-g_neg.sum(),
    )


def unit_rows(count: int, dim: int, seed: int, classes: int = 7, noise: float = 1.0):
    """Unit rows around a centre for each class, and their labels; every thirteenth row is ignored."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    centres = np.random.default_rng(1).normal(size=(classes, dim))
    rows = centres[labels] + noise * random.normal(size=(count, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels[::13] = -1
    return rows, labels


def close(got, want, factor: float) -> None:
    """Asserts that `got` is `want` within `factor` of the largest entry; names the entry that is not."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.abs(got - want)
    worst = np.unravel_index(error.argmax(), error.shape)
    bound = factor * np.abs(want).max() + 1e-12
    assert error[worst] <= bound, f"worst at {worst}: got {got[worst]}, want {want[worst]}, bound {bound}"
