"""Targets of every kind: scales there and back, losses that forget what is not known, and scores."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from dmi_hpc.config import TrainConfig
from dmi_hpc.errors import DataError
from dmi_hpc.losses import row_losses
from dmi_hpc.scores import Scorer, Scorers, score
from dmi_hpc.targets import TargetScale, TargetScales, scale_of

RNG = np.random.default_rng(5)
CLASS = TargetScale(transform="logit", mean=0.0, std=1.0)
CLASSES = TargetScale(transform="category", mean=0.0, std=1.0)


def two_heads():
    return TargetScales(
        heads=(
            TargetScale(transform="identity", mean=1.0, std=2.0),
            TargetScale(transform="log", mean=0.5, std=0.25),
        )
    )


def test_several_targets_go_there_and_back_each_on_its_scale():
    values = np.stack([RNG.normal(size=9), RNG.uniform(1, 3, 9)], axis=1)
    outputs = two_heads().scale(values)
    np.testing.assert_allclose(outputs[:, 1], (np.log(values[:, 1]) - 0.5) / 0.25, rtol=1e-5)
    np.testing.assert_allclose(two_heads().unscale(outputs), values, rtol=1e-5)


def test_scales_are_found_from_what_is_known():
    known, missing = np.array([1.0, 3.0, 5.0]), np.array([2.0, np.nan, 4.0])
    found = scale_of([known, missing], ["identity", "identity"], ["a", "b"])
    assert [(head.mean, head.std) for head in found.heads] == [
        (3.0, pytest.approx(np.std(known))),
        (3.0, 1.0),
    ]
    with pytest.raises(DataError, match="field b: the target is known of no training row"):
        scale_of([known, np.full(3, np.nan)], ["identity", "identity"], ["a", "b"])


@pytest.mark.parametrize(
    ("transform", "target", "said"),
    [
        ("logit", [0, 1, 2], "found 2, expected 0 and 1"),
        ("logit", [1, 1, 1], "all training rows are of class 1"),
        ("category", [0, 1.5], r"found 1\.5, expected whole numbers"),
        ("category", [-1, 2], "found -1, expected whole numbers"),
    ],
)
def test_targets_that_are_no_classes_are_refused(transform, target, said):
    with pytest.raises(DataError, match=said):
        TargetScale.of(np.array(target, dtype=float), transform)


@pytest.mark.parametrize("transform", ["identity", "log", "logit"])
def test_the_mean_of_members_is_that_of_their_outputs(transform):
    scale = TargetScale(transform=transform, mean=0.0, std=1.0)
    outputs = RNG.normal(size=(3, 5))
    found = scale.centre(scale.unscale(outputs))
    np.testing.assert_allclose(found, scale.unscale(outputs.mean(0)))


def test_the_mean_of_members_of_many_classes_is_that_of_their_logits():
    outputs = RNG.normal(size=(3, 5, 4))
    found = CLASSES.centre(CLASSES.unscale(outputs))
    np.testing.assert_allclose(found, CLASSES.unscale(outputs.mean(0)))


def test_a_target_that_is_not_known_has_no_gradient():
    output = torch.zeros(3, 2, requires_grad=True)
    targets = torch.tensor([[1.0, 2.0], [torch.nan, 3.0], [torch.nan, torch.nan]])
    losses = row_losses(TrainConfig(loss="mse"), two_heads(), output, targets, output)
    assert losses.tolist() == [2.5, 9.0, 0.0]
    losses.sum().backward()
    assert output.grad.tolist() == [[-1.0, -2.0], [0.0, -6.0], [0.0, 0.0]]


def test_classes_have_their_cross_entropy_whatever_the_loss_of_numbers():
    logits, truth = torch.tensor([[0.3], [-2.0]]), torch.tensor([1.0, 0.0])
    found = row_losses(TrainConfig(loss="mae"), CLASS, logits, truth, logits)
    chance = torch.sigmoid(logits[:, 0])
    expected = -torch.log(torch.where(truth > 0, chance, 1 - chance))
    torch.testing.assert_close(found, expected)
    many = torch.from_numpy(RNG.normal(size=(4, 3))).float()
    truth = torch.tensor([2.0, 0.0, 1.0, 1.0])
    found = row_losses(TrainConfig(), CLASSES, many, truth, many)
    expected = -torch.log_softmax(many, 1)[torch.arange(4), truth.long()]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rounded", [False, True])
def test_auc_is_sklearn_s_and_adds_up_over_ranks(rounded):
    """rounded: many equal predictions."""
    truth = (RNG.random(500) < 0.1).astype(float)
    odds = RNG.normal(size=500) + 2 * truth
    predicted = 1 / (1 + np.exp(-(odds.round() if rounded else odds)))
    expected = roc_auc_score(truth, predicted)
    whole = score(predicted, truth, CLASS)
    assert whole.auc == pytest.approx(expected, abs=1e-4)
    assert whole.error == 1 - whole.auc
    shares = []
    for part in (slice(0, 200), slice(200, 500), slice(0, 0)):
        scorer = Scorer(CLASS)
        scorer.update(predicted[part], truth[part])
        scorer.scores(lambda sums: shares.append(sums) or sums + 1.0)
    total = Scorer(CLASS).scores(lambda sums: torch.stack(shares).sum(0))
    assert total.auc == pytest.approx(whole.auc, rel=1e-12)


def test_rows_of_one_class_have_no_auc_but_an_error():
    found = score(np.array([0.2, 0.4]), np.zeros(2), CLASS)
    assert found.auc is None
    assert found.error == found.mae == pytest.approx(0.3)


def test_a_probability_that_is_no_number_is_an_error_that_is_none():
    assert np.isnan(score(np.array([np.nan, 0.4, 0.2]), np.array([0, 1.0, 0]), CLASS).error)


def test_accuracy_of_many_classes_is_sklearn_s():
    probabilities = CLASSES.unscale(RNG.normal(size=(60, 5)))
    truth = RNG.integers(5, size=60).astype(float)
    found = score(probabilities, truth, CLASSES)
    assert found.accuracy == pytest.approx(accuracy_score(truth, probabilities.argmax(1)))
    assert found.error == 1 - found.accuracy


def test_the_error_of_several_targets_is_in_their_deviations():
    scorers = Scorers(two_heads())
    truth = np.stack([np.array([1.0, 2.0, np.nan]), np.array([2.0, np.nan, np.nan])], axis=1)
    predicted = np.stack([np.array([2.0, 4.0, 9.0]), np.array([2.5, 9.0, 9.0])], axis=1)
    scorers.update(predicted, truth)
    first, second = scorers.each()
    assert (first.mae, second.mae) == (1.5, 0.5)
    units = [head.unit for head in two_heads().heads]
    assert units[0] == 2.0
    expected = (1.5 / units[0] + 0.5 / units[1]) / 2
    assert scorers.scores().error == pytest.approx(expected)


def test_errors_of_forces_are_counted_beside_the_energy():
    scorers = Scorers(TargetScale(transform="identity", mean=0, std=1), forces=True)
    scorers.update(np.array([1.0, 2.0]), np.array([1.5, 2.0]), np.full((5, 3), 0.2))
    found = scorers.scores()
    assert (found.mae, found.force_mae, found.force_rmse) == pytest.approx((0.25, 0.2, 0.2))
    assert found.error == pytest.approx(0.45)
