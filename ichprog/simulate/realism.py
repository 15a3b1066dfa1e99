"""Options of the simulation: what deceives on real head CTs, each off or on, and how the labels arise.

"plain" is a simpler simulation, in which every patient has a haemorrhage and an outcome. "realistic" adds what makes
haemorrhage hard to see, or seem present, on real heads. Each option draws its random numbers from a generator of its
own. So a patient with one option more differs by that option alone.
"""

from dataclasses import dataclass, fields
from typing import Any

from ichprog.errors import InvalidValueError, UnknownNameError

Range = tuple[float, float]


@dataclass(frozen=True)
class Realism:
    """Options of the simulation. The defaults are those of the preset "plain".

    Sources: volumes, the medians and 95th percentiles of parenchymal haemorrhage in two public data sets. Venous
    sinuses, 31 to 68 HU on scans without thrombosis (doi 10.1055/s-0043-1761184), and below 70 HU in 166 patients
    (Black et al., AJNR 2011). Quantisation, the form of the data set of Hssayeni et al., Data 2020 (doi
    10.3390/data5010014). Density of grey matter, distance of the brain from the skull, beam hardening and noise:
    compared with heads of that data set without haemorrhage, see the page on simulated patients. All other values are
    assumed.

    Attributes:
        without_blood: Share of patients without haemorrhage, 0 to 1.
        small_bleeds: Whether volumes are those of an emergency department: parenchymal median about 8 mL, from 0.3 mL.
        adult_ages: Whether ages are uniform from 18 years, instead of those of patients with haemorrhage.
        all_kinds: Whether epidural haemorrhage, subarachnoid haemorrhage of the convexity and thin subdural
            haemorrhage occur.
        fill_mm: How much closer the surface of the brain is to the skull, in mm.
        grey_hu: Range of the density of grey matter, in HU.
        white_hu: Range of the density of white matter before it gets paler with age, in HU.
        sharp_tissue: Whether the boundary between grey and white matter is sharper than in the template.
        gyri_mm: Amplitude of the warps that change the pattern of gyri, in mm.
        sinus_hu: Range of the density of venous sinuses, or None for the density of fluid.
        dura: Whether dura lines the skull, and the density and thickness of falx and tentorium vary.
        calcification: Whether basal ganglia, choroid plexus, falx and arteries calcify.
        arteries: Whether the basilar and middle cerebral arteries are visible.
        hardening_hu: Largest brightening of the brain next to the skull by beam hardening, in HU.
        calibration_hu: Standard deviation of the scanner's offset, in HU.
        tilt_deg: Standard deviation of the rotation of the head about the left-right axis, in degrees; at most 25.
        kernels: Whether reconstruction kernels vary from soft to sharp.
        noise_hu: Range of the standard deviation of the noise at 5 mm, in HU.
        exact_masks: Whether the voxels of a mask are those with the most blood, as many as its volume needs. Otherwise
            they are more than half full of blood, which loses a part of thin collections.
        thick_slices: Whether slices are up to 7.5 mm apart and may overlap.
        windowed: Share of scans quantised as by a brain window and a bone window, 0 to 1.
        shared_causes: How strongly GCS and age depend on what the image shows: 1 as in the population, 0 not at all. It
            multiplies the effects of volume, ventricular blood and pons on the GCS, and the inverse hyperbolic tangent
            of the correlations of atrophy, white matter and calcification with age. The image is the same for the same
            causes; the outcome depends on GCS and age as before.
        label_noise: Share of patients whose recorded outcome is drawn at random, 0 to 1. Good and poor are then equally
            likely.
    """

    without_blood: float = 0.0
    small_bleeds: bool = False
    adult_ages: bool = False
    all_kinds: bool = False
    fill_mm: float = 0.0
    grey_hu: Range = (40.0, 40.0)
    white_hu: Range = (31.0, 31.0)
    sharp_tissue: bool = False
    gyri_mm: float = 0.0
    sinus_hu: Range | None = None
    dura: bool = False
    calcification: bool = False
    arteries: bool = False
    hardening_hu: float = 0.0
    calibration_hu: float = 0.0
    tilt_deg: float = 5.0
    kernels: bool = False
    noise_hu: Range = (2.2, 3.6)
    exact_masks: bool = False
    thick_slices: bool = False
    windowed: float = 0.0
    shared_causes: float = 1.0
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("without_blood", "windowed", "label_noise"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InvalidValueError(name, value, "a share from 0 to 1")
        for name in ("fill_mm", "gyri_mm", "hardening_hu", "calibration_hu", "tilt_deg", "shared_causes"):
            if (value := getattr(self, name)) < 0:
                raise InvalidValueError(name, value, "a number of at least 0")
        for name in ("grey_hu", "white_hu", "sinus_hu", "noise_hu"):
            if (value := getattr(self, name)) is not None and not 0 <= value[0] <= value[1]:
                raise InvalidValueError(name, value, "a range: two numbers of at least 0, the lower one first")

    def describe(self) -> Any:
        """Return the name of the preset, or the options that differ from "plain", as plain data."""
        for name, preset in PRESETS.items():
            if self == preset:
                return name
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


PLAIN = Realism()
PRESETS = {
    "plain": PLAIN,
    "realistic": Realism(
        without_blood=0.3,
        small_bleeds=True,
        adult_ages=True,
        all_kinds=True,
        fill_mm=2.2,
        grey_hu=(41.0, 45.0),
        white_hu=(28.0, 31.0),
        sharp_tissue=True,
        gyri_mm=3.0,
        sinus_hu=(42.0, 68.0),
        dura=True,
        calcification=True,
        arteries=True,
        hardening_hu=24.0,
        calibration_hu=2.0,
        tilt_deg=9.0,
        kernels=True,
        noise_hu=(1.8, 4.5),
        exact_masks=True,
        thick_slices=True,
        windowed=0.4,
    ),
}


def find_realism(preset: str | Realism) -> Realism:
    """Return the options of a preset.

    Args:
        preset: "plain", "realistic", or options, which are returned unchanged.

    Raises:
        UnknownNameError: There is no such preset.

    Examples:
        >>> find_realism("plain").without_blood
        0.0
    """
    if isinstance(preset, Realism):
        return preset
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    return PRESETS[preset]
