"""The figures of an evaluation, against scikit-learn and against cases small enough to do by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from vitrail.errors import UserError
from vitrail.metrics import Evaluation, fit_temperature, wilson_interval

sk: Any = sklearn_metrics  # its stubs refuse arguments that it takes


def evaluation(logits: object, targets: object, labels: tuple[str, ...] | None = None) -> Evaluation:
    rows, truth = np.asarray(logits, np.float32), np.asarray(targets)
    labels = labels or tuple(f"class {i}" for i in range(rows.shape[1]))
    truth = truth.astype(np.float32 if truth.ndim == 2 else np.int64)
    return Evaluation(rows, truth, labels, [f"{i}.png" for i in range(len(rows))], [])


def random_single(n: int = 400, classes: int = 7, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    return evaluation(rng.normal(size=(n, classes)) * 2 + 2 * np.eye(classes)[targets], targets)


def random_multi(n: int = 300, classes: int = 6, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    targets = rng.random((n, classes)) < 0.3
    return evaluation(rng.normal(size=(n, classes)) + 2 * targets - 1, targets)


def test_single_label_metrics_agree_with_scikit_learn() -> None:
    e = random_single()
    got, predicted, p = e.metrics(), e.logits.argmax(1), e.probabilities()
    assert got["top1"] == sk.accuracy_score(e.targets, predicted)
    assert got["top5"] == sk.top_k_accuracy_score(e.targets, e.logits, k=5)
    assert got["macro_f1"] == pytest.approx(sk.f1_score(e.targets, predicted, average="macro"))
    assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(e.targets, predicted))
    assert got["nll"] == pytest.approx(sk.log_loss(e.targets, p))
    np.testing.assert_array_equal(e.confusion(), sk.confusion_matrix(e.targets, predicted))


def test_per_class_figures_agree_with_scikit_learn() -> None:
    e = random_single()
    precision, recall, f1, pictures = sk.precision_recall_fscore_support(e.targets, e.logits.argmax(1))
    rows: Any = e.per_class()
    for key, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("pictures", pictures)):
        np.testing.assert_allclose([row[key] for row in rows], expected)
    assert [row["name"] for row in rows] == list(e.labels)


def test_multi_label_metrics_agree_with_scikit_learn() -> None:
    e = random_multi()
    got, p = e.metrics(), e.probabilities()
    given_labels = p > 0.5
    assert got["mAP"] == pytest.approx(sk.average_precision_score(e.targets, p, average="macro"))
    assert got["micro_f1"] == pytest.approx(sk.f1_score(e.targets, given_labels, average="micro"))
    assert got["macro_f1"] == pytest.approx(sk.f1_score(e.targets, given_labels, average="macro"))
    assert got["nll"] == pytest.approx(np.mean([sk.log_loss(e.targets[:, c], p[:, c]) for c in range(6)]))
    assert {"top1", "ece", "temperature"}.isdisjoint(got)
    rows: Any = e.per_class()
    np.testing.assert_allclose([row["ap"] for row in rows], sk.average_precision_score(e.targets, p, average=None))


def test_calibration_error_of_a_case_done_by_hand() -> None:
    # Two classes, logits (0, z): confidence sigmoid(|z|). Four pictures at 0.9 (three right), two at 0.6 (one right).
    z9, z6 = math.log(9), math.log(1.5)
    e = evaluation([[0, z9]] * 4 + [[0, z6]] * 2, [1, 1, 1, 0, 1, 0])
    assert e.ece() == pytest.approx((4 * abs(0.75 - 0.9) + 2 * abs(0.5 - 0.6)) / 6, abs=1e-6)
    filled = [b for b in e.reliability() if b.count]
    assert [(b.count, round(b.accuracy or 0, 6)) for b in filled] == [(2, 0.5), (4, 0.75)]
    assert all(b.low < (b.confidence or 0) <= b.high for b in filled)
    assert all(b.confidence is None and b.accuracy is None for b in e.reliability() if not b.count)


def test_a_confidence_of_exactly_one_falls_in_the_last_bin() -> None:
    e = evaluation([[0.0, 800.0], [800.0, 0.0]], [1, 0])
    assert e.reliability()[-1].count == 2
    assert e.ece() == 0.0


def test_a_confidence_on_the_edge_of_two_bins_falls_in_the_lower_one() -> None:
    e = evaluation([[0.0, 0.0]], [0])  # confidence 0.5
    assert [b.count for b in e.reliability(bins=4)] == [0, 1, 0, 0]


def test_the_fitted_temperature_undoes_a_scaling_of_the_logits() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4000, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.array([rng.choice(5, p=row) for row in p])
    plain = fit_temperature(logits, targets)
    assert plain == pytest.approx(1.0, abs=0.1)
    assert fit_temperature(logits * 3, targets) == pytest.approx(3 * plain, rel=1e-3)
    overconfident = evaluation(logits * 3, targets)
    got = overconfident.metrics()
    assert got["ece"] > 0.2
    assert got["ece_calibrated"] < 0.05


def test_the_fitted_temperature_is_where_the_likelihood_is_best() -> None:
    e = random_single()
    best = fit_temperature(e.logits, e.targets)

    def loss(t: float) -> float:
        return sk.log_loss(e.targets, evaluation(e.logits / t, e.targets).probabilities())

    assert loss(best) < min(loss(best * 1.01), loss(best / 1.01))


def test_no_picture_is_scaled_by_a_temperature_it_helped_to_fit() -> None:
    e = random_single(n=101)
    order = np.argsort(e.targets, kind="stable")
    first, second = order[::2], order[1::2]
    calibrated = e.calibrated()
    for ours, others in ((first, second), (second, first)):
        expected = e.logits[ours] / fit_temperature(e.logits[others], e.targets[others])
        np.testing.assert_allclose(calibrated.logits[ours], expected, rtol=1e-5)
    np.testing.assert_array_equal(calibrated.logits.argmax(1), e.logits.argmax(1))


def test_a_class_without_pictures_is_none_in_the_table_and_in_no_mean() -> None:
    e = evaluation([[2, 0, 0], [0, 2, 0], [0, 0, 2], [0, 2, 0]], [0, 1, 1, 1])
    empty = e.per_class()[2]
    assert empty == {"name": "class 2", "pictures": 0, "precision": 0.0, "recall": None, "f1": None}
    got = e.metrics()
    assert got["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert got["macro_f1"] == pytest.approx((1 + 0.8) / 2)
    never = evaluation([[2, 0]] * 3, [0, 0, 1]).per_class()[1]
    assert never["precision"] is None
    assert never["recall"] == never["f1"] == 0.0


def test_multi_label_classes_without_pictures_are_left_out_of_the_mean() -> None:
    e = evaluation([[2, -1, -2], [-1, 2, -2]], [[1, 0, 0], [0, 1, 0]])
    assert e.per_class()[2]["ap"] is None
    assert e.metrics()["mAP"] == 1.0
    nothing = evaluation([[-1.0, -1.0]], [[0, 0]])
    assert set(nothing.metrics()) == {"nll"}


def test_equal_logits_rank_by_class_as_argmax_does() -> None:
    e = evaluation(np.zeros((6, 6)), [0, 1, 2, 3, 4, 5])
    got = e.metrics()
    assert got["top1"] == pytest.approx(1 / 6)
    assert got["top5"] == pytest.approx(5 / 6)


def test_top5_is_absent_with_five_classes_or_fewer() -> None:
    assert "top5" not in random_single(classes=5).metrics()
    assert "top5" in random_single(classes=6).metrics()


def test_worst_lists_the_most_confident_mistakes_first() -> None:
    e = evaluation([[5, 0], [0, 1], [0, 9], [3, 0]], [1, 0, 1, 1], ("cat", "dog"))
    worst = e.worst(2)
    assert [(a.index, a.truth, a.predicted) for a in worst] == [(0, "dog", "cat"), (3, "dog", "cat")]
    assert worst[0].confidence == pytest.approx(1 / (1 + math.exp(-5)))
    assert [a.index for a in e.worst(10)] == [0, 3, 1]


def test_worst_of_several_labels_lists_the_largest_loss_and_all_labels() -> None:
    e = evaluation([[4, 4, -4], [4, -1, -4], [4, -4, -4]], [[1, 0, 1], [1, 1, 0], [1, 0, 0]], ("a", "b", "c"))
    worst = e.worst(5)
    assert [(a.index, a.truth, a.predicted) for a in worst] == [(0, "a, c", "a, b"), (1, "a, b", "a")]
    none = evaluation([[-3.0, 1.0]], [[0, 0]], ("a", "b")).worst(1)[0]
    assert (none.truth, none.predicted) == ("(none)", "b")
    assert none.confidence == pytest.approx(1 / (1 + math.exp(-1)))


def test_right_ones_come_from_as_many_classes_as_can_be() -> None:
    e = evaluation(np.eye(4)[[0, 0, 0, 1, 2, 3]] * 3, [0, 0, 0, 1, 2, 0])
    assert [a.truth for a in e.right(3)] == ["class 0", "class 1", "class 2"]
    assert sorted(a.index for a in e.right(9)) == [0, 1, 2, 3, 4]
    spread = evaluation(np.eye(10), np.arange(10)).right(5)
    assert [a.index for a in spread] == [0, 2, 4, 6, 8]


def test_an_answer_names_the_place_of_its_picture_in_the_source() -> None:
    e = evaluation([[0, 1], [1, 0]], [0, 0])
    left_out = Evaluation(e.logits, e.targets, e.labels, ["b.png", "d.png"], [("a.png", "torn")], np.array([1, 3]))
    assert [(a.index, a.name) for a in left_out.worst(1)] == [(1, "b.png")]
    assert [(a.index, a.name) for a in left_out.right(1)] == [(3, "d.png")]


def test_figures_that_are_not_finite_are_refused_with_the_first_picture() -> None:
    with pytest.raises(UserError, match=r"NaN or infinity for 1 of 2 pictures, first for 1\.png"):
        evaluation([[0, 1], [np.nan, 0]], [0, 1])
    with pytest.raises(UserError, match="no picture"):
        evaluation(np.zeros((0, 2)), np.zeros(0))
    with pytest.raises(UserError, match="3 outputs, the data 2 classes"):
        evaluation(np.zeros((1, 3)), [0], ("a", "b"))


def test_figures_for_one_label_are_refused_with_several() -> None:
    for figure in (Evaluation.confusion, Evaluation.reliability, Evaluation.calibrated):
        with pytest.raises(UserError, match="one label"):
            figure(random_multi())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    classes=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 1.0, 1e3, 1e30]),
    multi=st.booleans(),
)
def test_every_figure_of_any_evaluation_is_finite_json(
    n: int, classes: int, seed: int, scale: float, multi: bool
) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.random((n, classes)) < 0.4 if multi else rng.integers(0, classes, n)
    e = evaluation(rng.normal(size=(n, classes)) * scale, targets)
    got = e.metrics()
    json.dumps([got, e.per_class()], allow_nan=False)
    assert all(0 <= value <= 1 for key, value in got.items() if key not in ("nll", "temperature"))
    assert all(0 <= answer.confidence <= 1 for answer in e.worst(3) + e.right(3))


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_newcombes_table(hits: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(hits / count, count) == pytest.approx((low, high), abs=5e-5)


def by_confidence(right: list[bool], confidence: list[float]) -> Evaluation:
    """Answers of two classes, each right or wrong with some confidence."""
    share = np.array(confidence)
    logits = np.stack([np.log(share), np.log1p(-share)], axis=1).astype(np.float32)
    return evaluation(logits, np.array([0 if each else 1 for each in right]))


def test_risk_and_coverage_by_hand() -> None:
    got = by_confidence([True, True, False, True, False], [0.99, 0.9, 0.8, 0.7, 0.6])
    curve = got.risk_coverage()
    assert [kept.coverage for kept in curve] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [kept.risk for kept in curve] == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5])
    assert got.aurc() == pytest.approx((0 + 0 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    most = got.threshold_for(0.75)
    assert most is not None
    assert (most.threshold, most.coverage, most.risk) == pytest.approx((0.7, 0.8, 0.25))
    assert got.threshold_for(0.6) == curve[-1]


def test_answers_of_equal_confidence_are_kept_together() -> None:
    got = by_confidence([True, False, True, False], [0.9, 0.9, 0.6, 0.6])
    assert [(kept.coverage, kept.risk) for kept in got.risk_coverage()] == [(0.5, 0.5), (1.0, 0.5)]
    assert got.aurc() == pytest.approx(0.5)
    assert got.threshold_for(0.9) is None


def test_the_area_lies_between_those_of_the_best_and_the_worst_order() -> None:
    rng = np.random.default_rng(0)
    right, confidence = rng.random(200) < 0.7, rng.uniform(0.51, 0.99, 200)
    some = by_confidence(right.tolist(), confidence.tolist()).aurc()
    best = by_confidence(sorted(right.tolist(), reverse=True), sorted(confidence.tolist(), reverse=True)).aurc()
    worst = by_confidence(sorted(right.tolist()), sorted(confidence.tolist(), reverse=True)).aurc()
    error = 1 - right.mean()
    assert best < some < worst
    assert best == pytest.approx(error + (1 - error) * np.log1p(-error), abs=0.01)


def test_no_curve_for_pictures_of_several_labels() -> None:
    several = Evaluation(np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32), ("a", "b"), ["1", "2"], [])
    with pytest.raises(UserError, match="risk-coverage"):
        several.aurc()
