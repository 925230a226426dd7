from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import r2_score

from repa_lab.metrics import linear_probe
from repa_lab.metrics.probe import PENALTIES, _split


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def blobs(
    each: int = 40, classes: int = 3, width: int = 6, apart: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(classes), each)
    return apart * normal(classes, width, seed=seed)[labels] + normal(len(labels), width, seed=seed + 1) + 3, labels


def standardised(fitted: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (values - fitted.mean(axis=0)) / fitted.std(axis=0)


def ridge(penalty: float, count: int):
    return RidgeClassifier(alpha=penalty * count)


def logistic(penalty: float, count: int):
    return LogisticRegression(C=1 / (penalty * count), max_iter=2000)


def regression(penalty: float, count: int):
    return Ridge(alpha=penalty * count)


def protocol_by_hand(x: np.ndarray, labels: np.ndarray, make, score, seed: int = 0) -> tuple[float, float]:
    """The protocol of the docstring with scikit-learn's estimators: the test score and the penalty chosen."""
    train, validation, test = _split(np.zeros(len(x), dtype=int) if make is regression else labels, seed)

    def of(penalty: float, fitted: np.ndarray, held_out: np.ndarray) -> float:
        model = make(penalty, len(fitted)).fit(standardised(x[fitted], x[fitted]), labels[fitted])
        return score(labels[held_out], model.predict(standardised(x[fitted], x[held_out])))

    scores = [of(penalty, train, validation) for penalty in PENALTIES]
    best = [penalty for penalty, value in zip(PENALTIES, scores, strict=True) if value == max(scores)][-1]
    return of(best, np.concatenate([train, validation]), test), best


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.mean(labels == predicted))


class TestAgainstScikitLearn:
    @pytest.mark.parametrize("kind, make", [("ridge", ridge), ("logistic", logistic)], ids=["ridge", "logistic"])
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("width", [6, 200], ids=["n > d", "n < d"])
    def test_classes(self, kind, make, seed, width, lie):
        x, labels = blobs(width=width, apart=0.6 if width < 100 else 0.2)
        value, penalty = protocol_by_hand(x, labels, make, accuracy, seed)
        found = linear_probe(lie(x), labels, kind, seed)
        assert (found.value, found.penalty) == (value, penalty)
        assert 1 / 3 < value < 1

    def test_values(self, lie):
        x = normal(100, 8)
        targets = x @ normal(8, 3, seed=1) + normal(100, 3, seed=2) + 5

        def score(given, predicted):
            return r2_score(given, predicted, multioutput="variance_weighted")

        value, penalty = protocol_by_hand(x, targets, regression, score)
        found = linear_probe(lie(x), lie(targets), "regression")
        assert (found.value, found.penalty) == (pytest.approx(value, abs=1e-9), penalty)
        assert 0.2 < value < 0.9
        assert linear_probe(x, targets[:, 0], "regression").value == linear_probe(x, targets[:, :1], "regression").value

    def test_on_real_digits(self):
        x, labels = load_digits(return_X_y=True)  # three columns are constant
        found = linear_probe(x, labels)
        assert found.value > 0.9
        assert found.name == f"probe:ridge@{found.train}+{found.validation}+{found.test}/seed0"
        assert found.train + found.validation + found.test == 1797
        assert found.value == round(found.value * found.test) / found.test
        assert (found.width, found.classes, found.kind, found.seed) == (64, 10, "ridge", 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert linear_probe(x, labels, "logistic").value > 0.95


class TestSplit:
    def test_deals_each_class_60_20_20(self):
        groups = np.repeat([0, 1, 2], [50, 5, 10])
        train, validation, test = _split(groups, seed=3)
        assert sorted([*train, *validation, *test]) == list(range(65))
        assert [np.bincount(groups[part]).tolist() for part in (train, validation, test)] == [
            [30, 3, 6],
            [10, 1, 2],
            [10, 1, 2],
        ]

    def test_four_items_leave_one_for_each_part(self):
        assert [len(part) for part in _split(np.zeros(4, dtype=int), 0)] == [2, 1, 1]

    def test_is_the_seeds(self):
        groups = np.repeat([0, 1], 50)
        parts = [np.concatenate(_split(groups, seed)).tolist() for seed in (0, 0, 1)]
        assert parts[0] == parts[1] != parts[2]

    def test_does_not_see_the_features(self):
        """Arms that are compared share their items: only the value and the penalty may differ."""
        labels = blobs()[1]
        first, second = (linear_probe(normal(120, 6, seed=seed), labels) for seed in (0, 1))
        assert dataclasses.replace(first, value=0, penalty=0) == dataclasses.replace(second, value=0, penalty=0)


class TestLinearProbe:
    @pytest.mark.parametrize("kind", ["ridge", "logistic"])
    def test_reads_what_is_there_and_nothing_else(self, kind):
        x, labels = blobs(each=100, apart=10)
        assert linear_probe(x, labels, kind).value == 1
        values = [linear_probe(normal(300, 6, seed=seed), labels, kind, seed).value for seed in range(8)]
        assert abs(np.mean(values) - 1 / 3) < 4 * np.sqrt(2 / 9 / (8 * 60))

    @pytest.mark.parametrize("kind", ["ridge", "logistic", "regression"])
    def test_ignores_the_scale_and_place_of_every_column(self, kind):
        x, labels = blobs(apart=0.6)
        found = linear_probe(x * np.array([1e-3, 1, 10, 1e3, 5, 2]) - 7, labels, kind)
        assert found.value == pytest.approx(linear_probe(x, labels, kind).value, abs=1e-9)

    @pytest.mark.parametrize("kind", ["ridge", "logistic"])
    def test_a_constant_column_changes_nothing(self, kind):
        x, labels = blobs(apart=0.6)
        assert (
            linear_probe(np.column_stack([x, np.full(120, 0.1)]), labels, kind).value
            == linear_probe(x, labels, kind).value
        )

    def test_labels_may_be_words(self):
        x, labels = blobs(apart=0.6)
        words = np.array(["heron", "crane", "egret"])[labels]
        order = np.argsort(["heron", "crane", "egret"]).argsort()
        assert linear_probe(x, words) == linear_probe(x, order[labels])

    @pytest.mark.parametrize("kind", ["ridge", "logistic", "regression"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_takes_tensors_of_any_type(self, kind, dtype):
        x, labels = blobs(apart=0.6)
        tensor = torch.from_numpy(x).to(dtype)
        found = linear_probe(tensor.clone().requires_grad_(), torch.from_numpy(labels), kind)
        assert found == linear_probe(tensor.double().numpy(), labels, kind)

    def test_of_equal_penalties_the_largest(self):
        """Classes this far apart are told apart whatever the penalty."""
        assert linear_probe(*blobs(apart=100)).penalty == max(PENALTIES)

    def test_refuses_an_unknown_kind(self):
        with pytest.raises(ValueError, match="unknown kind of probe 'knn'; allowed: ridge, logistic, regression"):
            linear_probe(*blobs(), kind="knn")

    @pytest.mark.parametrize(
        "labels, why", [([0] * 8, "all are"), ([0] * 5 + [7] * 3, "7.* has 3"), (["a"] * 7 + ["b"], "'b'.* has 1")]
    )
    def test_refuses_classes_it_cannot_split(self, labels, why):
        with pytest.raises(ValueError, match=f"two classes and 4 items of each .*{why}"):
            linear_probe(normal(8, 2), labels)

    @pytest.mark.parametrize("kind", ["ridge", "logistic", "regression"])
    def test_refuses_labels_of_other_items(self, kind):
        with pytest.raises(ValueError, match="for each of 8 items"):
            linear_probe(normal(8, 2), np.arange(7) % 2, kind)

    def test_refuses_what_is_not_finite(self):
        x, labels = blobs()
        x[5, 0] = np.nan
        with pytest.raises(ValueError, match="x: features are not finite"):
            linear_probe(x, labels)
        targets = normal(120)
        targets[0] = np.inf
        with pytest.raises(ValueError, match="targets"):
            linear_probe(normal(120, 3), targets, "regression")

    def test_refuses_targets_that_do_not_vary(self):
        with pytest.raises(ValueError, match="needs targets that differ"):
            linear_probe(normal(20, 3), np.ones(20), "regression")
