"""DICOM images of a prediction: masks as segmentations, maps as parametric maps, and a page as a picture."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.export.dicom.identity import (
    CAUTION,
    ObjectContext,
    clean_text,
    software_versions,
    weights_hash,
)
from ichprog.results import Haemorrhage, Prediction, Saliency
from ichprog.scan import Scan
from ichprog.scan.volume import to_lps

if TYPE_CHECKING:
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.pm import ParametricMap
    from highdicom.sc import SCImage
    from highdicom.seg import Segmentation, SegmentDescription
    from matplotlib.figure import Figure
    from pydicom import Dataset

_SITES = {"ventricular": "BrainVentricle", "subarachnoid": "SubarachnoidSpace"}  # of pydicom's SNOMED codes
_COLOURS = (  # CIELab, far apart and visible on grey
    (60.0, 70.0, 50.0), (60.0, -10.0, -50.0), (85.0, 0.0, 80.0), (65.0, -60.0, 50.0), (60.0, 70.0, -50.0),
)  # fmt: skip
_BRAIN_COLOUR = (70.0, -30.0, 10.0)
_PAGE_DPI = 110
_PAGE_COLUMNS = 118  # characters in a line of the page
_MAX_LINES = 60


def segment_haemorrhage(context: ObjectContext, haemorrhage: Haemorrhage) -> "Segmentation | None":
    """Return the mask of a haemorrhage as a segmentation with one segment for each region, None if it is empty.

    Args:
        context: What the objects of the prediction share.
        haemorrhage: The haemorrhage.
    """
    from pydicom.sr.codedict import codes

    algorithm = _algorithm(haemorrhage.prediction)
    segments = [
        _segment(
            context, number, clean_text(region, 64), codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Hemorrhage,
            algorithm, getattr(codes.SCT, _SITES.get(region, "Brain")), _COLOURS[(number - 1) % len(_COLOURS)],
        )
        for region, number in haemorrhage.regions.items()
    ]  # fmt: skip
    return _segmentation(context, "haemorrhage", "Haemorrhage masks", 9001, haemorrhage.mask, segments)


def segment_brain(context: ObjectContext, scan: Scan) -> "Segmentation | None":
    """Return the brain mask of a checked scan as a segmentation, None if it is empty.

    Args:
        context: What the objects of the prediction share.
        scan: The checked scan.
    """
    from pydicom.sr.codedict import codes

    from ichprog.scan import brain_mask

    segment = _segment(
        context, 1, "brain", codes.SCT.AnatomicalStructure, codes.SCT.Brain, _algorithm(context.prediction),
        None, _BRAIN_COLOUR,
    )  # fmt: skip
    return _segmentation(context, "brain", "Brain mask", 9002, brain_mask(scan), [segment])


def _algorithm(prediction: Prediction) -> "AlgorithmIdentificationSequence":
    """Return the model and its weights as the identification of an algorithm."""
    from highdicom.content import AlgorithmIdentificationSequence
    from pydicom.sr.codedict import codes

    made = prediction.provenance
    return AlgorithmIdentificationSequence(
        clean_text(prediction.model, 64),
        codes.DCM.ArtificialIntelligence,
        software_versions(made)[0],
        source=clean_text(made["resolved"], 64),
        parameters={"weights_sha256": weights_hash(made)},
    )


def _segment(
    context: ObjectContext, number: int, label: str, category: Any, kind: Any, algorithm: Any, site: Any, colour: Any
) -> "SegmentDescription":
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    return SegmentDescription(
        number, label, category, kind, "AUTOMATIC", algorithm,
        tracking_uid=context.uid("segment", label), tracking_id=label,
        anatomic_regions=None if site is None else [site],
        display_color=CIELabColor(*colour),
    )  # fmt: skip


def _segmentation(
    context: ObjectContext, kind: str, title: str, number: int, mask: Any, segments: "list[SegmentDescription]"
) -> "Segmentation | None":
    from highdicom.seg import Segmentation

    values, affine = to_lps(np.asarray(mask.dataobj).reshape(mask.shape[:3]).astype(np.uint8), mask.affine)
    planes = context.series.sample(values, affine)
    if not planes.any():
        return None
    data = Segmentation(
        source_images=context.headers,
        pixel_array=planes,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        content_label=kind.upper()[:16],
        content_description=clean_text(f"{title} by {context.prediction.model}, {CAUTION.lower()}", 64),
        pixel_measures=_pixel_measures(context),
        **context.attributes(kind, title, number),
    )
    return context.finish(data, kind)


def segments_with_frames(segmentation: "Segmentation") -> set[int]:
    """Return the numbers of the segments that are not empty.

    Args:
        segmentation: The segmentation.
    """
    groups = [*segmentation.SharedFunctionalGroupsSequence, *segmentation.PerFrameFunctionalGroupsSequence]
    items = [item for group in groups for item in group.get("SegmentIdentificationSequence", ())]
    return {int(item.ReferencedSegmentNumber) for item in items}


def _pixel_measures(context: ObjectContext) -> Any:
    from highdicom.content import PixelMeasuresSequence

    series = context.series
    return PixelMeasuresSequence(list(series.pixel_mm), round(series.slice_spacing, 4))


def parametric_map(context: ObjectContext, saliency: Saliency, number: int) -> "ParametricMap":
    """Return a saliency map as a parametric map, signed and unscaled, interpolated to the slices of the series.

    Args:
        context: What the objects of the prediction share.
        saliency: The map.
        number: Number of the map among those of the prediction, from 1.
    """
    from highdicom import VOILUTTransformation
    from highdicom.pm import ParametricMap, RealWorldValueMapping
    from pydicom.sr.codedict import codes

    image = saliency.image
    values, affine = to_lps(np.asarray(image.dataobj, np.float32).reshape(image.shape[:3]), image.affine)
    planes = context.series.sample(values, affine, linear=True)
    largest = max(float(np.abs(planes).max()), 1e-30)
    what = f"{saliency.task} {saliency.label}, {saliency.method}"
    mapping = RealWorldValueMapping(
        "SALIENCY", clean_text(f"saliency of {what}", 64), codes.UCUM.NoUnits, (-largest, largest),
        slope=1.0, intercept=0.0, quantity_definition=codes.DCM.Saliency,
    )  # fmt: skip
    window = VOILUTTransformation(window_center=0.0, window_width=2 * largest, voi_lut_function="LINEAR_EXACT")
    kind = saliency_kind(saliency)
    data = ParametricMap(
        source_images=context.headers,
        pixel_array=planes,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[window],
        content_label="SALIENCY",
        content_description=clean_text(f"Saliency of {what}, {CAUTION.lower()}", 64),
        pixel_measures=_pixel_measures(context),
        **context.attributes(kind, f"Saliency of {what}", 9010 + number),
    )
    (shared,) = data.SharedFunctionalGroupsSequence
    shared.FrameAnatomySequence = [_head()]
    (identity,) = shared.PixelValueTransformationSequence
    identity.RescaleIntercept, identity.RescaleSlope = "0", "1"  # as the standard writes them, instead of 0.0 and 1.0
    return context.finish(data, kind)


def _head() -> "Dataset":
    """Return the item that says that a frame shows the head, which editions before 2021 require of each map."""
    from highdicom.sr import CodedConcept
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    item = Dataset()
    item.AnatomicRegionSequence = [CodedConcept.from_code(codes.SCT.Head)]
    item.FrameLaterality = "U"  # unpaired
    return item


def saliency_kind(saliency: Saliency) -> str:
    """Return what distinguishes a map from the other objects of the prediction.

    Args:
        saliency: The map.
    """
    options = saliency.provenance.get("options") or {}
    chosen = "".join(f"_{name}={value}" for name, value in sorted(options.items()))
    return f"map_{saliency.task}_{saliency.label}_{saliency.method}{chosen}"


def capture_page(context: ObjectContext, scan: Scan, maps: Sequence[Saliency]) -> "SCImage":
    """Return a page with the slices, masks, maps and results as a picture, for viewers that read nothing else.

    Args:
        context: What the objects of the prediction share.
        scan: The checked scan.
        maps: Saliency maps to draw.
    """
    from highdicom.sc import SCImage
    from pydicom.uid import ExplicitVRLittleEndian

    kind = ":".join(["page", *map(saliency_kind, maps)])
    attributes = context.attributes(kind, "Results page", 9004)
    data = SCImage.from_ref_dataset(
        context.headers[0],
        pixel_array=_draw_page(context, scan, maps),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **attributes,
    )
    data.PatientOrientation = None  # highdicom asks for one, but the page holds many slices and text
    data.ConversionType = "WSD"  # workstation
    data.copy_patient_and_study_information(context.headers[0])
    data.BurnedInAnnotation = "NO"  # nothing on the page identifies the patient
    data.ImageComments = clean_text(context.notice, 1024)
    return context.finish(data, kind)


def _draw_page(context: ObjectContext, scan: Scan, maps: Sequence[Saliency]) -> np.ndarray:
    """Return the page as RGB, `(rows, columns, 3)` uint8."""
    from matplotlib.figure import Figure

    from ichprog.reporting.overlay import plot

    known = context.prediction
    tasks = {clean_text(name, 64): task for name, task in known.tasks.items()}
    prediction = dataclasses.replace(known, model=clean_text(known.model, 64), tasks=tasks)
    blood = prediction.haemorrhage
    outline = blood.mask if blood is not None and blood.volume_ml["total"] > 0 else None
    picture = plot(maps, scan, prediction=prediction, outline=outline)
    width = float(picture.get_size_inches()[0])
    lines = page_lines(prediction)
    text = Figure(figsize=(width, 0.3 + 0.17 * len(lines)))
    text.text(0.01, 0.99, "\n".join(lines), fontsize=8, family="monospace", va="top", parse_math=False)
    parts = [_render(figure) for figure in (picture, text)]
    columns = min(part.shape[1] for part in parts)
    return np.concatenate([part[:, :columns] for part in parts])


def _render(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_PAGE_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def page_lines(prediction: Prediction) -> list[str]:
    """Return the results of a prediction as lines of text. Nothing in them identifies the patient.

    Args:
        prediction: The prediction.
    """
    lines = [f"{CAUTION}. {prediction.provenance['notice']}", f"Model {prediction.model}"]
    lines += [f"Weights SHA-256 {weights_hash(prediction.provenance)}"]
    for name, task in prediction.tasks.items():
        lines.append(f"{name}: {task.label}; probabilities {_probabilities(task.probabilities)}")
        if task.calibrated is not None:
            lines.append(f"  calibrated {_probabilities(task.calibrated)}")
    lines += [f"Abstains from {name}: {reason}" for name, reason in prediction.abstained.items()]
    blood = prediction.haemorrhage
    if blood is not None:
        volumes = ", ".join(f"{part} {volume:.1f} mL" for part, volume in blood.volume_ml.items())
        found = "present" if blood.is_present else "absent"
        lines.append(f"Haemorrhage {found}, probability {blood.probability:.3f}; {volumes}")
        lines += blood.limits[:1]
    lines += [f"Warning {warning.code}: {warning.message}" for warning in all_warnings(prediction)]
    wrapped = [part for line in lines for part in textwrap.wrap(clean_text(line, 1000), _PAGE_COLUMNS)]
    return wrapped[:_MAX_LINES]


def _probabilities(values: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {value:.3f}" for label, value in values.items())


def all_warnings(prediction: Prediction) -> list[Any]:
    """Return the warnings of a prediction and of its haemorrhage, each once.

    Args:
        prediction: The prediction.
    """
    blood = prediction.haemorrhage
    more = () if blood is None else blood.warnings
    return [*prediction.warnings, *(each for each in more if each not in prediction.warnings)]
