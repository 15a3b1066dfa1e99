"""Section that answers the question of the study: the main comparison, in words and as a forest plot."""

from collections.abc import Iterator

from ichprog.metrics import PRIMARY
from ichprog.reporting import figures
from ichprog.reporting.html import Section
from ichprog.reporting.tables import format_value, readable_name
from ichprog.study.analysis import Row
from ichprog.study.sections.context import ReportContext, join_interval


def summary(context: ReportContext) -> Iterator[Section]:
    """Yield the question, the answer with its interval, and what it means, if variants can be compared."""
    main, trained = context.study.main_task, context.analyses_of(context.study.main_task)
    rows = [
        join_interval(row, "difference")
        for row in context.results.comparisons
        if row["task"] == main.name and row["metric"] == PRIMARY and row["variant"] in trained
    ]
    contenders = [row for row in rows if row["variant"] in context.study.runs]
    if not contenders:
        return
    # among variants with equally many tasks the first of the study, because the best one would be chosen by its result
    chosen = max(contenders, key=lambda row: len(context.study.runs[row["variant"]].variant.spec.tasks))
    reference, label = chosen["reference"], readable_name(PRIMARY)
    differences = {row["variant"]: row["difference"] for row in rows if row["reference"] == reference}
    drawn = figures.forest(differences, f"difference in {label} from {reference}", line=0.0)
    caption = f"{main.name}: difference in {label} from {reference}, with 95 % intervals. Right of the line is better."
    picture = context.write_figure("summary", drawn, caption)
    text = [_question(context, chosen), _answer(context, chosen), *_without_image(context), _meaning(context, chosen)]
    yield Section("Summary", text, [], [picture])


def _is_multi_task(context: ReportContext, row: Row) -> bool:
    tasks = [len(context.study.runs[row[side]].variant.spec.tasks) for side in ("variant", "reference")]
    return tasks[0] > 1 and tasks[1] == 1


def _question(context: ReportContext, row: Row) -> str:
    main, variant = context.study.main_task, row["variant"]
    if _is_multi_task(context, row):
        tasks = context.study.runs[variant].variant.spec.tasks
        others = " and ".join(task.name for task in tasks if task.name != main.name)
        return (
            f'Question: does a network that also learns {others} ("{variant}") predict {main.name} better than one '
            f'that learns {main.name} alone ("{row["reference"]}")?'
        )
    return f'Question: does "{variant}" predict {main.name} better than "{row["reference"]}"?'


def _answer(context: ReportContext, row: Row) -> str:
    difference, label = row["difference"], readable_name(PRIMARY)
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        verdict = "The study cannot tell"
    elif low > 0:
        verdict = "Yes"
    elif high < 0:
        verdict = "No, it is worse"
    else:
        verdict = "The study cannot tell, because the interval includes zero"
    values = [
        context.results.metrics[row[side]][context.study.stratify_by][PRIMARY] for side in ("variant", "reference")
    ]
    seeds = f", {len(context.study.seeds)} trainings of each variant" if len(context.study.seeds) > 1 else ""
    return (
        f'Answer: {verdict}. The {label} is {format_value(values[0])} for "{row["variant"]}" and '
        f'{format_value(values[1])} for "{row["reference"]}"; '
        f"the difference is {format_value(difference)} "
        f"({row['n']} patients, {context.study.folds} folds{seeds})."
    )


def _without_image(context: ReportContext) -> Iterator[str]:
    """Yield a sentence about the best baseline that needs no image."""
    main, metrics = context.study.stratify_by, context.results.metrics
    values = {
        baseline.name: metrics[baseline.name][main][PRIMARY]
        for baseline in context.study.baselines
        if baseline.task == main and baseline.variant is None and main in metrics.get(baseline.name, {})
    }
    known = {name: interval for name, interval in values.items() if interval["value"] is not None}
    if known:
        best = max(known, key=lambda name: known[name]["value"] or 0.0)
        columns = next(each.columns for each in context.study.baselines if each.name == best)
        source = " and ".join(columns) or "the share of each label alone"
        yield f'Without the image, "{best}" reaches {format_value(known[best])} from {source}.'


def _meaning(context: ReportContext, row: Row) -> str:
    """Return what the metric means for patients."""
    main = context.study.main_task
    value = context.results.metrics[row["variant"]][main.name][PRIMARY]["value"]
    if main.kind != "binary" or value is None:
        return "An interval that includes zero does not show that two models are alike. It may only be too wide."
    return (
        f"In plain words: take one patient with the label {main.labels[-1]} and one with {main.labels[0]}. "
        f"The model gives the first one the higher probability of {main.labels[-1]} in {100 * value:.0f} of 100 "
        "such pairs. Tossing a coin would be right in 50. An interval that includes zero does not show that two models "
        "are alike. It may only be too wide."
    )
