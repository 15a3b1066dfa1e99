"""The built-in heads fulfil their contract, and the two likelihood models agree with SciPy."""

import dataclasses
import inspect
import itertools
import json

import mpmath
import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import optimize, special, stats
from torch import nn

import ichprog
from ichprog import InvalidValueError, SpecError, export, heads, networks, registry, testing, zoo
from ichprog.hub import WeightFile
from ichprog.runtime import build_runtimes, resolve_runtime
from ichprog.spec import PluginRef, Target, Task
from ichprog.train import PRESETS, TrainOptions, train

from support.cohorts import plain_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

RISING = {2: [80.0], 3: [60.0, 80.0], 7: [40.0, 50.0, 60.0, 65.0, 75.0, 90.0]}
RANKIN, YEARS = tuple("0123456"), ("<50", "50-59", "60-69", "70-79", ">=80")


def names(number):
    return [str(label) for label in range(number)]


def options(name, number):
    return {"edges": RISING[number]} if name == "interval_regression" else {}


@pytest.mark.parametrize("number", [2, 3, 7])
@pytest.mark.parametrize("name", [name for name in registry.heads.names() if not name.endswith("/*")])
def test_a_head_fulfils_its_contract(name, number):
    testing.check_head(name, labels=names(number), **options(name, number))


@pytest.mark.parametrize("number", [3, 7])
def test_decreasing_edges_fulfil_the_contract(number):
    testing.check_head("interval_regression", labels=names(number), edges=RISING[number][::-1])


def with_activation():
    """Return the names of the heads that begin with a ReLU by default."""
    names = [name for name in registry.heads.names() if not name.endswith("/*")]
    return [name for name in names if "activation" in inspect.signature(registry.heads.load(name)).parameters]


@pytest.mark.parametrize("name", with_activation())
def test_the_relu_is_a_replaceable_module_without_keys(name):
    head = registry.heads.load(name)(3, names(3), **options(name, 3))
    assert {key for key in head.state_dict() if "relu" in key} == set()
    features = torch.randn(2, 3, 2, 2, 2)
    plain = registry.heads.load(name)(3, names(3), **options(name, 3), activation=False)
    plain.load_state_dict(head.state_dict())
    assert torch.equal(head(features), plain(features.clamp(min=0)))
    assert not torch.equal(head(features), plain(features))
    (where,) = [key for key, module in head.named_modules() if isinstance(module, nn.ReLU)]
    head.set_submodule(where, nn.Identity())
    assert torch.equal(head(features), plain(features))


# --- interval regression


def interval(edges):
    return heads.interval_regression(3, names(len(edges) + 1), edges=edges, activation=False)


def some_logits(dtype=torch.float64):
    """Return usual logits and extreme ones."""
    values = [-30.0, -4.0, -0.7, 0.0, 0.3, 5.0, 30.0]
    return torch.tensor(list(itertools.product(values, values)), dtype=dtype)


def normal_intervals(edges, mean, sd):
    """Return the probability `(B, labels)` of each interval by SciPy, from the smaller tail."""
    z = (np.asarray(edges) - mean[:, None]) / sd[:, None]
    z = z if edges[0] <= edges[-1] else -z
    low = np.pad(z, ((0, 0), (1, 0)), constant_values=-np.inf)
    high = np.pad(z, ((0, 0), (0, 1)), constant_values=np.inf)
    upper = stats.norm.sf(low) - stats.norm.sf(high)
    return np.where(low + high > 0, upper, stats.norm.cdf(high) - stats.norm.cdf(low))


@pytest.mark.parametrize("edges", [RISING[3], RISING[7], RISING[7][::-1]])
def test_the_probability_of_an_interval_follows_the_normal_distribution(edges):
    head, logits = interval(edges), some_logits()
    found = head.probabilities(logits).numpy()
    mean, sd = head.estimate(logits).numpy().T
    np.testing.assert_allclose(found, normal_intervals(edges, mean, sd), rtol=1e-9, atol=1e-300)


def test_two_intervals_are_a_probit_model():
    logits = some_logits()
    found = interval([80.0]).probabilities(logits)[:, 1]
    expected = stats.norm.cdf((logits[:, 0] / (1e-3 + logits[:, 1].clamp(max=10).exp())).numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def precise_log(low, high):
    """Return the log probability of a normal interval with high precision."""
    if low + high > 0:
        low, high = -high, -low
    with mpmath.workdps(60):
        below = 0 if np.isinf(low) else mpmath.ncdf(mpmath.mpf(float(low)))
        return float(mpmath.log(mpmath.ncdf(mpmath.mpf(float(high))) - below))


def test_the_loss_is_the_log_likelihood_in_the_far_tails():
    """The probability itself underflows there."""
    head, logits = interval(RISING[7]), some_logits()
    mean, sd = head.estimate(logits).numpy().T
    for label, (low, high) in enumerate(itertools.pairwise([-np.inf, *RISING[7], np.inf])):
        found = [float(head.loss(row[None], torch.tensor([label]))) for row in logits]
        expected = [-precise_log((low - m) / s, (high - m) / s) for m, s in zip(mean, sd, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_mean_over_patients():
    torch.manual_seed(0)  # a label far from the mean has a likelihood that the reference rounds to 0
    head, logits = interval(RISING[7]), torch.randn(40, 2, dtype=torch.float64)
    target = torch.randint(7, (40,))
    mean, sd = head.estimate(logits).numpy().T
    likelihood = normal_intervals(RISING[7], mean, sd)[np.arange(40), target.numpy()]
    assert float(head.loss(logits, target)) == pytest.approx(-np.log(likelihood).mean(), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["interval_regression", "proportional_odds"])
def test_probabilities_and_gradients_are_finite_in_the_far_tails(name, dtype):
    head = registry.heads.load(name)(3, names(7), **options(name, 7))
    logits = some_logits(dtype)
    if name == "proportional_odds":
        logits = logits[:, :1] - 10 * logits[:, 1:].abs() * head.thresholds.detach()
    logits = torch.cat([logits, 1000 * logits]).requires_grad_()
    found = head.probabilities(logits)
    assert found.dtype == dtype
    assert (found >= 0).all()
    assert torch.allclose(found.sum(1), torch.ones(len(logits), dtype=dtype), atol=1e-6)
    for label in range(7):
        (of_probability,) = torch.autograd.grad(found[:, label].sum(), logits, retain_graph=True)
        loss = head.loss(logits, torch.full((len(logits),), label))
        (of_loss,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert of_probability.isfinite().all()
        assert of_loss.isfinite().all()


def fitted(head, features, target):
    """Return the head with the parameters that minimise the loss."""
    head = head.double()
    optimiser = torch.optim.LBFGS(
        head.parameters(), max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = head.loss(head(features), target)
        loss.backward()
        return loss

    optimiser.step(closure)
    return head


def patients(number=3000, seed=0):
    """Return features `(N, 3, 1, 1, 1)` and the same values as `(N, 3)`."""
    values = np.random.default_rng(seed).standard_normal((number, 3))
    return torch.from_numpy(values)[..., None, None, None], values


def test_interval_regression_equals_the_maximum_likelihood_fit_of_scipy():
    """Recover mean and standard deviation of ages that are known only as decades."""
    features, x = patients()
    truth = {"mean": 66 + x @ [9.0, -4.0, 0.0], "sd": np.exp(1.8 + x @ [0.0, 0.0, 0.3])}
    ages = np.random.default_rng(1).normal(truth["mean"], truth["sd"])
    edges = [40.0, 50.0, 60.0, 70.0, 80.0, 90.0]
    target = np.searchsorted(edges, ages, side="right")
    head = fitted(interval(edges), features, torch.from_numpy(target))
    with torch.no_grad():
        found = head.estimate(head(features)).numpy().T

    def of(values):
        return 66 + 10 * values[0] + 10 * x @ values[1:4], np.exp(2 + values[4] + x @ values[5:])

    def minus_log_likelihood(values):
        return -np.log(normal_intervals(edges, *of(values))[np.arange(len(x)), target].clip(1e-300)).mean()

    theirs = of(optimize.minimize(minus_log_likelihood, np.zeros(8), method="BFGS").x)
    for ours, other, true in zip(found, theirs, truth.values(), strict=True):
        assert np.abs(ours - other).max() < 0.05
        assert np.abs(ours - true).mean() < 0.4


def test_fine_intervals_give_the_sample_mean_and_standard_deviation():
    """Without features, for increasing and decreasing edges."""
    ages = np.random.default_rng(2).normal(71.3, 12.6, 2000)
    edges = np.arange(20.0, 121.0)
    nothing = torch.zeros(2000, 3, 1, 1, 1, dtype=torch.float64)
    for given, index in ((edges, np.searchsorted(edges, ages)), (edges[::-1], 101 - np.searchsorted(edges, ages))):
        head = fitted(interval(given.tolist()), nothing, torch.from_numpy(index))
        mean, sd = head.estimate(head(nothing[:1]))[0].tolist()
        assert mean == pytest.approx(ages.mean(), abs=0.02)
        assert sd == pytest.approx(ages.std(), abs=0.02)


def test_labels_are_whole_numbers_by_default():
    found = heads.interval_regression(3, names(7)).estimate(torch.tensor([[0.0, 0.0], [1.0, -50.0]]))
    assert found.numpy() == pytest.approx(np.array([[3.0, 2.5025], [5.5, 0.0025]]))


@pytest.mark.parametrize(
    "edges", [[60.0], [60.0, 60.0], [60.0, 80.0, 90.0], [60.0, float("nan")], [60.0, float("inf")], "old", 60]
)
def test_invalid_edges_are_refused(edges):
    with pytest.raises(SpecError, match="'interval_regression' refuses its options"):
        networks.build_head(PluginRef("interval_regression", {"edges": edges}), 3, names(3))
    if edges == [60.0, 60.0]:
        with pytest.raises(InvalidValueError, match=r"edges \[60.0, 60.0\]. Expected 2 increasing or decreasing"):
            heads.interval_regression(3, names(3), edges=edges)


def test_two_labels_have_no_estimate():
    with pytest.raises(InvalidValueError, match=r"number of labels 2. Expected three or more"):
        interval([80.0]).estimate(torch.zeros(1, 2))


# --- proportional odds


def cumulative(thresholds, score):
    """Return the probability `(B, labels)` of each label by proportional odds."""
    beyond = special.expit(score[:, None] - thresholds)
    return -np.diff(np.pad(beyond, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0))))


def test_a_logit_is_the_log_odds_of_a_later_label():
    head = heads.proportional_odds(3, names(7), activation=False).double()
    logits = head(patients(50)[0]).detach()
    beyond = 1 - head.probabilities(logits).cumsum(1)[:, :-1]
    assert torch.allclose(logits.sigmoid(), beyond, atol=1e-12)
    assert (logits.diff() < 0).all()
    assert torch.allclose(logits, logits[:, :1] - head.thresholds)
    target = torch.randint(7, (50,))
    likelihood = cumulative(head.thresholds.detach().numpy(), logits[:, 0].numpy())[np.arange(50), target.numpy()]
    assert float(head.loss(logits, target)) == pytest.approx(-np.log(likelihood).mean(), rel=1e-10)


def test_initial_labels_are_equally_probable():
    head = heads.proportional_odds(3, RANKIN)
    found = head.probabilities(head(torch.zeros(1, 3, 1, 1, 1)))
    assert torch.allclose(found, torch.full((1, 7), 1 / 7), atol=1e-6)


def test_proportional_odds_equal_the_fit_of_scipy():
    features, x = patients(1500)
    slopes, thresholds = np.array([1.2, -0.5, 0.0]), np.array([-2.0, -1.2, -0.1, 0.6, 1.9, 2.2])
    score = x @ slopes + np.random.default_rng(3).logistic(size=len(x))
    target = (score[:, None] > thresholds).sum(1)
    head = fitted(heads.proportional_odds(3, RANKIN, activation=False), features, torch.from_numpy(target))

    def parts(values):
        return np.cumsum(np.append(values[3], np.exp(values[4:]))), x @ values[:3]

    def minus_log_likelihood(values):
        return -np.log(cumulative(*parts(values))[np.arange(len(x)), target].clip(1e-300)).mean()

    best = optimize.minimize(minus_log_likelihood, np.array([0, 0, 0, -1.0, *[-0.5] * 5]), method="BFGS", tol=1e-7).x
    weight, bias = (values.detach().numpy() for values in head.linear.parameters())
    assert weight[0] == pytest.approx(best[:3], abs=1e-3)
    assert head.thresholds.detach().numpy() - bias == pytest.approx(parts(best)[0], abs=1e-3)
    assert weight[0] == pytest.approx(slopes, abs=0.15)
    assert head.thresholds.detach().numpy() - bias == pytest.approx(thresholds, abs=0.25)


def test_thresholds_stay_in_order_if_a_label_is_absent():
    features, x = patients(200)
    target = torch.from_numpy(np.where(x[:, 0] > 0, 4, 1))  # neither 0, 2 nor 3
    head = heads.proportional_odds(3, names(5), activation=False).double()
    optimiser = torch.optim.Adam(head.parameters(), 0.5)
    for _ in range(200):
        optimiser.zero_grad()
        head.loss(head(features), target).backward()
        optimiser.step()
        assert (head.thresholds.diff() >= 0).all()
    found = head.probabilities(head(features))
    assert (found >= 0).all()
    assert (found.argmax(1) == target).double().mean() > 0.95


def test_two_labels_equal_the_binary_head():
    head, binary = heads.proportional_odds(3, names(2)), heads.ordinal(3, names(2))
    head.linear.load_state_dict(binary.linear.state_dict())
    features, target = patients(20)[0].float(), torch.arange(20) % 2
    logits = head(features)
    assert torch.allclose(logits, binary(features))
    assert torch.allclose(head.probabilities(logits), binary.probabilities(logits), atol=1e-6)
    assert head.loss(logits, target).item() == pytest.approx(binary.loss(logits, target).item(), rel=1e-5)


def test_proportional_odds_cannot_be_rescaled():
    assert not hasattr(heads.proportional_odds(3, RANKIN), "rescale_")


# --- in a model


@pytest.fixture
def registered_plain_backbone():
    registry.register_backbone("plain", lambda: plain_backbone(width=4))
    yield "plain"
    registry.backbones.unregister("plain")


def make_spec(*tasks):
    like = zoo.find(zoo.DEFAULT)
    return dataclasses.replace(
        like,
        name="plain.new",
        backbone=PluginRef("plain", {}),
        tasks=tasks,
        input=dataclasses.replace(like.input, shape=(8, 24, 24), expected_ranges={"no-blood": (None, None)}),
        weights=dataclasses.replace(
            like.weights, repo=None, revision=None, folder="", format="safetensors", keys={}, sha256={}
        ),
        golden_output=None,
    )


def task(name, labels, target, head, **given):
    return Task(name, "", labels, target, PluginRef(head, {"pool": "both", **given}), 0.5, 1.0)


def new_tasks():
    by_half, decades = (0.5, 1.5, 2.5, 3.5, 4.5, 5.5), (50.0, 60.0, 70.0, 80.0)
    return [
        task("rankin", RANKIN, Target("mrs", by_half, "high"), "proportional_odds"),
        task("years", YEARS, Target("age", decades, "high"), "interval_regression", edges=list(decades)),
    ]


@pytest.mark.parametrize("number", [2, 3, 7])
def test_openvino_and_torch_agree(number, registered_plain_backbone, tmp_path):
    made = [
        task(name, tuple(names(number)), Target("x", tuple(RISING[number]), "high"), name, **options(name, number))
        for name in ("proportional_odds", "interval_regression")
    ]
    spec = make_spec(*made)
    torch.manual_seed(0)
    state = {key: 20 * value for key, value in networks.build(spec).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    file = WeightFile(0, tmp_path / "model.safetensors", "0" * 64, "here", "0" * 64)
    grids = np.random.default_rng(0).random((2, *spec.input.shape), np.float32)
    answers = []
    for runtime in ("openvino", "torch"):
        (member,), _ = build_runtimes(spec, [file], resolve_runtime(runtime, "cpu", "float32"), tmp_path / runtime)
        answers.append(member.run(grids))
    for name, compiled in answers[0].items():
        np.testing.assert_allclose(compiled.probabilities, answers[1][name].probabilities, atol=1e-5)
        assert (compiled.probabilities >= 0).all()


def test_both_heads_can_be_exported(registered_plain_backbone, tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    spec = make_spec(*new_tasks())
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(spec.to_dict()))
    whole = networks.build(spec).eval()
    save_file(whole.state_dict(), tmp_path / "model/model.safetensors")
    path = export.export(f"local-dir:{tmp_path / 'model'}", tmp_path / "out")
    grids = torch.rand(3, 1, *spec.input.shape)
    found = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(grids.numpy())
    with torch.no_grad():
        expected = whole.probabilities(whole(grids))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Return a cohort in which larger bleedings have worse outcomes and darker brains are older."""
    root = tmp_path_factory.mktemp("patients")
    random = np.random.default_rng(0)
    rows = ["patient,scan,mrs,age"]
    i, j, k = np.ogrid[:48, :48, :10]
    for number in range(42):
        mrs, age = number % 7, 45 + random.integers(0, 45)
        brain = ((i - 24) / 15) ** 2 + ((j - 24) / 18) ** 2 + ((k - 5) / 4.6) ** 2 <= 1
        blood = ((i - 24) ** 2 + (j - 20) ** 2) / (3 + mrs) ** 2 + ((k - 5) / 2.5) ** 2 <= 1
        hu = np.where(brain, np.where(blood, 68, 30 + (90 - age) / 5) + 2 * random.standard_normal((48, 48, 10)), 0)
        scan = nib.Nifti1Image(hu.round().astype(np.int16), np.diag([-4.5, -4.5, 14, 1]))
        scan.to_filename(root / f"{number}.nii.gz")
        rows.append(f"P{number:02},{number}.nii.gz,{'' if number == 8 else mrs},{'' if number == 10 else age}")
    (root / "cohort.csv").write_text("\n".join(rows))
    return root


def test_new_tasks_can_be_trained_predicted_and_explained(simulated, registered_plain_backbone, tmp_path):
    """The names, columns and heads of the tasks are unknown to the library."""
    spec = make_spec(*new_tasks())
    changes = {"epochs": 12, "patience": 0, "batch_size": 6, "learning_rate": 0.02, "validation_fraction": 0.34}
    protocol, options = PRESETS["default"].replace(**changes), TrainOptions(cache_dir=tmp_path / "c")
    run = train(simulated / "cohort.csv", spec, tmp_path / "run", folds=2, protocol=protocol, options=options)
    calibrations = [result["calibration"] for result in json.loads((run / "run.json").read_text())["results"].values()]
    assert all(found["rankin"] is None and found["years"] is not None for found in calibrations)

    model = ichprog.load_model(f"local-dir:{run}", cache_dir=tmp_path / "c")
    prediction = ichprog.predict(model, simulated / "6.nii.gz")
    for each in spec.tasks:
        assert sum(prediction[each.name].probabilities.values()) == pytest.approx(1, abs=1e-5)
    years = spec.task("years")
    head = heads.interval_regression(1, years.labels, **years.head.options)
    mean, sd = head.estimate(torch.tensor([prediction["years"].logits]))[0].tolist()
    assert 20 < mean < 120
    assert 0 < sd < 100
    maps = ichprog.explain(model, simulated / "6.nii.gz", task=["rankin", "years"], method="grad_cam")
    assert set(maps) == {("rankin", "grad_cam"), ("years", "grad_cam")}
    assert ichprog.explain(model, simulated / "6.nii.gz", task="rankin", method="grad_cam").label == "6"
    assert not any(found.empty for found in maps.values())
