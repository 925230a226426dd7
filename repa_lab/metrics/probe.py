"""Linear probes: what a linear map can read off frozen features, under one closed protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import ArrayLike, NDArray

from repa_lab.metrics.arrays import AnyArray, Array, alongside, as_array, features, on_host, require_finite, spread

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_TRAIN, _VALIDATION = 0.6, 0.8  # where an item's place among those of its class puts it: below, between, above
_LEAST = 4  # items a class that leave one for each part
_ITERATIONS = 2000

Index = NDArray[np.int64]
Predict = Callable[[AnyArray], AnyArray]
Fit = Callable[[AnyArray, AnyArray, float], Predict]


@dataclass(frozen=True)
class Probe:
    """A probe's test score, and what it was fitted on.

    Attributes:
        value: top-1 accuracy on the test part, in [0, 1]; for ``regression`` R^2, at most 1.
        kind: ``ridge``, ``logistic`` or ``regression``.
        penalty: the one of ``PENALTIES`` that did best on the validation part.
        train, validation, test: items of each part; the probe scored was fitted on the first two.
        width: d of the features.
        classes: classes told apart; 0 for ``regression``.
        seed: of the split.
    """

    value: float
    kind: str
    penalty: float
    train: int
    validation: int
    test: int
    width: int
    classes: int
    seed: int

    @property
    def name(self) -> str:
        """``probe:ridge@1078+360+359/seed0``: numbers of different names are never compared."""
        return f"probe:{self.kind}@{self.train}+{self.validation}+{self.test}/seed{self.seed}"


def linear_probe(x: ArrayLike, labels: ArrayLike, kind: str = "ridge", seed: int = 0) -> Probe:
    """How well a linear map of features ``x`` ``(n, d)`` tells the labels of n items.

    The protocol has nothing to tune. Items are dealt to train, validation and test 60 : 20 : 20 within each class, at
    random by ``seed``. Features are standardised by the mean and deviation of what is fitted on, without learned scale.
    Each penalty of ``PENALTIES`` is fitted on train; the one that scores best on validation, the largest of equals, is
    fitted again on train and validation and scored on test. The penalty is ``penalty / 2 |W|^2`` beside a mean loss,
    hence means the same at any n; the bias is free.

    - ``ridge``: least squares on one-hot targets, in closed form; the largest output is the class.
    - ``logistic``: multinomial logistic regression, scikit-learn's L-BFGS, on the host wherever the features lie.
    - ``regression``: least squares on real-valued targets ``(n,)`` or ``(n, t)``, in closed form; scored by R^2 over
      all t targets together. There are no classes: the items are dealt as one.

    REPA (2410.06940, App. C.1) trains its probe by Adam for 90 epochs on all of ImageNet: same idea, another number.

    Args:
        x: features of any float type, e.g. a block's tokens averaged over an image.
        labels: ``(n,)`` classes, of any type that sorts; for ``regression`` the targets.
        kind: ``ridge``, ``logistic`` or ``regression``.
        seed: of the split. Give all arms the same.

    Raises:
        ValueError: counts differ, values are not finite, a class has fewer than 4 items, there is one class, unknown
            kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of probe {kind!r}; allowed: {', '.join(_KINDS)}")
    method, a = _KINDS[kind], features(as_array(x) if _KINDS[kind].is_on_host else x, least=_LEAST)
    given, groups = method.targets(labels, len(a))
    targets = alongside(given, a)
    train, validation, test = _split(groups, seed)

    def score(penalty: float, fitted: Index, held_out: Index) -> float:
        known, asked = alongside(fitted, a), alongside(held_out, a)
        predict = _standardised(method.fit, a[known, :], targets[known, ...], penalty)
        return method.score(predict(a[asked, :]), targets[asked, ...])

    found = {penalty: score(penalty, train, validation) for penalty in PENALTIES}
    best = max(PENALTIES, key=lambda penalty: (found[penalty], penalty))
    value = score(best, np.concatenate([train, validation]), test)
    parts = len(train), len(validation), len(test)
    return Probe(value, kind, best, *parts, a.shape[1], 0 if kind == "regression" else len(np.unique(groups)), seed)


def _split(groups: Index, seed: int) -> tuple[Index, Index, Index]:
    """Items of train, validation and test, dealt 60 : 20 : 20 within each group."""
    order = np.random.default_rng(seed).permutation(len(groups))
    place = np.empty(len(groups))
    for group in np.unique(groups):
        members = order[groups[order] == group]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    edges = (place < _TRAIN, (place >= _TRAIN) & (place < _VALIDATION), place >= _VALIDATION)
    train, validation, test = (np.flatnonzero(part) for part in edges)
    return train, validation, test


def _classes(labels: ArrayLike, count: int) -> tuple[Array, Index]:
    given = np.asarray(on_host(labels))
    if given.shape != (count,):
        raise ValueError(f"need one label for each of {count} items, got labels of shape {given.shape}")
    names, codes, sizes = np.unique(given, return_inverse=True, return_counts=True)
    if len(names) < 2 or sizes.min() < _LEAST:
        few = f"{names[sizes.argmin()]!r} has {sizes.min()}" if len(names) > 1 else f"all are {names[0]!r}"
        raise ValueError(
            f"a probe needs two classes and {_LEAST} items of each ({few}): add items or leave small classes out"
        )
    return codes.astype(np.float64), codes


def _values(targets: ArrayLike, count: int) -> tuple[Array, Index]:
    given = as_array(targets)
    if given.ndim not in (1, 2) or len(given) != count:
        raise ValueError(f"need targets (n,) or (n, t) for each of {count} items, got {given.shape}")
    require_finite(given, "targets")
    return given.reshape(count, -1), np.zeros(count, dtype=np.int64)


def _standardised(fit: Fit, x: AnyArray, targets: AnyArray, penalty: float) -> Predict:
    mean, deviation = spread(x)
    predict = fit((x - mean) / deviation, targets, penalty)
    return lambda values: predict((values - mean) / deviation)


def _least_squares(x: AnyArray, targets: AnyArray, penalty: float) -> Predict:
    """``(X^T X / n + penalty I) W = X^T (Y - mean Y) / n`` for standardised X."""
    xp = array_namespace(x)
    mean = xp.mean(targets, axis=0)
    gram = x.T @ x / len(x) + penalty * xp.eye(x.shape[1], dtype=x.dtype, device=device(x))
    weights = xp.linalg.solve(gram, x.T @ (targets - mean) / len(x))
    return lambda values: values @ weights + mean


def _ridge(x: AnyArray, codes: AnyArray, penalty: float) -> Predict:
    xp = array_namespace(x)
    outputs = _least_squares(x, xp.astype(codes[:, None] == xp.unique_values(codes), x.dtype), penalty)
    return lambda values: xp.argmax(outputs(values), axis=1)


def _logistic(x: Array, codes: Array, penalty: float) -> Predict:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (penalty * len(x)), max_iter=_ITERATIONS).fit(x, codes)
    return lambda values: np.asarray(model.predict(values))


def _accuracy(predicted: AnyArray, codes: AnyArray) -> float:
    return int((predicted == codes).sum()) / len(codes)


def _r2(predicted: AnyArray, targets: AnyArray) -> float:
    variation = float(((targets - array_namespace(targets).mean(targets, axis=0)) ** 2).sum())
    if variation == 0:
        raise ValueError("the targets of a part are constant: R^2 needs targets that differ, or more items")
    return 1 - float(((targets - predicted) ** 2).sum()) / variation


@dataclass(frozen=True)
class _Kind:
    targets: Callable[[ArrayLike, int], tuple[Array, Index]]
    fit: Fit
    score: Callable[[AnyArray, AnyArray], float]
    is_on_host: bool = False


_KINDS = {
    "ridge": _Kind(_classes, _ridge, _accuracy),
    "logistic": _Kind(_classes, _logistic, _accuracy, is_on_host=True),
    "regression": _Kind(_values, _least_squares, _r2),
}
