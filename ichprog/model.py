"""Load a model, predict with it, explain its predictions, and find haemorrhages."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from socket import gethostname
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, get_args, overload

import numpy as np

from ichprog import calibration, detection, hub, preprocessing, registry, sources, zoo
from ichprog import scan as scan_package
from ichprog.clinical import combine, encode, leave_one_out, read_values
from ichprog.cohort import Patient
from ichprog.errors import InvalidValueError, PluginError, RunError, ScanError, UnknownNameError, WeightsError
from ichprog.hub import WeightFile
from ichprog.notebook import card
from ichprog.results import ClinicalUse, Haemorrhage, Prediction, Saliency, Segmentation, TaskPrediction
from ichprog.runtime import Runtime, RuntimeConfig, TaskOutput, build_runtimes, resolve_runtime
from ichprog.scan import BrainExtractor, BrainMode, Scan
from ichprog.spec import InputSpec, ModelSpec, Task

if TYPE_CHECKING:
    import nibabel as nib
    import torch
    from torch import nn

    from ichprog.cohort import Cohort
    from ichprog.saliency import Score
    from ichprog.scan.brain import Brain
    from ichprog.sources import ScanSource, SingleScan

OnError = Literal["raise", "record"]
Geometry = tuple[tuple[int, int, int], tuple[int, ...], np.ndarray]  # scan in LPS order, source shape, source affine
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

DEPENDENCIES = ("ichprog", "torch", "monai", "openvino", "numpy", "nibabel", "pydicom")


class Model:
    """A model with its weights. `load_model` returns one, `predict` and `explain` take one.

    A model from `load_model` can be pickled. The pickle holds its name and the checksums of its weights. A process that
    reads the pickle loads the model, and refuses other weights and other versions of packages.

    Args:
        spec: The specification of the model.
        weights: Weight file of each fold.
        fold_runtimes: Runtime of each fold.
        config: The configuration of the runtimes.
        loading: Arguments of `load_model` by which another process loads the model; None if there are none.

    Attributes:
        runtime: The runtime of the networks, "openvino" or "torch".
        device: Device of the networks.
        precision: "float32" or "bfloat16".
        fallback_reason: Why runtime or precision differ from the requested ones, or None.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Sequence[WeightFile],
        fold_runtimes: Sequence[Runtime],
        config: RuntimeConfig,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec, self.weights, self.fold_runtimes = spec, tuple(weights), tuple(fold_runtimes)
        self._config, self._loading = config, loading
        self.runtime, self.device, self.precision = config.runtime, config.device, config.precision
        self.fallback_reason = config.fallback_reason

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        weights: Sequence[WeightFile],
        config: RuntimeConfig,
        cache: Path,
        loading: Mapping[str, Any] | None = None,
    ) -> "Model":
        """Build the networks of a spec and fill them with weights.

        Args:
            spec: The specification of the model.
            weights: Weight file of each fold.
            config: The requested runtime, from `runtime.resolve_runtime`.
            cache: The cache folder for compiled networks.
            loading: As in `Model`.

        Raises:
            WeightsError: The weights do not fit the network.
            SpecError: The spec has options that its plugins refuse.
            UnknownNameError: The spec names a plugin that is not installed.
            PluginError: A plugin of the spec cannot be loaded or breaks its contract.
        """
        scan_package.resolve_ranges(spec.input.expected_ranges)  # refuses unknown checks before a scan is read
        runtimes, config = build_runtimes(spec, weights, config, cache)
        return cls(spec, weights, runtimes, config, loading)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how the model is loaded, instead of the model."""
        if self._loading is None:
            raise InvalidValueError("model", self.spec.name, "a model from `load_model`, to send it to other processes")
        return _reload, (dict(self._loading), self._identity())

    def _identity(self) -> dict[str, Any]:
        """Return what must be equal in every process for equal predictions."""
        weights = {f"fold {file.fold}": file.sha256 for file in self.weights}
        return {"weights": weights, "versions": _versions(), "precision": self.precision}

    def __repr__(self) -> str:
        folds = ", ".join(str(file.fold) for file in self.weights)
        return f"<Model {self.spec.name}, folds {folds}, {self.runtime} on {self.device}, {self.precision}>"

    def _repr_html_(self) -> str:
        """Show the model as a table in a notebook."""
        rows = [["tasks", ", ".join(task.name for task in self.spec.tasks)], ["runtime", self.runtime]]
        rows += [["device", self.device], ["precision", self.precision]]
        rows.append(["folds", ", ".join(str(file.fold) for file in self.weights)])
        return card(self.spec.name, ["", ""], rows, [self.spec.summary, self.spec.notice])

    def fold(self, fold: int) -> "Model":
        """Return a model with one fold only. It shares the fold's network with this model.

        Args:
            fold: Number of the fold.

        Raises:
            UnknownNameError: The model has no such fold.

        Examples:
            >>> model = ichprog.load_model("compact.prognosis_gcs3_age")
            >>> model.fold(0)
            <Model compact.prognosis_gcs3_age, folds 0, openvino on cpu, float32>
        """
        position = self._position(fold)
        loading = None if self._loading is None else {**self._loading, "fold": fold}
        return Model(self.spec, [self.weights[position]], [self.fold_runtimes[position]], self._config, loading)

    def torch_module(self, fold: int | None = None) -> "nn.Module":
        """Return the torch network of a fold, in evaluation mode.

        With runtime "torch" this is the module that predicts, so that changes to it change the predictions. With
        runtime "openvino" it is a separate module with the same weights.

        Args:
            fold: Number of the fold. By default the first.

        Raises:
            UnknownNameError: The model has no such fold.
        """
        return self.fold_runtimes[0 if fold is None else self._position(fold)].torch_module()

    def compile(self) -> None:
        """Compile and cache every graph of predictions and explanations that is not cached yet.

        With runtime "torch" there is nothing to compile.

        Examples:
            ```python
            ichprog.load_model("perez2023.prognosis", runtime="openvino").compile()
            ```
        """
        for runtime in self.fold_runtimes:
            runtime.compile()
            runtime.release_memory()

    def is_compiled(self, *, explain: bool = False) -> bool:
        """Return False if torch computes only because no graph is cached yet, which runtime "cached" allows.

        Args:
            explain: Whether explanations count, too.
        """
        if self.runtime == "torch":
            return not self._config.only_cached
        return all(runtime.is_compiled(explain=explain) for runtime in self.fold_runtimes)

    def _position(self, fold: int) -> int:
        folds = [file.fold for file in self.weights]
        if fold not in folds:
            raise UnknownNameError(f"fold of {self.spec.name}", fold, folds)
        return folds.index(fold)

    def load_scan(self, source: "ScanSource", *, brain: "Brain" = "auto") -> Scan:
        """Read a scan, check it against the input contract of the model and extract the brain.

        `predict` and `explain` call this function first. They take its result as a scan, too.

        Args:
            source: One scan, as in `predict`.
            brain: As in `predict`.

        Raises:
            ScanError: The scan cannot be read, or the model cannot process it.
        """
        contract, scan = self.spec.input, sources.scan_of(source)
        resolved = resolve_brain(brain) if contract.brain_only else "given"
        return scan_package.load(scan, expected_ranges=contract.expected_ranges, brain=resolved)

    def predict_grids(self, grids: np.ndarray, clinical: np.ndarray | None = None) -> list[dict[str, TaskOutput]]:
        """Run every fold on preprocessed grids.

        Args:
            grids: `(B, D, H, W)` float32, from `preprocessing.prepare`.
            clinical: `(B, 2 V)` float32 from `clinical.encode`, for a model with clinical values; None if no value is
                known.

        Returns:
            For each fold, the output of each task.
        """
        inputs = np.ascontiguousarray(grids, np.float32), clinical
        return [self._run(runtime, *inputs) for runtime in self.fold_runtimes]

    def predict_iter(
        self,
        scans: "Iterable[ScanSource]",
        *,
        brain: "Brain" = "auto",
        detector: "Model | None" = None,
        clinical: Mapping[str, Any] | None = None,
        coverage: float | None = None,
    ) -> "Iterator[tuple[Prediction, Scan | ScanError]]":
        """Yield a prediction for each scan, with the checked scan or the error of the scan.

        The next scan is read while the network runs on the current one.

        Args:
            scans: Sources of one scan each, as `sources.find_scans` returns them.
            brain: As in `predict`.
            detector: A model that finds the haemorrhage of each prediction; it may be this model.
            clinical: As in `predict`.
            coverage: As in `predict`.

        Raises:
            InvalidValueError: The detector finds no haemorrhages, its input differs in `brain_only`, or a clinical
                value or the coverage is not allowed.
            UnknownNameError: The model does not use a clinical value.
        """
        reliability = self._resolve_coverage(coverage)
        read_values(self.spec, clinical or {})  # the scans may be an iterator, whose rows come later
        for source in scans if isinstance(scans, list) else ():
            self.clinical_values(source, clinical)  # refuses wrong values before a scan is read
        resolved = resolve_brain(brain) if self.spec.input.brain_only else "given"
        if detector is not None:
            _check_detector(detector.spec, self.spec)
        load = functools.partial(self._load_grids, brain=resolved, detector=detector)
        with _thread("ichprog-run") as executor:
            for source, loaded in _prefetch(load, scans):
                if isinstance(loaded, ScanError):
                    yield self.error_prediction(source, loaded), loaded
                    continue
                grids, finish = loaded
                known = self.clinical_values(source, clinical)
                inputs = self._inputs(grids[0], known)
                first = executor.submit(self._run, self.fold_runtimes[0], *inputs)
                try:  # the remaining checks do not change the grid
                    scan = finish()
                    provenance = self.provenance(scan)
                except ScanError as error:
                    yield self.error_prediction(source, error), error
                    continue
                outputs = self._run_folds(inputs, first.result())
                prediction = self._prediction(source, scan, outputs, provenance, known)
                prediction = self._calibrate(prediction, grids[0], reliability)
                if detector is not None:
                    found = prediction if detector is self else detector._predict_grid(source, scan, grids[-1])
                    prediction = self._with_haemorrhage(prediction, detection.describe(found, detector.spec, scan))
                yield prediction, scan

    def haemorrhage_iter(
        self, scans: "Iterable[ScanSource]", *, brain: "Brain" = "auto"
    ) -> "Iterator[tuple[Haemorrhage, Scan | ScanError]]":
        """Yield the haemorrhage of each scan, with the checked scan or the error of the scan.

        Args:
            scans: As in `predict_iter`.
            brain: As in `predict`.

        Raises:
            InvalidValueError: The model finds no haemorrhages.
        """
        detection.find_task(self.spec)
        for prediction, scan in self.predict_iter(scans, brain=brain, detector=self):
            yield prediction.haemorrhage or detection.describe(prediction, self.spec, None), scan

    def clinical_values(self, source: "ScanSource", given: Mapping[str, Any] | None) -> dict[str, float]:
        """Return the known clinical values of a scan: the given ones, and those of its row in a cohort.

        Args:
            source: One scan, as in `predict`.
            given: Values by column, as in `predict`.

        Raises:
            UnknownNameError: The model does not use a value.
            InvalidValueError: A value is not allowed, or is given twice.
        """
        values = dict(given or {})
        if isinstance(source, Patient):
            for column in (value.column for value in self.spec.clinical):
                cell = source.columns.get(column, "")
                if column in values and cell:
                    expected = "one value: in the table or as `clinical`"
                    raise InvalidValueError(f"{column} of patient {source.name}", [cell, values[column]], expected)
                values.setdefault(column, cell)
            return read_values(self.spec, values, patient=source.name)
        return read_values(self.spec, values)

    def _inputs(self, grid: np.ndarray, known: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the grids and clinical values of one scan: with all known values, and without each of them."""
        if self.spec.fusion is None:
            return grid[None], None
        clinical = leave_one_out(self.spec, known)
        return np.repeat(grid[None], len(clinical), axis=0), clinical

    def _clinical_use(self, known: Mapping[str, float], outputs: Sequence[dict[str, TaskOutput]]) -> ClinicalUse | None:
        """Return which values were used and what each changed, from the outputs for the rows of `_inputs`."""
        if not self.spec.clinical:
            return None
        contributions = {}
        for task in self.spec.tasks:
            if task.uses_clinical:
                p = np.mean([output[task.name].probabilities for output in outputs], axis=0, dtype=float)
            elif task.combinations:
                alone = np.mean([output[task.name].probabilities for output in outputs], axis=0, dtype=float)
                without = [{k: v for k, v in known.items() if k != left_out} for left_out in known]
                p = np.concatenate([combine(self.spec, task, alone, each) for each in (known, *without)])
            else:
                continue
            odds = calibration.log_odds(p[:, -1])
            contributions[task.name] = dict(zip(known, (odds[0] - odds[1:]).tolist(), strict=True))
        missing = tuple(value.column for value in self.spec.clinical if value.column not in known)
        return ClinicalUse(dict(known), missing, contributions)

    def _run_folds(
        self, inputs: tuple[np.ndarray, np.ndarray | None], first: dict[str, TaskOutput]
    ) -> list[dict[str, TaskOutput]]:
        """Run every fold but the first on the inputs of one scan, and return the outputs of all."""
        outputs = [first]
        for previous, runtime in itertools.pairwise(self.fold_runtimes):
            previous.release_memory()  # so that many folds need no more memory than one
            outputs.append(self._run(runtime, *inputs))
        return outputs

    def _run(self, runtime: Runtime, grids: np.ndarray, clinical: np.ndarray | None) -> dict[str, TaskOutput]:
        """Run a fold, and refuse numbers that are not finite, whatever made them."""
        outputs = runtime.run(grids, clinical)
        for task, output in outputs.items():
            if not all(np.isfinite(each).all() for each in output if each is not None):
                fold = self.weights[self.fold_runtimes.index(runtime)].fold
                raise WeightsError(
                    f"{self.spec.name}, fold {fold}: the answer of {task} is not a finite number. Run `ichprog doctor` "
                    "for the model, and try the runtime torch in float32."
                )
        return outputs

    def _predict_grid(self, source: "ScanSource", scan: Scan, grid: np.ndarray) -> Prediction:
        """Return the prediction of a checked scan with its grid."""
        known = self.clinical_values(source, None)
        inputs = self._inputs(grid, known)
        outputs = self._run_folds(inputs, self._run(self.fold_runtimes[0], *inputs))
        return self._prediction(source, scan, outputs, self.provenance(scan), known)

    def _with_haemorrhage(self, prediction: Prediction, haemorrhage: Haemorrhage) -> Prediction:
        """Return a prediction with its haemorrhage, and with a warning if this model expects blood that is absent."""
        lowest_ml, _ = scan_package.resolve_ranges(self.spec.input.expected_ranges)[detection.BLOOD_CHECK]
        missing = detection.find_missing_blood(haemorrhage, lowest_ml)
        warnings = prediction.warnings if missing is None else (*prediction.warnings, missing)
        return dataclasses.replace(prediction, haemorrhage=haemorrhage, warnings=warnings)

    def _prediction(
        self,
        source: "ScanSource",
        scan: Scan,
        outputs: Sequence[dict[str, TaskOutput]],
        provenance: dict[str, Any],
        known: Mapping[str, float],
    ) -> Prediction:
        """Return the prediction of a scan from the outputs of all folds for the rows of `_inputs`."""
        geometry = scan.hu.shape, scan.source_shape, scan.source_affine  # the scan itself is large
        tasks = {
            task.name: _mean_over_folds(self.spec, task, [output[task.name] for output in outputs], geometry, known)
            for task in self.spec.tasks
        }
        return Prediction(
            scan.name,
            self.spec.name,
            tasks,
            scan.warnings,
            provenance,
            patient=sources.patient_of(source),
            clinical=self._clinical_use(known, outputs),
        )

    def _resolve_coverage(self, coverage: float | None) -> float | None:
        """Return the coverage of conformal sets, None for a model without calibration."""
        if coverage is not None and not 0 < coverage < 1:
            raise InvalidValueError("coverage", coverage, "a number between 0 and 1, such as 0.9")
        if self.spec.calibration is not None:
            return calibration.COVERAGE if coverage is None else coverage
        if coverage is not None:
            raise InvalidValueError(
                "coverage", coverage, f"None, because {self.spec.name} has no calibration",
                "`ichprog calibrate` makes one from a cohort with labels.",
            )  # fmt: skip
        return None

    def _calibrate(self, prediction: Prediction, grid: np.ndarray, coverage: float | None) -> Prediction:
        """Return a prediction with calibrated probabilities, conformal sets and the distance of its scan."""
        known = self.spec.calibration
        if known is None or coverage is None:
            return prediction
        tasks = dict(prediction.tasks)
        for name, fitted in known.tasks.items():
            task, raw = self.spec.task(name), np.array(list(tasks[name].probabilities.values()))
            (p,) = calibration.adjust(task, raw[None], fitted.adjustments)
            tasks[name] = dataclasses.replace(
                tasks[name],
                calibrated=dict(zip(task.labels, p.tolist(), strict=True)),
                label_set=calibration.conformal_set(task, fitted, p, coverage),
            )
        distance = calibration.measure_distance(known.inputs, calibration.input_statistics(grid))
        return dataclasses.replace(prediction, tasks=tasks, coverage=coverage, input_distance=distance)

    def _load_grids(
        self, source: "ScanSource", *, brain: "Brain", detector: "Model | None"
    ) -> tuple[list[np.ndarray], Callable[[], Scan]] | ScanError:
        """Return the grids of a scan and the function that runs the remaining checks, or the error of the scan.

        The first grid is that of this model, the last one that of the detector.
        """
        contract, scan = self.spec.input, sources.scan_of(source)
        ranges = (
            contract.expected_ranges if detector is None else detection.without_blood_check(contract.expected_ranges)
        )
        try:
            hu, finish = scan_package.load_deferred(scan, expected_ranges=ranges, brain=brain)
        except ScanError as error:
            return error
        grids = [preprocessing.prepare(hu, contract)]
        if detector is not None and detector is not self:
            grids.append(preprocessing.prepare(hu, detector.spec.input))
        return grids, finish

    def error_prediction(self, source: "ScanSource", error: ScanError) -> Prediction:
        """Return a prediction without tasks that records the error of a scan."""
        details = {"code": error.code, "message": str(error), "measured": error.measured}
        details |= {"expected": error.expected, "unit": error.unit}
        name, patient = sources.name_of(source), sources.patient_of(source)
        return Prediction(name, self.spec.name, {}, (), self.provenance(), details, patient)

    def error_haemorrhage(self, source: "ScanSource", error: ScanError) -> Haemorrhage:
        """Return a haemorrhage without values that records the error of a scan."""
        return detection.describe(self.error_prediction(source, error), self.spec, None)

    def check_golden_output(self) -> dict[str, Any]:
        """Run the golden input of the spec and compare the logits with the stored ones.

        Returns:
            `state`, one of "none stored", "holds" and "differs", and `difference`, the largest difference of a logit.
        """
        golden = self.spec.golden_output
        if golden is None:
            grid = np.random.default_rng(0).random((1, *self.spec.input.shape), np.float32)
            self.predict_grids(grid)  # raises an error if an answer is not finite
            return {"state": "none stored", "difference": None}
        grid = np.random.default_rng(golden.seed).random((1, *golden.shape), np.float32)
        difference = max(
            float(np.abs(output.logits[0] - golden.logits[str(file.fold)][task]).max())
            for file, fold in zip(self.weights, self.predict_grids(grid), strict=True)
            for task, output in fold.items()
        )
        tolerance = 1e-4 if self.precision == "float32" else 2e-2
        return {"state": "holds" if difference <= tolerance else "differs", "difference": difference}

    def provenance(self, scan: Scan | None = None) -> dict[str, Any]:
        """Return as plain data everything that determines a prediction.

        Args:
            scan: The scan of the prediction, if there is one.
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
            "scan": {} if scan is None else dict(scan.record),
            "runtime": self.runtime,
            "device": self.device,
            "precision": self.precision,
            "fallback_reason": self.fallback_reason,
            "versions": dict(_versions()),
            "notice": self.spec.notice,
            **({} if self.spec.dense_task is None else {"limits": list(self.spec.limits)}),  # of its volumes
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
    """Load a model. Weights that are not in the cache are downloaded first.

    Args:
        name: A zoo name, "hf-hub:org/repo[/folder]@revision", or "local-dir:PATH".
        fold: Number of one fold. By default all folds, whose probabilities are averaged.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        runtime: "openvino" for the CPU, "torch" for any device, or "auto": OpenVINO on the CPU if it can run the
            model, otherwise torch. Networks compiled by OpenVINO are cached; compiling a large one takes a minute.
            "cached" is as "auto" but compiles nothing: torch computes what has no cached graph.
        precision: "float32", or "bfloat16" if the hardware supports it. Otherwise the model computes in float32 and
            `Model.fallback_reason` says why.
        cache_dir: The cache folder. By default `$ICHPROG_CACHE` or `~/.cache/ichprog`.
        offline: Whether to use no network, as with `HF_HUB_OFFLINE=1`.

    Raises:
        UnknownNameError: There is no such model, fold, device, runtime or precision.
        SpecError: The specification of the model is not valid.
        WeightsError: The weights cannot be obtained, fail verification or do not fit the network.
        PluginError: A plugin that the model needs cannot be loaded.

    Examples:
        >>> ichprog.load_model("compact.prognosis_gcs3_age", fold=0)
        <Model compact.prognosis_gcs3_age, folds 0, openvino on cpu, float32>
    """
    config, cache = resolve_runtime(runtime, device, precision), hub.cache_folder(cache_dir)
    spec, files = hub.fetch(name, fold=fold, cache_dir=cache, offline=offline)
    loading = {
        "name": name, "fold": fold, "device": device, "runtime": runtime, "precision": precision,
        "cache_dir": cache.absolute(), "offline": offline,
    }  # fmt: skip
    model = Model.build(spec, files, config, cache, loading)
    if runtime == "cached":  # other processes run as this one, whatever is compiled meanwhile
        model._loading = loading | {"runtime": "auto" if model.is_compiled() else "torch"}
    return model


def _reload(loading: dict[str, Any], expected: Mapping[str, Any]) -> Model:
    """Load a model in another process, and refuse one that may predict other numbers."""
    model = load_model(**loading)
    for key, found in model._identity().items():
        if found != expected[key]:
            raise RunError(
                f"{loading['name']} on {gethostname()}: {key} are {found}. Expected {expected[key]}, as in the process "
                "that sent the model. Use the same environment, cache and device in all processes."
            )
    return model


# A path may be one scan, a folder of scans or a table, which only the disk can tell. The result is typed as
# `Prediction | Any`, as typeshed types such results: the common case, one scan, keeps completion and checks, and a list
# needs no cast. A union with `list[Prediction]` would make every caller with one scan test the type first. A folder or
# a table in a list is typed exactly: `predict(model, ["scans"])` is a `list[Prediction]`.
@overload
def predict(  # type: ignore[overload-overlap]  # a pair (array, affine) is a tuple, too, but one scan is meant
    model: Model | str,
    scans: "SingleScan",
    *,
    brain: "Brain" = ...,
    on_error: OnError = ...,
    haemorrhage: bool | str | Model = ...,
    clinical: Mapping[str, Any] | None = ...,
    coverage: float | None = ...,
) -> Prediction: ...
@overload
def predict(
    model: Model | str,
    scans: str | Path,
    *,
    brain: "Brain" = ...,
    on_error: OnError = ...,
    haemorrhage: bool | str | Model = ...,
    clinical: Mapping[str, Any] | None = ...,
    coverage: float | None = ...,
) -> Prediction | Any: ...
@overload
def predict(  # type: ignore[overload-overlap]
    model: Model | str,
    scans: "list[Any] | tuple[Any, ...] | Cohort",
    *,
    brain: "Brain" = ...,
    on_error: OnError = ...,
    haemorrhage: bool | str | Model = ...,
    clinical: Mapping[str, Any] | None = ...,
    coverage: float | None = ...,
) -> list[Prediction]: ...
@overload
def predict(
    model: Model | str,
    scans: "Iterable[Any]",
    *,
    brain: "Brain" = ...,
    on_error: OnError = ...,
    haemorrhage: bool | str | Model = ...,
    clinical: Mapping[str, Any] | None = ...,
    coverage: float | None = ...,
) -> Iterator[Prediction]: ...
def predict(
    model: Model | str,
    scans: "ScanSource | Cohort | Iterable[Any]",
    *,
    brain: "Brain" = "auto",
    on_error: OnError = "raise",
    haemorrhage: bool | str | Model = False,
    clinical: Mapping[str, Any] | None = None,
    coverage: float | None = None,
) -> Prediction | list[Prediction] | Iterator[Prediction]:
    """Predict every task of a model for one scan or several.

    Args:
        model: A model, or a name as in `load_model`.
        scans: One scan or several. One scan is a NIfTI path, a DICOM folder or a .zip of one, a nibabel image, or a
            tuple `(array, affine)`: HU of shape `(i, j, k)` and the `(4, 4)` affine from voxels to RAS mm. Several are
            a folder of scans, a table of patients (.csv), a Cohort, or a list, tuple or other iterable of all these.
        brain: "auto" extracts the brain if a skull is visible, "extract" always, "given" never. The name of a
            brain-extractor plugin extracts with the plugin. A mask (a path, a nibabel image, or an array in the shape
            of the scan; 0 outside the brain) is applied to every scan.
        on_error: "raise" raises the error of a scan; "record" records the error in the scan's Prediction and continues
            with the next scan.
        haemorrhage: Whether each Prediction has the haemorrhage of its scan, or the model that finds haemorrhages. The
            check `no-blood` then uses the answer of this model.
        clinical: What is known of the patient, by column of the model's `clinical`, such as `{"age": 71}`. Any value
            may be missing. The rows of a table of patients have their own values.
        coverage: Probability with which the conformal set of each task holds the true label, for a model with a
            calibration; 0.9 by default.

    Returns:
        A Prediction for one scan. A list for a list, a tuple, a folder of scans, a table or a Cohort. An iterator for
        any other iterable; the iterator reads one scan ahead.

    Raises:
        InvalidValueError: `scans` holds something that is no scan, `on_error` is unknown, or `brain` is the path of a
            missing mask. Or a clinical value is not a number, outside the range of the spec, or given twice. Or the
            coverage is not between 0 and 1, or the model has no calibration.
        UnknownNameError: There is no such model, brain mode or brain extractor, or the model does not use a clinical
            value.
        ScanError: A scan cannot be read, or the model cannot predict it.
        CohortError: A table of patients cannot be read.

    Examples:
        ```python
        prediction = ichprog.predict("perez2023.prognosis", "scan.nii.gz")
        print(prediction["prognosis"].probabilities)
        ```
    """
    brain, found, is_single = _resolve_inputs(scans, brain, on_error)
    loaded = load_model(model) if isinstance(model, str) else model
    detector = _load_detector(haemorrhage, loaded.spec)
    results = loaded.predict_iter(found, brain=brain, detector=detector, clinical=clinical, coverage=coverage)
    return _collect(_raise_or_keep(results, on_error), found, is_single)


@overload
def haemorrhage(  # type: ignore[overload-overlap]
    scan: "SingleScan", *, model: Model | str = ..., brain: "Brain" = ..., on_error: OnError = ...
) -> Haemorrhage: ...
@overload
def haemorrhage(
    scan: str | Path, *, model: Model | str = ..., brain: "Brain" = ..., on_error: OnError = ...
) -> Haemorrhage | Any: ...
@overload
def haemorrhage(  # type: ignore[overload-overlap]
    scan: "list[Any] | tuple[Any, ...] | Cohort",
    *,
    model: Model | str = ...,
    brain: "Brain" = ...,
    on_error: OnError = ...,
) -> list[Haemorrhage]: ...
@overload
def haemorrhage(
    scan: "Iterable[Any]", *, model: Model | str = ..., brain: "Brain" = ..., on_error: OnError = ...
) -> Iterator[Haemorrhage]: ...
def haemorrhage(
    scan: "ScanSource | Cohort | Iterable[Any]",
    *,
    model: Model | str = zoo.DETECTOR,
    brain: "Brain" = "auto",
    on_error: OnError = "raise",
) -> Haemorrhage | list[Haemorrhage] | Iterator[Haemorrhage]:
    """Find the haemorrhage in one scan or several: mask, volumes with intervals, kind and place.

    Args:
        scan: One scan or several, as in `predict`.
        model: A model with a task that has a mask, or its name as in `load_model`.
        brain: As in `predict`.
        on_error: As in `predict`; "record" records the error in the scan's Haemorrhage.

    Returns:
        A Haemorrhage for one scan. A list or an iterator for several scans, as in `predict`.

    Raises:
        InvalidValueError: The model finds no haemorrhages, or as in `predict`.
        UnknownNameError: There is no such model, brain mode or brain extractor.
        ScanError: A scan cannot be read, or the model cannot process it.
        CohortError: A table of patients cannot be read.

    Examples:
        ```python
        blood = ichprog.haemorrhage("scan.nii.gz")
        print(blood.is_present, blood.volume_ml["total"], blood.intervals_ml["total"])
        ```
    """
    brain, found, is_single = _resolve_inputs(scan, brain, on_error)
    loaded = load_model(model) if isinstance(model, str) else model
    detection.find_task(loaded.spec)
    return _collect(_raise_or_keep(loaded.haemorrhage_iter(found, brain=brain), on_error), found, is_single)


@overload
def explain(
    model: Model | str,
    scan: "ScanSource",
    *,
    task: str | None = ...,
    label: str | Mapping[str, str] | None = ...,
    method: str = ...,
    brain: "Brain" = ...,
    clinical: Mapping[str, Any] | None = ...,
    **options: Any,
) -> Saliency: ...
@overload
def explain(
    model: Model | str,
    scan: "ScanSource",
    *,
    task: str | Sequence[str] | None = ...,
    label: str | Mapping[str, str] | None = ...,
    method: str | Sequence[str] = ...,
    brain: "Brain" = ...,
    clinical: Mapping[str, Any] | None = ...,
    **options: Any,
) -> dict[tuple[str, str], Saliency]: ...
def explain(
    model: Model | str,
    scan: "ScanSource",
    *,
    task: str | Sequence[str] | None = None,
    label: str | Mapping[str, str] | None = None,
    method: str | Sequence[str] = "guided_backprop",
    brain: "Brain" = "auto",
    clinical: Mapping[str, Any] | None = None,
    **options: Any,
) -> Saliency | dict[tuple[str, str], Saliency]:
    """Compute saliency maps for the label of a task.

    A map explains the log-odds of the label's probability. For a task with two labels this is the logit. With several
    folds the map is the mean over the folds.

    Args:
        model: A model, or a name as in `load_model`.
        scan: One scan, as in `predict`.
        task: A task or several. By default the first task of the model.
        label: The label to explain, or a label for each task by name. By default the last, most severe label.
        method: A saliency method or several. `ichprog plugins` lists the methods.
        brain: As in `predict`.
        clinical: As in `predict`. The values stay fixed while the map is computed.
        **options: Options of the methods, such as `layer="features.transition3.conv"` for Grad-CAM. Each method gets
            the options that it declares.

    Returns:
        A Saliency. If `task` or `method` is a sequence: a dict keyed (task, method), computed from one forward pass of
        each fold.

    Raises:
        ScanError: The scan cannot be read, or the model cannot process it.
        UnknownNameError: There is no such task, label, method, layer, option, brain mode or brain extractor.
        PluginError: A method cannot be loaded, breaks its contract, refuses its options, or does not apply to the
            network.

    Examples:
        ```python
        ichprog.explain("perez2023.prognosis", "scan.nii.gz", method="grad_cam").save("map.nii.gz")
        ```
    """
    scan, brain = sources.find_one_scan(scan), resolve_brain(brain)
    loaded = load_model(model) if isinstance(model, str) else model
    spec = loaded.spec
    tasks = [spec.tasks[0]] if task is None else [spec.task(name) for name in _as_list(task)]
    labels = {each.name: _label_of(each, label, is_only=len(tasks) == 1) for each in tasks}
    known = loaded.clinical_values(scan, clinical)  # refuses wrong values before the scan is read
    values = None if spec.fusion is None else encode(spec, known)
    methods = _load_methods(_as_list(method), options)
    if all(each.requires == "features" for each in methods.values()):
        loaded.fold_runtimes[0].prefetch_explanation()  # in a thread, while torch is imported and the scan is read
    checked = loaded.load_scan(scan, brain=brain)
    grid = preprocessing.prepare(checked.hu, spec.input)
    maps, run = _mean_maps(loaded, grid, values, tasks, labels, methods)
    provenance = loaded.provenance(checked) | run | ({"clinical": known} if spec.clinical else {})
    geometry = checked.hu.shape, checked.source_shape, checked.source_affine  # the scan itself is large
    to_image = functools.partial(_to_image, *geometry, spec.input)
    read_scan = None if isinstance(scan, Scan) else functools.partial(_read_image, scan)
    find_brain = None
    if checked.brain is not None:  # an eighth of the memory of the mask
        find_brain = functools.partial(_brain_of, *geometry, np.packbits(checked.brain))
    results = {
        (name, how): Saliency(
            scan=checked.name,
            model=spec.name,
            task=name,
            label=labels[name],
            method=how,
            grid_map=values,
            empty=not values.any(),
            warnings=checked.warnings,
            provenance=provenance | {"options": methods[how].options, "grid_shape": list(values.shape)},
            to_image=to_image,
            read_scan=read_scan,
            find_brain=find_brain,
        )
        for (name, how), values in maps.items()
    }
    is_single = (task is None or isinstance(task, str)) and isinstance(method, str)
    return next(iter(results.values())) if is_single else results


def resolve_brain(brain: "Brain", *, folder: Path = Path()) -> "Brain":
    """Resolve a brain option to a brain mode, a brain extractor or a mask.

    Args:
        brain: A brain mode, the name of a brain-extractor plugin, or a mask: a path, a nibabel image or an array.
        folder: Folder at which the relative path of a mask starts.

    Returns:
        The brain mode as text, a `BrainExtractor`, a Path, an image or an array.

    Raises:
        UnknownNameError: There is no such brain mode or brain extractor.
        InvalidValueError: The mask file does not exist, or the option is of another type.
        PluginError: The brain extractor cannot be loaded.

    Examples:
        >>> resolve_brain("morphology").name
        'morphology'
    """
    if isinstance(brain, str) and brain not in get_args(BrainMode):
        extractors = registry.brain_extractors
        if any(entry.matches(brain) for entry in extractors.entries()):
            return BrainExtractor(brain, extractors.load(brain), extractors.entry(brain).owner)
        if not ((folder / brain).exists() or brain.endswith((".nii", ".nii.gz")) or len(Path(brain).parts) > 1):
            names = [*get_args(BrainMode), *extractors.names()]
            raise UnknownNameError("brain mode or extractor", brain, names, hint="A mask is given by its path.")
        brain = Path(brain)
    if isinstance(brain, Path):
        brain = folder / brain.expanduser()
        if not brain.is_file():
            raise InvalidValueError("brain mask", str(brain), "an existing file")
    if not (isinstance(brain, str | Path | BrainExtractor | np.ndarray) or hasattr(brain, "dataobj")):
        expected = "a brain mode, the name of a brain extractor, or a mask (path, nibabel image or array)"
        raise InvalidValueError("type of brain", type(brain).__name__, expected)
    return brain


def brain_mask(scan: "ScanSource", *, brain: "Brain" = "extract") -> "nib.Nifti1Image":
    """Return the brain mask of a scan.

    Args:
        scan: One scan, as in `predict`.
        brain: As in `predict`; "extract" by default.

    Returns:
        An image of 0 and 1 in the shape and affine of the source.

    Raises:
        ScanError: The scan or mask cannot be read, they do not match, or no brain is found.
        UnknownNameError: There is no such brain mode or brain extractor.

    Examples:
        ```python
        ichprog.brain_mask("head.nii.gz").to_filename("brain.nii.gz")
        ```
    """
    return scan_package.brain_mask(sources.scan_of(scan), brain=resolve_brain(brain))


def _to_image(
    shape: tuple[int, int, int],
    source_shape: tuple[int, ...],
    source_affine: np.ndarray,
    contract: InputSpec,
    grid_map: np.ndarray,
) -> "nib.Nifti1Image":
    return scan_package.source_image(preprocessing.to_scan(grid_map, shape, contract), source_shape, source_affine)


def _read_image(source: "ScanSource") -> "nib.Nifti1Image":
    scan = scan_package.read(sources.scan_of(source))
    return scan.image(scan.hu)


def _brain_of(
    shape: tuple[int, int, int], source_shape: tuple[int, ...], source_affine: np.ndarray, packed: np.ndarray
) -> np.ndarray:
    mask = np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape)
    return np.asarray(scan_package.source_image(mask, source_shape, source_affine).dataobj) > 0


def _resolve_inputs(
    scans: Any, brain: "Brain", on_error: OnError
) -> "tuple[Brain, list[ScanSource] | Iterator[ScanSource], bool]":
    """Return the resolved brain option, the scans, and whether they are one scan by their kind."""
    resolved = resolve_brain(brain)
    if on_error not in ("raise", "record"):
        raise InvalidValueError("on_error", on_error, "'raise' or 'record'")
    return resolved, *sources.resolve(scans)


def _load_detector(haemorrhage: bool | str | Model, spec: ModelSpec) -> Model | None:
    """Return the model that finds haemorrhages, or None if none is requested."""
    if haemorrhage is False:
        return None
    name = zoo.DETECTOR if haemorrhage is True else haemorrhage
    detector = load_model(name) if isinstance(name, str) else name
    _check_detector(detector.spec, spec)
    return detector


def _check_detector(detector: ModelSpec, spec: ModelSpec) -> None:
    """Refuse a model that finds no haemorrhages, or that needs another scan than the outcome model."""
    detection.find_task(detector)
    needed = spec.input.brain_only
    if detector.input.brain_only != needed:
        expected = f"a model with input.brain_only {str(needed).lower()}, as that of {spec.name}"
        hint = "Run ichprog.haemorrhage on its own."
        raise InvalidValueError("model for haemorrhages", detector.name, expected, hint)


def _raise_or_keep(results: "Iterator[tuple[_Result, Scan | ScanError]]", on_error: OnError) -> Iterator[_Result]:
    """Yield each result, or raise the error of its scan."""
    for result, scan in results:
        if isinstance(scan, ScanError) and on_error == "raise":
            raise scan
        yield result


def _collect(
    results: Iterator[_Result], found: "list[ScanSource] | Iterator[ScanSource]", is_single: bool
) -> _Result | list[_Result] | Iterator[_Result]:
    """Return the only result, a list for a list of scans, or an iterator."""
    if is_single:
        return next(results)
    return list(results) if isinstance(found, list) else results


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Yield an executor with one thread, which ends after the context when its current task is done."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        # Do not wait: a garbage collection in the thread may close the generator that uses it.
        executor.shutdown(wait=False, cancel_futures=True)


def _prefetch(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, while a thread works on the next item."""
    with _thread("ichprog-read") as executor:
        pending: list[tuple[_Item, Future[_Result]]] = []
        for item in items:
            pending.append((item, executor.submit(work, item)))
            if len(pending) > 1:
                current, future = pending.pop(0)
                yield current, future.result()
        for current, future in pending:
            yield current, future.result()


@functools.cache
def _versions() -> dict[str, str]:
    return {"python": python_version(), **{name: version(name) for name in DEPENDENCIES}}


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


def _mean_over_folds(
    spec: ModelSpec, task: Task, outputs: Sequence[TaskOutput], geometry: "Geometry", known: Mapping[str, float]
) -> TaskPrediction:
    """Return the prediction of one task from the outputs of all folds.

    Args:
        spec: The specification of the model.
        task: The task.
        outputs: Output of each fold.
        geometry: Shape of the scan in LPS order, shape of the source, and affine of the source.
        known: Known clinical values.
    """
    contract = spec.input
    probabilities = np.stack([output.probabilities[0] for output in outputs]).astype(float)
    mean = probabilities.mean(0)
    if task.combinations:
        (mean,), probabilities = (combine(spec, task, each, known) for each in (mean[None], probabilities))
    means = dict(zip(task.labels, mean.tolist(), strict=True))
    std = None
    if len(outputs) > 1:
        std = dict(zip(task.labels, probabilities.std(0, ddof=1).tolist(), strict=True))
    logits = np.mean([output.logits[0] for output in outputs], axis=0, dtype=float)
    segmentation = None
    if task.mask is not None:
        voxels = np.mean([output.voxels[0] for output in outputs], axis=0)  # type: ignore[index]
        slices = np.mean([output.slices[0] for output in outputs], axis=0)  # type: ignore[index]
        present = np.mean([output.regions[0] for output in outputs], axis=0)  # type: ignore[index]
        in_scan = preprocessing.slices_to_scan(slices, geometry[0][2], contract)
        segmentation = Segmentation(
            task.mask.regions,
            voxels,
            tuple(scan_package.source_slices(in_scan, geometry[2]).tolist()),
            dict(zip(task.mask.regions, present.tolist(), strict=True)),
            functools.partial(_mask_image, *geometry, contract),
        )
    return TaskPrediction(task.decide(means), means, tuple(logits.tolist()), std, segmentation)


def _mask_image(
    shape: tuple[int, int, int],
    source_shape: tuple[int, ...],
    source_affine: np.ndarray,
    contract: InputSpec,
    probabilities: np.ndarray,
) -> "nib.Nifti1Image":
    """Return the most probable region of each voxel, 0 if no region is more probable than all together."""
    inside = preprocessing.to_scan(1 - probabilities[0], shape, contract) > 0.5
    mask = np.zeros(shape, np.uint8)
    if inside.any():
        each = [preprocessing.to_scan(values, shape, contract)[inside] for values in probabilities[1:]]
        mask[inside] = 1 + np.argmax(each, axis=0)
    return scan_package.source_image(mask, source_shape, source_affine)


def _label_of(task: Task, label: str | Mapping[str, str] | None, *, is_only: bool) -> str:
    """Return the label of a task to explain."""
    if isinstance(label, str) and not is_only:
        raise UnknownNameError("label of several tasks", label, [], hint="Give a label for each task: {task: label}.")
    chosen = label if isinstance(label, str) else (label or {}).get(task.name, task.labels[-1])
    if chosen not in task.labels:
        raise UnknownNameError(f"label of {task.name}", chosen, task.labels)
    return chosen


class _Method(NamedTuple):
    """A saliency method with its options."""

    attribute: Callable[..., Any]
    options: dict[str, Any]
    requires: str
    takes_layer: bool


def _load_methods(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, _Method]:
    """Load saliency methods by name and give each the options that it declares."""
    from ichprog.saliency import requirement_of

    methods, declared = {}, set()
    for name in names:
        attribute = registry.saliency.load(name)
        if not callable(attribute):
            raise PluginError(f"saliency method {name!r} breaks its contract: it is not a function.")
        try:
            requires = requirement_of(attribute)
        except InvalidValueError as error:
            raise PluginError(f"saliency method {name!r} breaks its contract: {error}") from error
        own = {p.name for p in inspect.signature(attribute).parameters.values() if p.kind is p.KEYWORD_ONLY}
        chosen = {key: value for key, value in options.items() if key in own}
        methods[name] = _Method(attribute, chosen, requires, "layer" in own)
        declared |= own
    for unknown in options.keys() - declared:
        raise UnknownNameError(f"option of {', '.join(names)}", unknown, sorted(declared))
    return methods


def _mean_maps(
    model: Model,
    grid: np.ndarray,
    clinical: np.ndarray | None,
    tasks: Sequence[Task],
    labels: Mapping[str, str],
    methods: Mapping[str, _Method],
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, Any]]:
    """Return the mean map over folds for each task and method, and the provenance of the run."""
    maps: dict[tuple[str, str], np.ndarray] = {}
    run: dict[str, Any] = {}
    for runtime in model.fold_runtimes:
        fold_maps, run = _maps_of_fold(runtime, grid, clinical, tasks, labels, methods)
        if len(model.fold_runtimes) > 1:
            runtime.release_memory()  # so that many folds need no more memory than one
        for key, values in fold_maps.items():
            maps[key] = maps.get(key, np.float32(0)) + values / np.float32(len(model.fold_runtimes))
    return maps, run


def _maps_of_fold(
    runtime: Runtime,
    grid: np.ndarray,
    clinical: np.ndarray | None,
    tasks: Sequence[Task],
    labels: Mapping[str, str],
    methods: Mapping[str, _Method],
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, Any]]:
    """Return the map of one fold for each task and method from one forward pass, and the provenance of the run."""
    from ichprog.saliency import Score

    maps: dict[tuple[str, str], np.ndarray] = {}
    layers = {method.options.get("layer") for method in methods.values() if method.takes_layer}
    needs_network = any(method.requires == "network" for method in methods.values())
    with runtime.explanation_session(grid, layers, needs_network=needs_network, clinical=clinical) as shared:
        for task in tasks:
            score = Score(shared, _log_odds(shared.network, task.name, task.labels.index(labels[task.name])))
            for name, method in methods.items():
                maps[task.name, name] = _map_of(name, method, score)
        run = {"runtime": shared.runtime}
        if shared.fallback_reason is not None:
            run["fallback_reason"] = shared.fallback_reason
        return maps, run


def _map_of(name: str, method: _Method, score: "Score") -> np.ndarray:
    """Return the map of one saliency method as float32."""
    import torch

    shared = score.shared
    try:
        with shared.autocast():
            result = torch.as_tensor(method.attribute(score, shared.grid, shared.network, **method.options)).detach()
    except ValueError as error:
        raise PluginError(f"saliency method {name!r} refuses its options {method.options}: {error}") from error
    if result.ndim != 3 or not bool(result.isfinite().all()):
        problem = f"shape {tuple(result.shape)}" if result.ndim != 3 else "values that are not finite"
        raise PluginError(
            f"saliency method {name!r} breaks its contract: a map is (D, H, W) of finite numbers, and this map has "
            f"{problem}."
        )
    values: np.ndarray = result.float().cpu().numpy()
    return values


def _log_odds(network: Any, task: str, label: int) -> "Callable[[dict[str, torch.Tensor]], torch.Tensor]":
    """Return the function from a network's logits to the log-odds of a label's probability."""
    import torch

    def score(logits: "dict[str, torch.Tensor]") -> "torch.Tensor":
        # double precision keeps probabilities close to one apart from one
        probabilities = network.heads[task].probabilities(logits[task].to("cpu", torch.float64))
        return cast("torch.Tensor", probabilities[:, label].logit(eps=1e-15))

    return score
