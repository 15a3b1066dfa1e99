"""The results of a prediction as a structured report, by the template TID 1500."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ichprog.export.dicom.identity import (
    MANUFACTURER,
    SCHEME,
    ObjectContext,
    clean_text,
    private_code,
    software_versions,
)
from ichprog.export.dicom.images import all_warnings, segments_with_frames
from ichprog.results import Haemorrhage, Prediction, TaskPrediction

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from highdicom.sr import ComprehensiveSR, Measurement
    from pydicom.dataset import Dataset

_SIDES = {"left": "Left", "right": "Right", "both": "Bilateral"}  # of pydicom's SNOMED codes
_MAX_TEXT = 1024


def structured_report(context: ObjectContext, segmentations: "Mapping[str, Segmentation]") -> "ComprehensiveSR":
    """Return the results as a structured report that refers to the series and to the masks.

    Args:
        context: What the objects of the prediction share.
        segmentations: The masks by name, "haemorrhage" and "brain"; one that is absent is not referred to.
    """
    import highdicom as hd
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.sr.codedict import codes

    prediction = context.prediction
    groups = [_task_group(context, name, task) for name, task in prediction.tasks.items()]
    if prediction.haemorrhage is not None:
        groups += _haemorrhage_groups(context, prediction.haemorrhage, segmentations.get("haemorrhage"))
    groups.append(_remarks_group(context))
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=context.uid("device"), name=MANUFACTURER, manufacturer_name=MANUFACTURER,
        model_name=clean_text(prediction.model, 64),
    )  # fmt: skip
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(
            observer_device_context=hd.sr.ObserverContext(codes.DCM.Device, device)
        ),
        procedure_reported=codes.SCT.ComputedTomographyOfHead,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    kind = ":".join(["report", *segmentations])
    data = hd.sr.ComprehensiveSR(
        evidence=[*context.headers, *segmentations.values()],
        content=content,
        is_complete=True,
        is_final=False,
        coding_schemes=[
            CodingSchemeIdentificationItem(SCHEME, name="ichprog", responsible_organization="The ichprog developers")
        ],
        **context.attributes(kind, "Results report", 9003),
    )
    return context.finish(data, kind)


def _task_group(context: ObjectContext, name: str, task: TaskPrediction) -> Any:
    """Return the probabilities of one task, raw and calibrated, and its label."""
    measured: list[Measurement] = []
    for label, value in task.probabilities.items():
        measured.append(_probability((name, label), f"Probability of {name} {label}", value))
        if task.std is not None:
            meaning = f"SD between folds of {name} {label}"
            measured.append(_probability((name, label, "sd"), meaning, task.std[label]))
    for label, value in (task.calibrated or {}).items():
        meaning = f"Calibrated probability of {name} {label}"
        measured.append(_probability((name, label, "calibrated"), meaning, value))
    remarks = []
    if task.label_set is not None:
        coverage = context.prediction.coverage or 0.0
        remarks.append(f"Labels at a coverage of {coverage:.0%}: {' or '.join(task.label_set)}")
    if name in context.prediction.abstained:
        remarks.append(f"The model abstains: {context.prediction.abstained[name]}")
    label = private_code((name, task.label), f"{name}: {task.label}")
    evaluations = [(private_code((name, "label"), f"Predicted label of {name}"), label)]
    return _group(context, name, context.prediction, private_code((name,), name), measured, evaluations, remarks)


def _haemorrhage_groups(
    context: ObjectContext, blood: Haemorrhage, segmentation: "Segmentation | None"
) -> Sequence[Any]:
    """Return a haemorrhage, and each of its regions with the segment of the mask."""
    from pydicom.sr.codedict import codes

    found = codes.SCT.IntracranialHemorrhage
    measured = [_measurement(codes.DCM.Probability, blood.probability), *_volumes(blood, "total")]
    for name, value in (("intraventricular", blood.intraventricular), ("infratentorial", blood.infratentorial)):
        if value is not None:
            measured.append(_probability(("haemorrhage", name), f"Probability of {name} haemorrhage", value))
    if blood.midline_shift_mm is not None:
        concept = private_code(("midline_shift",), "Midline shift")
        measured.append(_measurement(concept, blood.midline_shift_mm, codes.UCUM.Millimeter))
    presence = codes.SCT.Present if blood.is_present else codes.SCT.Absent
    evaluations = [(private_code(("haemorrhage", "presence"), "Presence of a haemorrhage"), presence)]
    if blood.side is not None:
        standard = _SIDES.get(blood.side)
        side = private_code(("side", blood.side), blood.side) if standard is None else getattr(codes.SCT, standard)
        evaluations.append((codes.SCT.Laterality, side))
    if blood.location is not None:
        place = private_code(("location", blood.location), blood.location)
        evaluations.append((private_code(("location",), "Location of the haemorrhage"), place))
    groups = [_group(context, "haemorrhage", blood.prediction, found, measured, evaluations, list(blood.limits))]
    for region, number in blood.regions.items():
        groups.append(_region_group(context, blood, region, number, segmentation))
    return groups


def _region_group(
    context: ObjectContext, blood: Haemorrhage, region: str, number: int, segmentation: "Segmentation | None"
) -> Any:
    import highdicom as hd

    finding = private_code(("haemorrhage", "region", region), f"{region} haemorrhage")
    if segmentation is None or number not in segments_with_frames(segmentation):
        return _group(context, region, blood.prediction, finding, _volumes(blood, region), [], [])
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(context.uid("segment", region), clean_text(region, 64)),
        referenced_segment=hd.sr.ReferencedSegment.from_segmentation(segmentation, number),
        finding_type=finding,
        algorithm_id=_algorithm(blood.prediction),
        measurements=_volumes(blood, region),
    )


def _volumes(blood: Haemorrhage, part: str) -> "list[Measurement]":
    """Return a volume in mL, with the interval that holds 90 % of true volumes if it is known."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    millilitre = CodedConcept("mL", "UCUM", "mL")
    measured = [_measurement(codes.SCT.Volume, blood.volume_ml[part], millilitre)]
    for bound, value in zip(("lower", "upper"), blood.intervals_ml[part] or (), strict=False):
        concept = private_code(("volume", bound), f"Volume, {bound} limit of the 90 % interval")
        measured.append(_measurement(concept, value, millilitre))
    return measured


def _remarks_group(context: ObjectContext) -> Any:
    """Return what concerns the whole scan: the notice, the clinical values, and the warnings."""
    prediction = context.prediction
    remarks = [context.notice]
    if prediction.clinical is not None:
        used = ", ".join(f"{name} {value:g}" for name, value in prediction.clinical.used.items()) or "none"
        remarks.append(f"Clinical values: {used}; not known: {', '.join(prediction.clinical.missing) or 'none'}")
    if prediction.provenance["scan"].get("resampled"):
        remarks.append(
            "The slices were aligned or brought to even distances before the prediction. The segmentations show the "
            "masks at the acquired slices, so small parts between two slices may be missing in them. Volumes are those "
            "of the whole masks."
        )
    remarks += [f"Warning {warning.code}: {warning.message}" for warning in all_warnings(prediction)]
    return _group(
        context, "remarks", prediction, private_code(("remarks",), "Remarks"), [], [], remarks, context.headers
    )


def _group(
    context: ObjectContext,
    name: str,
    prediction: Prediction,
    finding: Any,
    measured: "list[Measurement]",
    evaluations: list[tuple[Any, Any]],
    remarks: list[str],
    sources: "Sequence[Dataset]" = (),
) -> Any:
    """Return a group of measurements, evaluations and comments, which may refer to images of the source series."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(context.uid("group", name), clean_text(name, 64)),
        finding_type=finding,
        algorithm_id=_algorithm(prediction),
        measurements=measured,
        source_images=[hd.sr.SourceImageForMeasurementGroup.from_source_image(each) for each in sources],
        qualitative_evaluations=[hd.sr.QualitativeEvaluation(*each) for each in evaluations],
    )
    for remark in remarks:
        text = clean_text(remark, _MAX_TEXT)
        group[0].ContentSequence.append(hd.sr.TextContentItem(codes.DCM.Comment, text, "CONTAINS"))
    return group


def _algorithm(prediction: Prediction) -> Any:
    """Return the model and the weights of each fold as the identification of an algorithm."""
    from highdicom.sr import AlgorithmIdentification
    from pydicom.sr.codedict import codes

    name, made = clean_text(prediction.model, 64), prediction.provenance
    weights = [f"weights of fold {each['fold']}: SHA-256 {each['sha256']}" for each in made["weights"]]
    return AlgorithmIdentification(
        name, software_versions(made)[0], [f"model: {name}", *weights],
        family=codes.DCM.ArtificialIntelligence, manufacturer=MANUFACTURER,
    )  # fmt: skip


def _probability(parts: tuple[str, ...], meaning: str, value: float) -> "Measurement":
    return _measurement(private_code(("probability", *parts), meaning), value)


def _measurement(concept: Any, value: float, unit: Any = None) -> "Measurement":
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes

    return Measurement(concept, round(value, 6), codes.UCUM.NoUnits if unit is None else unit)
