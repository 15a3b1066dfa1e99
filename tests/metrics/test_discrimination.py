"""The figures of a study, against scikit-learn, statsmodels, scipy, published examples and brute force."""

import dataclasses
import math
import time
import warnings
from itertools import product

import numpy as np
import pytest
from scipy import optimize, special, stats
from sklearn import metrics as peers
from sklearn.calibration import calibration_curve as peer_calibration_curve

from ichprog import zoo
from ichprog.evaluation.predictions import TaskPredictions
from ichprog.metrics import bootstrap, discrimination

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import statsmodels.api as sm
    from statsmodels.stats.proportion import proportion_confint

TWO, THREE, _ = zoo.find(zoo.DEFAULT).tasks
PLAIN = dataclasses.replace(THREE, threshold=None)


def answered(truth, probabilities):
    truth, probabilities = np.array(truth, np.int64), np.array(probabilities, np.float64)
    if probabilities.ndim == 1:
        probabilities = np.stack([1 - probabilities, probabilities], axis=1)
    names = tuple(f"p{number}" for number in range(len(truth)))
    return TaskPredictions(names, np.zeros(len(truth), np.int64), truth, probabilities)


def of_two(n=150, seed=0, digits=None):
    """Answers that know something; with few digits there are many ties."""
    random = np.random.default_rng(seed)
    truth = random.integers(2, size=n)
    p = 1 / (1 + np.exp(-random.normal(1.2 * truth - 0.4, 1.3)))
    return answered(truth, p if digits is None else np.round(p, digits))


def of_three(n=150, seed=0):
    random = np.random.default_rng(seed)
    truth = random.integers(3, size=n)
    p = random.dirichlet(np.ones(3), n) + 0.5 * np.eye(3)[truth]
    return answered(truth, p / p.sum(axis=1, keepdims=True))


# ---- two labels ----


@pytest.mark.parametrize(("seed", "digits"), [(0, None), (1, 1), (2, 2), (3, 0)])
def test_two_labels_against_scikit_learn(seed, digits):
    answers = of_two(seed=seed, digits=digits)
    y, p = answers.truth, answers.probabilities[:, 1]
    thresholds = np.random.default_rng(seed).choice([0.3, 0.55, 0.7], len(y))
    found = discrimination.metrics(TWO, answers, thresholds)
    expected = {
        "auroc": peers.roc_auc_score(y, p),
        "auprc": peers.average_precision_score(y, p),
        "brier": peers.brier_score_loss(y, p),
        "log_loss": peers.log_loss(y, p),
    }
    for ending, called in (("", p > thresholds), ("_at_half", p > 0.5)):
        expected |= {
            "accuracy" + ending: peers.accuracy_score(y, called),
            "balanced_accuracy" + ending: peers.balanced_accuracy_score(y, called),
            "sensitivity" + ending: peers.recall_score(y, called),
            "specificity" + ending: peers.recall_score(1 - y, ~called),
            "ppv" + ending: peers.precision_score(y, called),
            "npv" + ending: peers.precision_score(1 - y, ~called),
            "f1" + ending: peers.f1_score(y, called),
        }
    calibration = {name: found.pop(name) for name in ("calibration_slope", "calibration_intercept")}
    assert found == pytest.approx(expected, rel=1e-12)
    x = discrimination.log_odds(p)
    with np.errstate(over="ignore"):
        fit = sm.GLM(y, sm.add_constant(x), family=sm.families.Binomial()).fit()
    large = optimize.brentq(lambda a: special.expit(x + a).sum() - y.sum(), -40, 40, xtol=1e-12)
    assert calibration["calibration_slope"] == pytest.approx(fit.params[1], abs=1e-6)
    assert calibration["calibration_intercept"] == pytest.approx(large, abs=1e-8)


def test_the_task_s_own_threshold_is_taken_where_none_is_given():
    answers = of_two()
    strict = dataclasses.replace(TWO, threshold=0.8)
    assert discrimination.metrics(strict, answers) == discrimination.metrics(TWO, answers, 0.8)
    assert discrimination.metrics(strict, answers)["accuracy"] != discrimination.metrics(TWO, answers)["accuracy"]


@pytest.mark.parametrize("truth", [[], [0], [1, 1], [0, 0, 0]])
def test_one_outcome_leaves_undefined_what_needs_two(truth):
    answers = answered(truth, np.linspace(0.2, 0.9, len(truth)))
    found = discrimination.metrics(TWO, answers)
    for name in ("auroc", "auprc", "balanced_accuracy", "calibration_slope", "calibration_intercept"):
        assert math.isnan(found[name])
    assert math.isnan(found["brier"]) == (not truth)
    both = discrimination.metrics_with_intervals(TWO, answers, draws=20)
    assert both["auroc"] == {"value": None, "low": None, "high": None}


def test_probabilities_that_part_the_outcomes_or_say_nothing_have_no_slope():
    parted = discrimination.metrics(TWO, answered([0, 0, 1, 1], [0.0, 0.2, 0.2, 1.0]))
    alike = discrimination.metrics(TWO, answered([0, 1, 1, 0], [0.3] * 4))
    assert math.isnan(parted["calibration_slope"])
    assert math.isnan(alike["calibration_slope"])
    assert alike["auroc"] == 0.5
    assert alike["calibration_intercept"] == pytest.approx(-math.log(0.3 / 0.7))
    assert np.isfinite(parted["log_loss"])


# ---- more labels ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_in_order_against_scikit_learn(seed):
    answers = of_three(seed=seed)
    y, p = answers.truth, answers.probabilities
    decided = [THREE.labels.index(THREE.decide(dict(zip(THREE.labels, row, strict=True)))) for row in p]
    cuts = [peers.roc_auc_score(y >= 1, p[:, 1] + p[:, 2]), peers.roc_auc_score(y >= 2, p[:, 2])]
    tails = np.stack([p[:, 1] + p[:, 2], p[:, 2]], axis=1)
    expected = {
        "accuracy": peers.accuracy_score(y, decided),
        "balanced_accuracy": peers.balanced_accuracy_score(y, decided),
        "mae": peers.mean_absolute_error(y, decided),
        "rmse": peers.mean_squared_error(y, decided) ** 0.5,
        "quadratic_kappa": peers.cohen_kappa_score(y, decided, weights="quadratic"),
        "auroc_1": cuts[0],
        "auroc_2": cuts[1],
        "auroc": sum(cuts) / 2,
        "rps": np.mean([peers.brier_score_loss(y >= k, tails[:, k - 1]) for k in (1, 2)]),
    }
    found = discrimination.metrics(THREE, answers)
    assert found.pop("uoc") == pytest.approx(brute_uoc(peers.confusion_matrix(y, decided)), abs=2e-5)
    assert found == pytest.approx(expected, rel=1e-9)


def test_labels_without_order_against_scikit_learn():
    answers = of_three()
    y, p = answers.truth, answers.probabilities
    assert discrimination.metrics(PLAIN, answers) == pytest.approx(
        {
            "accuracy": peers.accuracy_score(y, p.argmax(axis=1)),
            "balanced_accuracy": peers.balanced_accuracy_score(y, p.argmax(axis=1)),
            "auroc": peers.roc_auc_score(y, p, multi_class="ovr"),
            "log_loss": peers.log_loss(y, p),
        }
    )


@pytest.mark.parametrize("task", [THREE, PLAIN], ids=["in order", "without order"])
@pytest.mark.parametrize("truth", [[], [2], [1, 1, 1]])
def test_one_label_leaves_undefined_what_needs_more(task, truth):
    found = discrimination.metrics(task, answered(truth, np.full((len(truth), 3), 1 / 3)))
    assert math.isnan(found["auroc"])
    assert math.isnan(found["balanced_accuracy"])
    assert math.isnan(found["accuracy"]) == (not truth)


@pytest.mark.parametrize("task", [TWO, THREE, PLAIN], ids=["two", "in order", "without order"])
def test_an_answer_that_is_nan_leaves_every_figure_undefined(task):
    answers = of_two(30) if task is TWO else of_three(30)
    answers.probabilities[7] = np.nan
    assert all(math.isnan(value) for value in discrimination.metrics(task, answers).values())
    assert all(row["low"] is None for row in discrimination.metrics_with_intervals(task, answers, draws=5).values())


def brute_uoc(table):
    """Every path, one at a time, and the mean over beta by quadrature."""
    table = np.array(table, float)
    last, present = len(table) - 1, (table.sum(axis=1) > 0).sum()
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    far = abs(np.subtract.outer(np.arange(len(table)), np.arange(len(table))))
    spread = (shares * far).sum()

    def paths(row, column):
        if row == column == last:
            yield [(row, column)]
        for down, on in ((1, 0), (0, 1), (1, 1)):
            if row + down <= last and column + on <= last:
                for rest in paths(row + down, column + on):
                    yield [(row, column), *rest]

    lines = []
    for path in paths(0, 0):
        earned = sum(shares[cell] for cell in path) / (present + spread)
        lines.append((1 - earned, sum(shares[cell] * far[cell] for cell in path) / present))
    lines = np.array(lines)
    beta = np.linspace(0, 1, 20001)
    return np.trapezoid((lines[:, :1] + lines[:, 1:] * beta).min(axis=0), beta)


@pytest.mark.parametrize(
    ("table", "published"),
    [
        ([[4, 0, 0, 0], [0, 5, 0, 0], [0, 0, 6, 0], [0, 0, 0, 1]], 0.0),
        ([[0, 4, 0, 0], [0, 0, 6, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.56),
        ([[0, 0, 4, 0], [0, 0, 6, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.65),
        ([[0, 4, 0, 0], [6, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.61),
        ([[0, 4, 0, 0], [6, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 3]], 0.74),
        ([[0, 40, 0, 0], [6, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.61),
    ],
    ids="ABCDEF",
)
def test_the_ordinal_index_gives_the_published_examples(table, published):
    """Table 1 of Silva, Pinto, Cardoso, IJCNN 2018: the index averaged over beta, printed with two digits."""
    found = discrimination.uoc(np.array([table], float))[0]
    assert found == pytest.approx(published, abs=0.0061)
    assert found == pytest.approx(brute_uoc(table), abs=2e-5)


# ---- chance ----


@pytest.mark.parametrize("task", [TWO, THREE, PLAIN], ids=["two", "in order", "without order"])
def test_a_patient_who_counts_k_times_is_k_patients(task):
    """All the draws at once give what each drawn sample gives alone, ties included."""
    answers = of_two(60, digits=1) if task is TWO else of_three(60)
    weights = bootstrap.resamples(60, draws=25, seed=4)
    together = discrimination.weighted_metrics(task, answers, 0.4, weights)
    for number, row in enumerate(weights):
        alone = discrimination.metrics(task, answers.only(np.repeat(np.arange(60), row.astype(int))), 0.4)
        assert {name: values[number] for name, values in together.items()} == pytest.approx(alone, nan_ok=True)


def test_samples_keep_the_true_size_and_their_strata():
    groups = np.array([0] * 10 + [1] * 30)
    free, held = (bootstrap.resamples(40, draws=200, seed=1, strata=strata) for strata in (None, groups))
    assert (free.sum(axis=1) == 40).all()
    assert (held[:, :10].sum(axis=1) == 10).all()
    assert len(set(free[:, :10].sum(axis=1))) > 5
    np.testing.assert_array_equal(free, bootstrap.resamples(40, draws=200, seed=1))
    assert (free != bootstrap.resamples(40, draws=200, seed=2)).any()
    counted = bootstrap.bootstrap(lambda places: np.bincount(places, minlength=40), 40, draws=200, seed=1)
    np.testing.assert_array_equal(counted, free)
    assert bootstrap.bootstrap(np.mean, 40, draws=7).shape == (7,)


def test_intervals_against_scipy():
    data = np.random.default_rng(0).exponential(size=40)
    draws = bootstrap.bootstrap(lambda places: data[places].mean(), 40, draws=999)
    left_out = np.array([np.delete(data, place).mean() for place in range(40)])
    found = {
        "percentile": bootstrap.interval(draws, coverage=0.9),
        "BCa": bootstrap.bca(draws, data.mean(), left_out, coverage=0.9),
    }
    for method, ends in found.items():
        seed = stats.bootstrap((data,), np.mean, n_resamples=50, rng=np.random.default_rng(0))
        seed.bootstrap_distribution = draws
        peer = stats.bootstrap(
            (data,), np.mean, n_resamples=0, bootstrap_result=seed, method=method, confidence_level=0.9
        ).confidence_interval
        assert ends == pytest.approx(tuple(peer), rel=1e-9)
    assert found["BCa"][0] > found["percentile"][0]  # of a skewed sample


def test_intervals_of_undefined_draws():
    draws = np.array([np.nan, 1.0, 2.0, 3.0])
    assert bootstrap.interval(draws, coverage=0.5) == (1.5, 2.5)
    assert np.isnan(bootstrap.interval(np.array([np.nan]))).all()
    assert np.isnan(bootstrap.bca(np.array([np.nan]), 0.5, np.array([0.4]))).all()
    assert bootstrap.bca(np.array([1.0, 1.0]), 1.0, np.array([1.0, 1.0])) == (1, 1)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_metrics_come_with_intervals(method):
    answers = of_two()
    found = discrimination.metrics_with_intervals(TWO, answers, 0.4, draws=300, seed=3, method=method)
    assert {name: row["value"] for name, row in found.items()} == pytest.approx(
        discrimination.metrics(TWO, answers, 0.4)
    )
    for row in found.values():
        assert row["low"] < row["value"] < row["high"]
    y, p = answers.truth, answers.probabilities[:, 1]
    area = found["auroc"]
    width = (
        2
        * 1.96
        * np.std([peers.roc_auc_score(y[s], p[s]) for s in np.random.default_rng(0).integers(150, size=(300, 150))])
    )
    assert area["high"] - area["low"] == pytest.approx(width, rel=0.2)
    assert found == discrimination.metrics_with_intervals(TWO, answers, 0.4, draws=300, seed=3, method=method)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match='"percentile" and "bca" are allowed'):
        discrimination.metrics_with_intervals(TWO, of_two(10), draws=5, method="normal")


def test_a_thousand_draws_take_moments():
    start = time.perf_counter()
    discrimination.metrics_with_intervals(TWO, of_two(400), method="bca")
    discrimination.metrics_with_intervals(THREE, of_three(400))
    assert time.perf_counter() - start < 10


def test_percentile_intervals_cover_as_they_say():
    """Of the accuracy of 60 patients, whose truth is 0.8."""
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        right = random.random(60) < 0.8
        answers = answered(np.where(right, 1, 0), np.full(60, 0.9))
        row = discrimination.metrics_with_intervals(TWO, answers, draws=200, seed=seed)["accuracy"]
        hits += row["low"] <= 0.8 <= row["high"]
    assert 0.89 <= hits / 200 <= 0.98


def test_wilson_against_statsmodels():
    k, n = np.array([0, 1, 5, 17, 20]), np.array([20, 3, 10, 20, 20])
    found = bootstrap.wilson(k, n, coverage=0.9)
    np.testing.assert_allclose(found, proportion_confint(k, n, alpha=0.1, method="wilson"), atol=1e-12)
    assert np.isnan(bootstrap.wilson(0, 0)).all()


# ---- what is chosen on validation parts ----


@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_is_the_best_there_is(seed):
    answers = of_two(31, seed=seed, digits=1 + seed % 2)
    y, p = answers.truth, answers.probabilities[:, 1]
    chosen = discrimination.choose_threshold(y, p)
    every = [peers.balanced_accuracy_score(y, p > cut) for cut in [-1, *np.unique(p)]]
    assert peers.balanced_accuracy_score(y, p > chosen) == pytest.approx(max(every))


def test_thresholds_of_hard_cases():
    assert discrimination.choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)
    # 0.2 | 0.8 and the mirror are as good as each other: the nearer to 0.5 is taken
    assert discrimination.choose_threshold([0, 1, 0, 1], [0.1, 0.3, 0.45, 0.65]) == pytest.approx(0.55)
    for truth, p in [([], []), ([1, 1], [0.2, 0.8]), ([0, 1], [0.7, 0.7]), ([1, 0], [0.1, 0.9])]:
        assert discrimination.choose_threshold(truth, p) == 0.5
    low, high = 0.3, np.nextafter(0.3, 1)
    assert (np.array([low, high]) > discrimination.choose_threshold([0, 1], [low, high])).tolist() == [False, True]


def test_recalibration_of_many_patients_is_logistic_regression():
    random = np.random.default_rng(0)
    x = random.normal(0, 1.5, 20000)
    truth = random.random(20000) < 1 / (1 + np.exp(-(0.6 * x - 0.8)))
    p = 1 / (1 + np.exp(-x))
    slope, intercept = discrimination.recalibration(truth, p)
    fit = sm.GLM(truth, sm.add_constant(x), family=sm.families.Binomial()).fit().params
    assert (intercept, slope) == pytest.approx(tuple(fit), abs=2e-3)
    again = discrimination.metrics(TWO, answered(truth, discrimination.recalibrate(p, slope, intercept)))
    assert again["calibration_slope"] == pytest.approx(1, abs=5e-3)
    assert again["calibration_intercept"] == pytest.approx(0, abs=5e-3)


@pytest.mark.parametrize(
    ("truth", "p"),
    [([0, 1, 1, 0, 1], [0.2, 0.9, 0.4, 0.5, 0.7]), ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]), ([1, 1, 1], [0.0, 0.5, 1.0])],
)
def test_recalibration_of_few_patients_is_the_best_by_likelihood_and_prior(truth, p):
    x, y = discrimination.log_odds(p), np.array(truth)

    def loss(at):
        q = 1 / (1 + np.exp(-(math.exp(at[0]) * x + at[1])))
        likelihood = stats.bernoulli.logpmf(y, np.clip(q, 1e-300, 1 - 1e-16)).sum()
        return -likelihood - stats.norm(0, 1).logpdf(at[0]) - stats.norm(0, 2).logpdf(at[1])

    best = optimize.minimize(loss, [0.1, 0.1], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    assert discrimination.recalibration(truth, p) == pytest.approx((math.exp(best[0]), best[1]), abs=1e-4)


def test_recalibration_without_patients_changes_nothing_and_keeps_ranks_always():
    assert discrimination.recalibration([], []) == (1, 0)
    p = np.array([0.01, 0.3, 0.31, 0.99])
    np.testing.assert_allclose(discrimination.recalibrate(p, 1, 0), p)
    slope, intercept = discrimination.recalibration([1, 1, 0, 0], p)  # the wrong way round
    assert slope > 0
    assert (np.diff(discrimination.recalibrate(p, slope, intercept)) > 0).all()


def test_conformal_sets_by_hand():
    validation = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    truth = [0, 1, 1, 1]  # 1 - p of the true label: 0.1, 0.3, 0.6, 0.2
    asked = np.array([[0.75, 0.25], [0.5, 0.5], [0.71, 0.29], [0.39, 0.61]])
    # k = ceil(5 * 0.6) = 3: the limit is 0.3, so that labels of 0.7 and more are in
    np.testing.assert_array_equal(
        discrimination.conformal_sets(truth, validation, asked, coverage=0.6), [[1, 0], [0, 0], [1, 0], [0, 0]]
    )
    assert discrimination.conformal_sets(truth, validation, asked, coverage=0.9).all()
    assert discrimination.conformal_sets([], np.empty((0, 2)), asked).all()


def test_conformal_sets_cover_as_they_promise():
    reached = []
    for seed in range(60):
        old, new = of_three(99, seed=2 * seed), of_three(400, seed=2 * seed + 1)
        sets = discrimination.conformal_sets(old.truth, old.probabilities, new.probabilities, coverage=0.8)
        figures = discrimination.conformal_figures(sets, new.truth)
        assert figures["size"] == sets.sum() / 400
        reached.append(figures["coverage"])
    assert np.mean(reached) == pytest.approx(0.8, abs=0.02)
    assert np.isnan(discrimination.conformal_figures(np.empty((0, 3), bool), [])["coverage"])
    by_hand = discrimination.conformal_figures(np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool), [0, 1, 0, 0])
    assert by_hand == {"coverage": 0.5, "size": 1.0, "one": 0.5, "none": 0.25}


# ---- curves and groups ----


@pytest.mark.parametrize("quantile", [True, False])
@pytest.mark.parametrize("digits", [None, 1])
def test_the_calibration_curve_against_scikit_learn(quantile, digits):
    answers = of_two(digits=digits)
    y, p = answers.truth, answers.probabilities[:, 1]
    found = discrimination.calibration_curve(y, p, bins=7, quantile=quantile)
    observed, predicted = peer_calibration_curve(y, p, n_bins=7, strategy="quantile" if quantile else "uniform")
    np.testing.assert_allclose(found["observed"], observed)
    np.testing.assert_allclose(found["predicted"], predicted)
    assert found["count"].sum() == len(y)
    low, high = proportion_confint(np.rint(found["observed"] * found["count"]), found["count"], method="wilson")
    np.testing.assert_allclose([found["low"], found["high"]], [low, high])


def test_the_calibration_curve_of_hard_cases():
    alike = discrimination.calibration_curve([0, 1, 1], [0.4] * 3)
    assert (alike["predicted"].tolist(), alike["count"].tolist()) == ([pytest.approx(0.4)], [3])
    assert all(len(column) == 0 for column in discrimination.calibration_curve([], []).values())


def test_net_benefit_by_hand():
    """Ten patients, three of whom do badly: at a threshold of 0.2 a false alarm costs a quarter of a find."""
    truth = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    p = [0.9, 0.6, 0.1, 0.7, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
    found = discrimination.net_benefit(truth, p, [0.2, 0.5])
    assert found["model"] == pytest.approx([2 / 10 - 2 / 10 * 0.25, 2 / 10 - 1 / 10])
    assert found["all"] == pytest.approx([0.3 - 0.7 * 0.25, 0.3 - 0.7])
    assert found["none"].tolist() == [0, 0]
    np.testing.assert_allclose(discrimination.net_benefit(truth, p, [0.0])["model"], 0.3)
    assert np.isnan(discrimination.net_benefit([], [], [0.5])["all"]).all()


def test_histograms_count_every_patient_by_outcome():
    found = discrimination.histogram([0, 0, 1, 1, 1], [0.0, 0.49, 0.5, 1.0, 0.96], bins=4)
    assert found["edges"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found["counts"].tolist() == [[1, 1, 0, 0], [0, 0, 1, 2]]


def test_subgroups_of_text_and_numbers():
    groups = discrimination.subgroups(["F", "M", "", "F", None])
    assert {name: chosen.tolist() for name, chosen in groups.items()} == {
        "F": [True, False, False, True, False],
        "M": [False, True, False, False, False],
    }
    few = discrimination.subgroups(["10", "9", "", "9"])
    assert {name: chosen.sum() for name, chosen in few.items()} == {"9": 2, "10": 1}
    assert list(few) == ["9", "10"]
    years = [str(year) for year in range(41, 71)]
    many = discrimination.subgroups([*years, "", "nan"])
    assert list(many) == ["<= 50.67", "50.67 to 60.33", "> 60.33"]
    assert [chosen.sum() for chosen in many.values()] == [10, 10, 10]
    assert not np.stack(list(many.values()))[:, 30:].any()
    assert discrimination.subgroups(["", None]) == {}
    skewed = discrimination.subgroups(np.array([0.0] * 40 + list(range(1, 8))))
    assert np.stack(list(skewed.values())).sum(axis=0).tolist() == [1] * 47


def test_every_way_to_order_few_answers():
    """All ways in which four patients can be ranked, ties included, against the definition of the area."""
    for p in product([0.2, 0.5, 0.8], repeat=4):
        wins = [(a > b) + (a == b) / 2 for a in p[:2] for b in p[2:]]
        assert discrimination.metrics(TWO, answered([1, 1, 0, 0], p))["auroc"] == pytest.approx(np.mean(wins))
