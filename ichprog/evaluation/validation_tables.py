"""Describe recalibration, decision curves and operating points, for the report and for the command line."""

from collections.abc import Iterator, Sequence

from ichprog.evaluation.validation import RECALIBRATED_METRICS, EventValidation, Row, better_thresholds

METHOD_NAMES = {"intercept": "intercept", "intercept_and_slope": "intercept and slope"}


def recalibration_rows(task: str, events: Sequence[EventValidation]) -> Iterator[Row]:
    """Yield the calibration of each event before and after recalibration.

    Args:
        task: Name of the task.
        events: Figures of its events.
    """
    for event in events:
        named = {"task": task, "event": event.event}
        metrics = {name: event.metrics[name] for name in RECALIBRATED_METRICS}
        yield {**named, "probabilities": "as predicted", "needed": None, **metrics}
        for each in event.recalibrations:
            largest = max((row["patients"] for row in each.learning_curve), default=0)
            needed = f"not reached with {largest}" if largest else "too few patients to say"
            needed = needed if each.patients_needed is None else str(each.patients_needed)
            yield {**named, "probabilities": METHOD_NAMES[each.method], "needed": needed, **each.metrics}


def operating_rows(task: str, events: Sequence[EventValidation]) -> Iterator[Row]:
    """Yield the rates of each operating point, on the same patients and cross-fitted.

    Args:
        task: Name of the task.
        events: Figures of its events.
    """
    for event in events:
        for point in event.operating_points:
            required = {"task": task, "event": event.event, "required": f"{point['rate']} {point['required']:g}"}
            threshold = {"threshold": f"{point['threshold']:.3f}"}
            yield {**required, **threshold, "patients": "the same patients", **point["same_patients"]}
            if fitted := point["cross_fitted"]:
                threshold = {"threshold": f"{fitted['threshold_low']:.3f} to {fitted['threshold_high']:.3f}"}
                yield {**required, **threshold, "patients": "other patients (cross-fitted)", **fitted}


def decision_sentence(event: EventValidation) -> str:
    """Return at which thresholds acting by the model is better than acting for all patients and for none.

    Args:
        event: Figures of an event.
    """
    ranges = [
        f"{first:g}" if first == last else f"{first:g} to {last:g}"
        for first, last in better_thresholds(event.decision_curve)
    ]
    if not ranges:
        return "acting by the model is at no threshold better than acting for all patients and for none"
    return f"acting by the model is better than acting for all and for none at thresholds {', '.join(ranges)}"
