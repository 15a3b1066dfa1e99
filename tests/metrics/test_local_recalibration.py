"""Local recalibration never uses the patient it is applied to, and its learning curve finds when it helps."""

import numpy as np
import pytest
from scipy.stats import bernoulli

from ichprog.metrics.calibration import fit_recalibration, fit_recalibrations, log_odds, recalibrate
from ichprog.metrics.local_recalibration import cross_fitted, learning_curve, patients_needed
from ichprog.metrics.operating_points import stratified_parts


def predictions(n, *, shift=0.0, stretch=1.0, seed=0):
    """Return truth and probabilities whose log-odds are `stretch` times the true ones plus `shift`."""
    random = np.random.default_rng(seed)
    true_log_odds = random.normal(0, 1.2, n)
    truth = random.random(n) < 1 / (1 + np.exp(-true_log_odds))
    return truth.astype(int), 1 / (1 + np.exp(-(stretch * true_log_odds + shift)))


@pytest.mark.parametrize("method", ["intercept", "intercept_and_slope"])
def test_no_patient_is_recalibrated_by_a_fit_to_itself(method):
    truth, p = predictions(40, shift=1.0)
    found = cross_fitted(truth, p, method, folds=4, seed=1)
    part = stratified_parts(truth, 4, seed=1)
    for k in range(4):
        rest = part != k
        slope, intercept = fit_recalibration(truth[rest], p[rest], intercept_only=method == "intercept")
        np.testing.assert_allclose(found[~rest], recalibrate(p[~rest], slope, intercept))
        assert (slope == 1) == (method == "intercept")
    changed = truth.copy()
    patient = np.flatnonzero(part == 2)[0]
    twin = np.flatnonzero((part == 2) & (truth != truth[patient]))[0]
    changed[[patient, twin]] = changed[[twin, patient]]  # the parts stay the same
    assert stratified_parts(truth, 1) is None
    fits = [fit_recalibration(labels[part != 2], p[part != 2]) for labels in (truth, changed)]
    assert fits[0] == fits[1]


def test_the_intercept_alone_solves_the_likelihood_with_its_prior():
    truth, p = predictions(30, shift=-1.0)
    slope, intercept = fit_recalibration(truth, p, intercept_only=True)
    grid = np.linspace(-3, 3, 60001)
    q = 1 / (1 + np.exp(-(log_odds(p)[:, None] + grid)))
    posterior = bernoulli.logpmf(truth[:, None], q).sum(axis=0) - grid**2 / 8
    assert slope == 1
    assert intercept == pytest.approx(grid[posterior.argmax()], abs=2e-4)


@pytest.mark.parametrize("intercept_only", [False, True])
def test_many_fits_at_once_equal_single_fits(intercept_only):
    truth, p = predictions(60, stretch=2.5)
    groups = np.random.default_rng(1).integers(60, size=(6, 12))
    slopes, intercepts = fit_recalibrations(truth[groups], p[groups], intercept_only=intercept_only)
    for group, slope, intercept in zip(groups, slopes, intercepts, strict=True):
        single = fit_recalibration(truth[group], p[group], intercept_only=intercept_only)
        assert (slope, intercept) == pytest.approx(single, abs=1e-4)
    extreme = fit_recalibrations([[1, 1, 1], [0, 0, 1]], [[0.0, 0.5, 1.0], [0.1, 0.2, 0.9]])
    assert np.isfinite(extreme).all()


def test_a_shifted_model_needs_few_patients_and_a_calibrated_one_has_no_number():
    truth, p = predictions(400, shift=1.5)
    curve = learning_curve(truth, p, "intercept", n_draws=40)
    assert [row["patients"] for row in curve] == [20, 30, 50, 75, 100, 150, 200]
    needed = patients_needed(curve)
    assert needed is not None
    assert needed <= 50
    after = [row for row in curve if row["patients"] >= needed]
    assert all(row["share_improved"] >= 0.9 and row["gain"] > 0 for row in after)
    truth, p = predictions(400, seed=2)
    assert patients_needed(learning_curve(truth, p, "intercept_and_slope", n_draws=40)) is None
    assert learning_curve(truth[:39], p[:39], "intercept") == []


def test_a_learning_curve_is_tested_on_the_other_patients():
    """One draw of one size, computed again by hand."""
    truth, p = predictions(40, shift=1.0, seed=4)
    (row,) = learning_curve(truth, p, "intercept_and_slope", n_draws=1, seed=3)
    order = np.random.default_rng(3).permutation(40)
    few, others = order[:20], order[20:]
    after = recalibrate(p[others], *fit_recalibration(truth[few], p[few]))
    losses = [-bernoulli.logpmf(truth[others], q).mean() for q in (p[others], after)]
    assert row["gain"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert row["share_improved"] == float(losses[1] < losses[0])


def test_the_number_needed_holds_for_every_larger_size():
    curve = [{"patients": n, "share_improved": share} for n, share in [(20, 0.95), (30, 0.8), (50, 0.9), (75, 1.0)]]
    assert patients_needed(curve) == 50
    assert patients_needed([*curve, {"patients": 100, "share_improved": 0.5}]) is None
    assert patients_needed([]) is None
