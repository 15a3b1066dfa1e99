"""Read a study file: `study.toml` becomes a frozen `Study`.

Reading is strict: a key that is unknown, missing or of the wrong type is an error that names the file and the key.
Relative paths start at the folder of the file.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ichprog import schema
from ichprog.errors import InvalidValueError, SpecError, UnknownNameError
from ichprog.schema import check_name, invalid_value
from ichprog.spec import Task
from ichprog.study.study_file import (
    BaselineFile,
    BaselineKind,
    Budget,
    LearningCurveFile,
    Simulated,
    StudyFile,
    template,
)
from ichprog.study.variants import Variant, build_protocol, build_variant
from ichprog.train import Protocol

_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Baseline:
    """A comparison model that needs no image of its own.

    Attributes:
        name: Name in tables.
        kind: "majority" predicts the share of each label. "logistic", "tree", "forest" and "network" are fitted to
            columns of the cohort. "fusion" is fitted to columns and the predictions of a variant.
        columns: Numeric columns of the cohort.
        variant: Variant whose predictions "fusion" uses.
        task: Task that is predicted. It has two labels.
        optional: Whether the baseline is left out if the cohort lacks one of the columns. Otherwise that is an error.
    """

    name: str
    kind: BaselineKind
    columns: tuple[str, ...]
    variant: str | None
    task: str
    optional: bool


@dataclass(frozen=True)
class Run:
    """One training of a variant in all folds.

    Attributes:
        variant: The variant.
        size: Number of patients of each training part that are used for a learning curve, or None for all.
        budget: What a learning-curve run has in common with the training on all patients: "epochs" or "steps".
        seed: Random seed of the training, or None for that of the variant's protocol.
        draw: Number of the draw of the training patients, from 0. Draw 0 uses the first patients.
    """

    variant: Variant
    size: int | None = None
    budget: Budget = "epochs"
    seed: int | None = None
    draw: int = 0

    @property
    def group(self) -> str:
        """Return the name that the repetitions of a run with other seeds or draws have in common, NAME[@SIZE]."""
        size = "" if self.size is None else f"@{self.size}"
        return self.variant.name + size + ("" if self.budget == "epochs" else f"@{self.budget}")

    @property
    def name(self) -> str:
        """Return the name of the run: its group, and the seed or the draw of a repetition."""
        seed = "" if self.seed is None else f"@seed{self.seed}"
        return self.group + seed + (f"@draw{self.draw}" if self.draw else "")


@dataclass(frozen=True)
class Study:
    """A comparison of variants and baselines on the same folds of one cohort.

    Attributes:
        name: Name of the study.
        source: File that the study was read from.
        cohort: Tables of patients, used together. Empty if the patients are simulated.
        simulated: Simulated patients, or None.
        folds: Number of folds, the same for all variants.
        stratify_by: Task by whose label the folds are stratified. Patients without the label only train.
        brain: "auto", "extract" or "given", the name of a brain extractor, or the path of a mask.
        device: Device that trains the variants.
        variants: Models that are trained.
        baselines: Comparison models without an image.
        seeds: Random seeds with each of which every variant is trained; none if only with its protocol's seed.
        curve_sizes: Numbers of training patients of the learning curve.
        curve_variants: Variants with a learning curve.
        curve_budgets: What is equal at all sizes of a learning curve, one curve for each.
        curve_draws: How often the patients of each size are drawn.
        n_bootstrap: Number of bootstrap resamples.
        bootstrap_seed: Random seed of the bootstrap.
        coverage: Share of patients whose label a conformal set must contain.
        subgroups: Columns by which results are also reported for groups of patients, each with the bounds between its
            groups. Without bounds, each value is a group.
        correlations: Columns whose correlation with the outcome is reported.
        readers: Table of readers' calls, or None.
        saliency: Saliency methods whose maps are measured for variants that list no methods of their own.
    """

    name: str
    source: Path = field(compare=False)
    cohort: tuple[Path, ...]
    simulated: Simulated | None
    folds: int
    stratify_by: str
    brain: str | Path
    device: str
    variants: tuple[Variant, ...]
    baselines: tuple[Baseline, ...]
    seeds: tuple[int, ...]
    curve_sizes: tuple[int, ...]
    curve_variants: tuple[str, ...]
    curve_budgets: tuple[Budget, ...]
    curve_draws: int
    n_bootstrap: int
    bootstrap_seed: int
    coverage: float
    subgroups: Mapping[str, tuple[float, ...]]
    correlations: tuple[str, ...]
    readers: Path | None
    saliency: tuple[str, ...]

    @property
    def protocol(self) -> Protocol:
        """Return the protocol of the first variant, whose fold fields are those of all variants."""
        return self.variants[0].protocol

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Return everything that is trained, by name: each variant, its repetitions, and its learning-curve runs.

        The first seed is that of the run without a seed in its name. The draws of a learning curve take the seeds in
        turn.
        """
        repeats = list(self.seeds[1:])
        full = [Run(variant, seed=seed) for variant in self.variants for seed in (None, *repeats)]
        curve = [
            Run(self.variant(name), size, budget, seed=None, draw=draw)
            for name in self.curve_variants
            for budget in self.curve_budgets
            for size in self.curve_sizes
            for draw in range(self.curve_draws)
        ]
        return {run.name: run for run in (*full, *curve)}

    def seed_of(self, run: Run) -> int:
        """Return the random seed that a run is trained with.

        Args:
            run: The run.
        """
        if run.seed is not None:
            return run.seed
        seeds = self.seeds or (run.variant.protocol.seed,)
        return seeds[run.draw % len(seeds)]

    def start_of(self, run: Run) -> str | None:
        """Return the run from whose backbone a run starts, or None.

        It has the same size, seed and draw, if the study has such a run. Otherwise it is the training on all patients.

        Args:
            run: The run.
        """
        if run.variant.start_from is None:
            return None
        like = replace(run, variant=self.variant(run.variant.start_from))
        return like.name if like.name in self.runs else like.variant.name

    def repetitions(self, run: str) -> list[str]:
        """Return the runs that differ from a run in seed or draw only, the first one first; itself for a baseline.

        Args:
            run: Name of a run or a baseline.
        """
        if run not in self.runs:
            return [run]
        return [name for name, each in self.runs.items() if each.group == self.runs[run].group]

    def is_repetition(self, run: str) -> bool:
        """Return whether a run repeats another one with another seed or draw.

        Args:
            run: Name of a run or a baseline.
        """
        return run in self.runs and run != self.runs[run].group

    @property
    def main_task(self) -> Task:
        """Return the task by whose label the folds are stratified."""
        return self.task(self.stratify_by)

    def is_curve_run(self, run: str) -> bool:
        """Return whether a run is trained on fewer patients for a learning curve.

        Args:
            run: Name of a run or a baseline.
        """
        return run in self.runs and self.runs[run].size is not None

    def variant(self, name: str) -> Variant:
        """Return a variant by its name.

        Args:
            name: Name of the variant.

        Raises:
            UnknownNameError: The study has no variant of this name.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise UnknownNameError(f"variant of {self.name}", name, [variant.name for variant in self.variants])

    def task(self, name: str) -> Task:
        """Return a task as the first variant that has the task describes it.

        Args:
            name: Name of the task.

        Raises:
            UnknownNameError: No variant has the task.
        """
        tasks = {task.name: task for variant in reversed(self.variants) for task in variant.spec.tasks}
        if name not in tasks:
            raise UnknownNameError(f"task of {self.name}", name, tasks)
        return tasks[name]

    @classmethod
    def read(cls, path: str | Path) -> "Study":
        """Read a study file.

        Args:
            path: TOML file.

        Raises:
            SpecError: The file cannot be read, or a key is unknown, missing, of the wrong type or invalid.
            UnknownNameError: The zoo has no such model.

        Examples:
            ```python
            study = Study.read("study.toml")
            print([variant.name for variant in study.variants])
            ```
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"{path}: cannot be read as TOML: {error}") from error
        try:
            return _build_study(schema.read(StudyFile, data), path)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from None


def _build_study(file: StudyFile, path: Path) -> Study:
    """Check the rules that types do not express, and resolve names and paths."""
    _check_values(file)
    protocol = build_protocol(file.protocol)
    variants = tuple(
        build_variant(table, f"variant[{index}]", path.parent, protocol, file.saliency)
        for index, table in enumerate(file.variant)
    )
    _check_starts(variants)
    study = Study(
        name=file.name,
        source=path,
        cohort=tuple(path.parent / table for table in file.cohort),
        simulated=file.simulated,
        folds=file.folds,
        stratify_by=file.stratify_by or variants[0].spec.tasks[0].name,
        brain=_locate_brain(file.brain, path.parent),
        device=file.device,
        variants=variants,
        baselines=(),
        seeds=file.seeds,
        curve_sizes=(),
        curve_variants=(),
        curve_budgets=(),
        curve_draws=1,
        n_bootstrap=file.n_bootstrap,
        bootstrap_seed=file.bootstrap_seed,
        coverage=file.coverage,
        subgroups=file.subgroups,
        correlations=file.correlations,
        readers=path.parent / file.readers if file.readers else None,
        saliency=file.saliency,
    )
    check_name("stratify_by", "task", study.stratify_by, _task_names(variants))
    study = _add_learning_curve(study, file.learning_curve)
    tables = _default_baselines() if file.baseline is None else file.baseline
    baselines = tuple(_build_baseline(table, f"baseline[{index}]", study) for index, table in enumerate(tables))
    _check_unique([*(variant.name for variant in variants), *(baseline.name for baseline in baselines)])
    return replace(study, baselines=baselines)


def _check_starts(variants: Sequence[Variant]) -> None:
    """Check that a variant starts from an earlier one with the same backbone and input."""
    for index, variant in enumerate(variants):
        where = f"variant[{index}]"
        if variant.start_from is None:
            if variant.protocol.freeze_backbone:
                raise SpecError(f"{where}.protocol.freeze_backbone: needs start_from, the variant to start from.")
            continue
        earlier = {each.name: each for each in variants[:index]}
        check_name(f"{where}.start_from", "earlier variant", variant.start_from, earlier)
        other = earlier[variant.start_from].spec
        if (other.backbone, other.input) != (variant.spec.backbone, variant.spec.input):
            raise SpecError(f"{where}.start_from: {variant.start_from} has another backbone or input.")


def _check_values(file: StudyFile) -> None:
    if bool(file.cohort) == bool(file.simulated):
        raise SpecError("Expected either cohort, a list of tables, or [simulated]. Give one of them.")
    if file.simulated:
        try:
            file.simulated.realism  # noqa: B018  # raises an error if an option is wrong
        except (InvalidValueError, UnknownNameError) as error:
            raise SpecError(f"simulated: {error}") from None
    if file.folds < 2:
        raise invalid_value("folds", file.folds, "2 or more: one to test on, the others to train on")
    if not 0 < file.coverage < 1:
        raise invalid_value("coverage", file.coverage, "a number between 0 and 1")
    if not file.variant:
        raise invalid_value("variant", [], "at least one [[variant]] table")
    if len(set(file.seeds)) < len(file.seeds) or min(file.seeds, default=0) < 0:
        raise invalid_value("seeds", list(file.seeds), "different numbers, each 0 or more")
    if file.n_bootstrap < 1:
        raise invalid_value("n_bootstrap", file.n_bootstrap, "1 or more")
    if file.bootstrap_seed < 0:
        raise invalid_value("bootstrap_seed", file.bootstrap_seed, "0 or more")


def _locate_brain(brain: str, folder: Path) -> str | Path:
    """Return a brain mode or the name of an extractor as it is, and a mask as a path."""
    from ichprog.model import resolve_brain

    try:
        resolved = resolve_brain(brain, folder=folder)
    except (InvalidValueError, UnknownNameError) as error:
        raise SpecError(f"brain: {error}") from None
    return resolved if isinstance(resolved, Path) else brain  # a worker of the study loads the extractor itself


def _default_baselines() -> tuple[BaselineFile, ...]:
    """Return the baselines of the default template that depend on no variant, each optional."""
    tables = tomllib.loads(template())["baseline"]
    return tuple(
        replace(schema.read(BaselineFile, table, "baseline"), optional=True)
        for table in tables
        if "variant" not in table
    )


def _build_baseline(table: BaselineFile, where: str, study: Study) -> Baseline:
    kind, columns, variant = table.kind, table.columns, table.variant
    task = table.task or study.stratify_by
    check_name(f"{where}.task", "task", task, _task_names(study.variants))
    if (count := len(study.task(task).labels)) != 2:
        raise SpecError(f"{where}.task: {task} has {count} labels. Expected a task with two labels.")
    if kind == "majority" and (columns or variant):
        raise SpecError(f"{where}: majority takes no columns and no variant. Remove them.")
    if kind not in ("majority", "fusion") and (not columns or variant):
        raise SpecError(f"{where}: {kind} takes at least one column and no variant.")
    if kind == "fusion":
        if not variant or not columns:
            raise SpecError(f"{where}: fusion takes a variant and at least one column.")
        check_name(f"{where}.variant", "variant", variant, [one.name for one in study.variants])
        check_name(f"{where}.task", "task", task, [one.name for one in study.variant(variant).spec.tasks])
    return Baseline(table.name, kind, columns, variant, task, table.optional)


def _add_learning_curve(study: Study, table: LearningCurveFile | None) -> Study:
    if table is None:
        return study
    names = [variant.name for variant in study.variants]
    chosen = names if table.variants is None else table.variants
    for name in chosen:
        check_name("learning_curve.variants", "variant", name, names)
    sizes = table.sizes
    if not sizes or min(sizes) < 2 or len(set(sizes)) < len(sizes):
        raise invalid_value("learning_curve.sizes", list(sizes), "different numbers, each 2 or more")
    if not table.equal or len(set(table.equal)) < len(table.equal):
        raise invalid_value("learning_curve.equal", list(table.equal), '"epochs", "steps" or both')
    if table.draws < 1:
        raise invalid_value("learning_curve.draws", table.draws, "1 or more")
    return replace(
        study,
        curve_sizes=tuple(sorted(sizes)),
        curve_variants=tuple(chosen),
        curve_budgets=table.equal,
        curve_draws=table.draws,
    )


def _task_names(variants: Iterable[Variant]) -> list[str]:
    return [task.name for variant in variants for task in variant.spec.tasks]


def _check_unique(names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise invalid_value("name", name, "letters, digits and . _ + - with a letter or digit at the start")
        if names.count(name) > 1:
            raise SpecError(f"Duplicate name {name!r}. Each variant and baseline needs a name of its own.")
