"""A model, where the three verbs meet: load it, have it predict, have it explain."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np

from ichprog import hub, preprocessing, registry, sources, zoo
from ichprog import scan as scan_package
from ichprog.errors import InvalidValueError, PluginError, ScanError, UnknownNameError
from ichprog.hub import WeightFile
from ichprog.results import Prediction, Saliency, TaskPrediction
from ichprog.runtime import Runtime, RuntimeConfig, TaskOutput, build_runtimes, resolve_runtime
from ichprog.scan import Scan
from ichprog.spec import InputSpec, ModelSpec, Task

if TYPE_CHECKING:
    import nibabel as nib
    import torch

    from ichprog.cohort import Cohort
    from ichprog.sources import ScanSource

OnError = Literal["raise", "record"]
_Item = TypeVar("_Item")
_Done = TypeVar("_Done")

DEPENDENCIES = ("ichprog", "torch", "monai", "openvino", "numpy", "scipy", "nibabel", "pydicom")


class Model:
    """A model with its weights loaded; `load_model` makes it, `predict` and `explain` take it.

    Args:
        spec: What the model is.
        weights: One file for each fold.
        choice: How its networks are to be run, as `runtime.choose` gives it.
        cache: The cache folder, where compiled networks are kept.

    Attributes:
        runtime: What runs its networks, "openvino" or "torch".
        device: On which device.
        precision: In which precision, "float32" or "bfloat16".
        note: Why that is not what was asked for, or None.

    Raises:
        WeightsError: The weights do not fit the network.
        SpecError: The spec names options that its plugins refuse.
        UnknownNameError: The spec names a plugin that is not installed.
        PluginError: A plugin of the spec cannot be loaded or breaks its contract.
    """

    def __init__(self, spec: ModelSpec, weights: Sequence[WeightFile], choice: RuntimeConfig, cache: Path) -> None:
        self.spec = spec
        self.weights = tuple(weights)
        self.fold_runtimes, done = build_runtimes(spec, self.weights, choice, cache)
        self.runtime, self.device, self.precision, self.fallback_reason = (
            done.runtime,
            done.device,
            done.precision,
            done.fallback_reason,
        )

    def __repr__(self) -> str:
        folds = ", ".join(str(file.fold) for file in self.weights)
        return f"<Model {self.spec.name}, folds {folds}, {self.runtime} on {self.device}, {self.precision}>"

    def load_scan(self, source: "ScanSource", *, brain: scan_package.BrainMode = "auto") -> Scan:
        """A scan read, checked against what this model was made for, and left with its brain alone.

        `predict` and `explain` do this first, and take what it gives as it is.

        Args:
            source: One scan, as `predict` takes it.
            brain: As in `predict`.

        Raises:
            ScanError: The scan cannot be read, or the model cannot be asked about it.
        """
        contract, scan = self.spec.input, sources.scan_of(source)
        mode = brain if contract.brain_only else "given"
        return scan_package.examine(scan, expected_ranges=contract.expected_ranges, brain=mode)

    def predict_grids(self, grids: np.ndarray) -> list[dict[str, TaskOutput]]:
        """Each fold's answer to each task.

        Args:
            grids: `(B, D, H, W)` float32, as `preprocessing.prepare` gives them.
        """
        return [member.run(np.ascontiguousarray(grids, np.float32)) for member in self.fold_runtimes]

    def predict_iter(
        self, scans: "Iterable[ScanSource]", *, brain: scan_package.BrainMode = "auto"
    ) -> "Iterator[tuple[Prediction, Scan | ScanError]]":
        """A prediction for each scan, with the scan as it was examined, or what is wrong with it.

        While a scan is answered the next one is read already.

        Args:
            scans: Sources of one scan each, as `sources.find_scans` returns them.
            brain: As in `predict`.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="ichprog-answer") as beside:
            for source, begun in _ahead(functools.partial(self._begin, brain=brain), scans):
                if isinstance(begun, ScanError):
                    yield self.error_prediction(source, begun), begun
                    continue
                prepared, finish = begun
                answer = beside.submit(self.fold_runtimes[0].run, prepared[None])
                try:  # what is left to check changes nothing about the grid
                    examined = finish()
                    provenance = self.provenance(examined)
                except ScanError as error:
                    yield self.error_prediction(source, error), error
                    continue
                folds = [answer.result()]
                for last, member in itertools.pairwise(self.fold_runtimes):
                    last.release_memory()  # many folds take no more memory to run than one
                    folds.append(member.run(prepared[None]))
                tasks = {task.name: _over_folds(task, [fold[task.name] for fold in folds]) for task in self.spec.tasks}
                name, patient = examined.name, sources.patient_of(source)
                yield Prediction(name, self.spec.name, tasks, examined.warnings, provenance, patient=patient), examined

    def _begin(
        self, source: "ScanSource", *, brain: scan_package.BrainMode
    ) -> tuple[np.ndarray, Callable[[], Scan]] | ScanError:
        """A scan's grid, and what finishes its examination."""
        contract, scan = self.spec.input, sources.scan_of(source)
        mode = brain if contract.brain_only else "given"
        try:
            hu, finish = scan_package.begin(scan, expected_ranges=contract.expected_ranges, brain=mode)
        except ScanError as error:
            return error
        return preprocessing.prepare(hu, contract), finish

    def error_prediction(self, source: "ScanSource", error: ScanError) -> Prediction:
        """The prediction that records why a scan has none."""
        details = {"code": error.code, "message": str(error), "measured": error.measured}
        details |= {"expected": error.expected, "unit": error.unit}
        name, patient = sources.name_of(source), sources.patient_of(source)
        return Prediction(name, self.spec.name, {}, (), self.provenance(), details, patient)

    def check_golden_output(self) -> dict[str, Any]:
        """Runs the spec's golden input, where it has one, and compares.

        Returns:
            `state`, one of "none stored", "holds" and "differs", and `difference`, the largest one of any logit.
        """
        probe = self.spec.golden_output
        if probe is None:
            seeded = np.random.default_rng(0).random((1, *self.spec.input.shape), np.float32)
            logits = [answer.logits for fold in self.predict_grids(seeded) for answer in fold.values()]
            finite = all(bool(np.isfinite(values).all()) for values in logits)
            return {"state": "none stored" if finite else "differs", "difference": None if finite else float("nan")}
        seeded = np.random.default_rng(probe.seed).random((1, *probe.shape), np.float32)
        difference = max(
            float(np.abs(answer.logits[0] - probe.logits[str(file.fold)][task]).max())
            for file, fold in zip(self.weights, self.predict_grids(seeded), strict=True)
            for task, answer in fold.items()
        )
        tolerance = 1e-4 if self.precision == "float32" else 2e-2
        return {"state": "holds" if difference <= tolerance else "differs", "difference": difference}

    def provenance(self, examined: Scan | None = None) -> dict[str, Any]:
        """Everything that goes into this model's answers, as plain data.

        Args:
            examined: The scan that is answered, where there is one.
        """
        spec, weights = self.spec.to_dict(), self.spec.weights
        return {
            "model": self.spec.name,
            "resolved": "local"
            if weights.repo is None
            else f"hf-hub:{weights.repo}/{weights.folder}@{weights.revision}",
            "weights": [
                {"fold": f.fold, "source": f.source, "source_sha256": f.source_sha256, "sha256": f.sha256}
                for f in self.weights
            ],
            "preprocessing": {key: value for key, value in spec["input"].items() if key != "expected_ranges"},
            "scan": {} if examined is None else dict(examined.record),
            "runtime": self.runtime,
            "device": self.device,
            "precision": self.precision,
            "note": self.fallback_reason,
            "versions": dict(_versions()),
            "notice": self.spec.notice,
        }


def load_model(
    name: str = zoo.DEFAULT,
    *,
    fold: int | None = None,
    device: str = "auto",
    runtime: str = "auto",
    precision: str = "float32",
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> Model:
    """Loads a model; its weights are fetched where they are not in the cache.

    Args:
        name: A name of the zoo, "hf-hub:org/repo[/folder]@revision", or "local-dir:PATH".
        fold: One member of a cross-validated set of weights; all there are where not given, averaged in probability.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        runtime: "openvino", for the processor; "torch", for any device; or "auto", the first of these that can run the
            model on the device. A network that was compiled for OpenVINO once is kept in the cache.
        precision: "float32", or "bfloat16" where the processor computes in it; where not, the model says so in its
            `note` and computes in float32.
        cache_dir: Where weights are kept; `~/.cache/ichprog` or `$ICHPROG_CACHE` where not given.
        offline: Whether the network is left alone, as with `HF_HUB_OFFLINE=1`.

    Raises:
        UnknownNameError: There is no such model, fold, device, runtime or precision.
        SpecError: The model's description is not valid.
        WeightsError: The weights cannot be had, are not the ones promised, or do not fit.
        PluginError: A plugin that the model needs cannot be loaded.
    """
    choice = resolve_runtime(runtime, device, precision)
    spec, files = hub.fetch(name, fold=fold, cache_dir=cache_dir, offline=offline)
    return Model(spec, files, choice, hub.cache_folder(cache_dir))


@overload
def predict(  # type: ignore[overload-overlap]  # some sources are iterable too, but one is meant
    model: Model | str, scans: "ScanSource", *, brain: scan_package.BrainMode = ..., on_error: OnError = ...
) -> Prediction: ...
@overload
def predict(  # type: ignore[overload-overlap]
    model: Model | str,
    scans: "list[Any] | tuple[Any, ...] | Cohort",
    *,
    brain: scan_package.BrainMode = ...,
    on_error: OnError = ...,
) -> list[Prediction]: ...
@overload
def predict(
    model: Model | str, scans: "Iterable[Any]", *, brain: scan_package.BrainMode = ..., on_error: OnError = ...
) -> Iterator[Prediction]: ...
def predict(
    model: Model | str,
    scans: "ScanSource | Cohort | Iterable[Any]",
    *,
    brain: scan_package.BrainMode = "auto",
    on_error: OnError = "raise",
) -> Prediction | list[Prediction] | Iterator[Prediction]:
    """Predict every task of a model for one scan or several.

    Args:
        model: A model, or a name that `load_model` takes.
        scans: One scan or several. One scan is a NIfTI path, a DICOM folder or a .zip of one, a nibabel image, or a
            tuple `(array, affine)`: HU of shape `(i, j, k)` and the `(4, 4)` affine from voxels to RAS mm. Several are
            a folder of scans, a table of patients (.csv), a Cohort, or a list, tuple or other iterable of all these.
        brain: "auto" extracts the brain where a skull is seen, "extract" always, "given" never.
        on_error: "raise" raises the error of a scan; "record" records the error in the scan's Prediction and continues
            with the next scan.

    Returns:
        A Prediction for one scan. A list for a list, a tuple, a folder of scans, a table or a Cohort. An iterator for
        any other iterable; the iterator reads one scan ahead.

    Raises:
        InvalidValueError: `scans` holds something that is no scan, or `on_error` is unknown.
        ScanError: A scan cannot be read, or the model cannot predict it.
        CohortError: A table of patients cannot be read.
    """
    scan_package.refuse_unknown_mode(brain)
    if on_error not in ("raise", "record"):
        raise InvalidValueError("on_error", on_error, "'raise' or 'record'")
    found, is_single = sources.resolve(scans)
    predictions = _predictions(load_model(model) if isinstance(model, str) else model, found, brain, on_error)
    if is_single:
        return next(predictions)
    return list(predictions) if isinstance(found, list) else predictions


def explain(
    model: Model | str,
    scan: "ScanSource",
    *,
    task: str | Sequence[str] | None = None,
    label: str | Mapping[str, str] | None = None,
    method: str | Sequence[str] = "guided_backprop",
    brain: scan_package.BrainMode = "auto",
    **options: Any,
) -> Saliency | dict[tuple[str, str], Saliency]:
    """Explains what in a scan speaks for a label.

    What is explained is the log-odds of the label's probability, which for a task of two labels is its logit. With
    several folds the map is the mean of theirs.

    Args:
        model: A model, or a name that `load_model` takes.
        scan: One scan, as `predict` takes it.
        task: A task, or several; the model's first where not given.
        label: The label that is explained, or one for each task by name; the last one, the most severe, where not
            given.
        method: A saliency method, or several; `ichprog plugins` lists them.
        brain: As in `predict`.
        **options: Options of the methods, such as `layer="features.transition3.conv"` of Grad-CAM; each method takes
            those that are its own.

    Returns:
        A Saliency; where tasks or methods are several, a dict of them keyed (task, method), all from one forward pass
        of each fold.

    Raises:
        ScanError: The scan cannot be read or is none that the model can be asked about.
        UnknownNameError: There is no such task, label, method, layer or option.
        PluginError: A method cannot be loaded, breaks its contract, refuses its options, or does not apply to the
            model's network.
    """
    scan = sources.find_one_scan(scan)
    loaded = load_model(model) if isinstance(model, str) else model
    spec = loaded.spec
    tasks = [spec.tasks[0]] if task is None else [spec.task(name) for name in _several(task)]
    labels = {each.name: _label_of(each, label, sole=len(tasks) == 1) for each in tasks}
    methods = _several(method)
    if all(registry.saliency.entry(name).distribution == "ichprog" for name in methods):  # others may want the network
        loaded.fold_runtimes[0].prefetch_explanation()  # while torch is imported for the methods, and the scan is read
    attributions = _attributions(methods, options)
    examined = loaded.load_scan(scan, brain=brain)
    prepared = preprocessing.prepare(examined.hu, spec.input)
    maps: dict[tuple[str, str], np.ndarray] = {}
    ran: dict[str, Any] = {}
    for member in loaded.fold_runtimes:
        found, ran = _maps_of(member, prepared, tasks, labels, attributions)
        if len(loaded.fold_runtimes) > 1:
            member.release_memory()  # many folds take no more memory to run than one
        for key, values in found.items():
            maps[key] = maps.get(key, np.float32(0)) + values / np.float32(len(loaded.fold_runtimes))
    provenance = loaded.provenance(examined) | ran
    size = examined.hu.shape, examined.source_shape, examined.source_affine  # and not the scan, which is large
    over_scan = functools.partial(_over_scan, *size, spec.input)
    results = {
        (name, how): Saliency(
            scan=examined.name,
            model=spec.name,
            task=name,
            label=labels[name],
            method=how,
            grid_map=values,
            empty=not values.any(),
            warnings=examined.warnings,
            provenance=provenance | {"options": attributions[how].options, "grid_shape": list(values.shape)},
            over_scan=over_scan,
        )
        for (name, how), values in maps.items()
    }
    one = (task is None or isinstance(task, str)) and isinstance(method, str)
    return next(iter(results.values())) if one else results


def _over_scan(
    shape: tuple[int, int, int],
    source_shape: tuple[int, ...],
    source_affine: np.ndarray,
    contract: InputSpec,
    grid_map: np.ndarray,
) -> "nib.Nifti1Image":
    return scan_package.image(preprocessing.to_scan(grid_map, shape, contract), source_shape, source_affine)


def _predictions(
    model: Model, sources: "Iterable[ScanSource]", brain: scan_package.BrainMode, on_error: OnError
) -> Iterator[Prediction]:
    for prediction, examined in model.predict_iter(sources, brain=brain):
        if isinstance(examined, ScanError) and on_error == "raise":
            raise examined
        yield prediction


def _ahead(work: Callable[[_Item], _Done], items: Iterable[_Item]) -> Iterator[tuple[_Item, _Done]]:
    """Items with what was done for each, in their order, the next one under way already."""
    with ThreadPoolExecutor(1, thread_name_prefix="ichprog-read") as pool:
        begun: list[tuple[_Item, Future[_Done]]] = []
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) > 1:
                last, done = begun.pop(0)
                yield last, done.result()
        for last, done in begun:
            yield last, done.result()


@functools.cache
def _versions() -> dict[str, str]:
    return {"python": python_version(), **{name: version(name) for name in DEPENDENCIES}}


def _several(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


def _over_folds(task: Task, answers: Sequence[TaskOutput]) -> TaskPrediction:
    """One scan's answers of several folds as one."""
    each = np.stack([answer.probabilities[0] for answer in answers]).astype(float)
    means = dict(zip(task.labels, each.mean(0).tolist(), strict=True))
    spread = dict(zip(task.labels, each.std(0, ddof=1).tolist(), strict=True)) if len(answers) > 1 else None
    logits = np.mean([answer.logits[0] for answer in answers], axis=0, dtype=float)
    return TaskPrediction(task.decide(means), means, tuple(logits.tolist()), spread)


def _label_of(task: Task, label: str | Mapping[str, str] | None, *, sole: bool) -> str:
    """The label of a task that is to be explained."""
    if isinstance(label, str) and not sole:
        raise UnknownNameError("label of several tasks", label, [], hint="Give a label for each task, {task: label}.")
    chosen = label if isinstance(label, str) else (label or {}).get(task.name, task.labels[-1])
    if chosen not in task.labels:
        raise UnknownNameError(f"label of {task.name}", chosen, task.labels)
    return chosen


class _Attribution(NamedTuple):
    """A saliency method with the options that are its own."""

    method: Callable[..., Any]
    options: dict[str, Any]
    has_layer: bool


def _attributions(methods: Sequence[str], options: Mapping[str, Any]) -> dict[str, _Attribution]:
    """The methods by name, each with its share of the options."""
    found, taken = {}, set()
    for name in methods:
        attribute = registry.saliency.load(name)
        if not callable(attribute):
            raise PluginError(f"saliency method {name!r} breaks its contract: it is no function.")
        own = {p.name for p in inspect.signature(attribute).parameters.values() if p.kind is p.KEYWORD_ONLY}
        chosen = {key: value for key, value in options.items() if key in own}
        found[name] = _Attribution(attribute, chosen, "layer" in own)
        taken |= own
    for unknown in options.keys() - taken:
        raise UnknownNameError(f"option of {', '.join(methods)}", unknown, sorted(taken))
    return found


def _maps_of(
    member: Runtime,
    prepared: np.ndarray,
    tasks: Sequence[Task],
    labels: Mapping[str, str],
    attributions: Mapping[str, _Attribution],
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, Any]]:
    """One fold's map for each task and method, all from one forward pass, and what ran it."""
    import torch

    from ichprog import saliency

    maps: dict[tuple[str, str], np.ndarray] = {}
    layers = {how.options.get("layer") for how in attributions.values() if how.has_layer}
    with member.explanation_session(prepared, [how.method for how in attributions.values()], layers) as known:
        for task in tasks:
            score = saliency.Score(known, _log_odds(known.network, task.name, task.labels.index(labels[task.name])))
            for name, how in attributions.items():
                try:
                    with known.rounding():
                        found = torch.as_tensor(how.method(score, known.grid, known.network, **how.options)).detach()
                except ValueError as error:
                    raise PluginError(f"saliency method {name!r} refuses its options {how.options}: {error}") from error
                if found.ndim != 3 or not bool(found.isfinite().all()):
                    raise PluginError(
                        f"saliency method {name!r} breaks its contract: a map is (D, H, W) of finite numbers, this one "
                        f"has shape {tuple(found.shape)}{'' if found.ndim != 3 else ' and numbers that are not'}."
                    )
                maps[task.name, name] = found.float().cpu().numpy()
        return maps, {
            "runtime": known.runtime,
            **({} if known.fallback_reason is None else {"note": known.fallback_reason}),
        }


def _log_odds(network: Any, task: str, label: int) -> "Callable[[dict[str, torch.Tensor]], torch.Tensor]":
    """The log-odds of a label's probability, from a network's logits."""
    import torch

    def score(logits: "dict[str, torch.Tensor]") -> "torch.Tensor":
        # in double precision a probability near one keeps its distance from one
        probabilities = network.heads[task].probabilities(logits[task].to("cpu", torch.float64))
        return cast("torch.Tensor", probabilities[:, label].logit(eps=1e-15))

    return score
