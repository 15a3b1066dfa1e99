import dataclasses
import re
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ichprog.errors import ScanError, SpecError
from ichprog.scan import checks, read
from ichprog.scan.brain import isolate_brain
from ichprog.scan.checks import check_scan, missing_brain_ml, out_of_range, register_check, resolve_ranges
from ichprog.scan.validation import validate_ct

from support import phantoms

DATA = Path(__file__).parents[3] / "shared" / "data"
USUAL = {"in-plane-spacing": (0.3, 1.6)}  # phantoms are coarser than scans


@cache
def bleeding():
    return phantoms.head(blood="deep")


def warnings_of(scan, mode="auto", **ranges):
    """Warnings by code; keyword arguments are expected ranges, with _ for - in the codes."""
    validate_ct(scan)
    _, mask, record = isolate_brain(scan, mode)
    overrides = {code.replace("_", "-"): values for code, values in ranges.items()}
    warnings = check_scan(scan, mask, USUAL | overrides, given=record["brain"] == "given")
    return {warning.code: warning for warning in warnings}


def with_hu(hu):
    return phantoms.scan_of(hu, bleeding().scan.affine)


def refusal(scan):
    with pytest.raises(ScanError) as e:
        validate_ct(scan)
    assert e.value.measured is not None
    return e.value


def test_a_usual_head_gives_no_warning():
    assert warnings_of(bleeding().scan) == {}


@pytest.mark.parametrize("empty", [0, -1024, -5])
@pytest.mark.parametrize("kind", ["int16", "smooth"])
def test_a_usual_brain_gives_no_warning(empty, kind):
    hu = np.where(bleeding().brain, bleeding().scan.hu, empty)
    if kind == "smooth":
        hu = hu + np.random.default_rng(1).normal(0, 0.05, hu.shape) * bleeding().brain
    assert warnings_of(with_hu(hu)) == {}


@pytest.mark.parametrize(("low", "high"), [(-1024, 3071), (-100, 1000), (-200, 300), (-2000, 1500)])
def test_air_and_bone_may_be_clipped(low, high):
    hu = bleeding().scan.hu.copy()
    hu[hu < -950] = -2000
    assert warnings_of(with_hu(hu.clip(low, high))) == {}


@pytest.mark.parametrize(
    ("usual", "code", "unit"),
    [
        ({"slices": (41, 64)}, "slices", "slices"),
        ({"in-plane-spacing": (0.3, 1.1)}, "in-plane-spacing", "mm"),
        ({"slice-spacing": (2.0, 4.0)}, "slice-spacing", "mm"),
        ({"coverage": (210.0, 220.0)}, "coverage", "mm"),
        ({"field-of-view": (200.0, 350.0)}, "field-of-view", "mm"),
        ({"brain-volume": (700.0, 1200.0)}, "brain-volume", "mL"),
        ({"no-blood": (50.0, None)}, "no-blood", "mL"),
    ],
)
def test_a_value_out_of_range_is_reported_in_units(usual, code, unit):
    found = warnings_of(phantoms.brain_only(bleeding()), **usual)
    assert list(found) == [code]
    assert found[code].unit == unit
    assert found[code].measured is not None
    assert found[code].expected is not None
    assert unit in found[code].message


def test_obliquity_is_reported_in_degrees():
    turned = phantoms.scan_of(bleeding().scan.hu, bleeding().scan.affine, obliquity_deg=31.0)
    assert warnings_of(turned)["obliquity"].measured == 31.0


def test_too_few_slices_are_refused():
    few = phantoms.scan_of(bleeding().scan.hu[:, :, 20:23], bleeding().scan.affine)
    assert refusal(few).code == "too-few-slices"


@pytest.mark.parametrize("factor", [0.001, 0.15, 10])
def test_impossible_sizes_are_refused_in_mm(factor):
    scan = bleeding().scan
    error = refusal(dataclasses.replace(scan, affine=scan.affine * factor))
    assert error.code == "spacing"
    assert error.unit == "mm"


def test_constant_scans_are_empty():
    assert refusal(with_hu(np.zeros((100, 100, 30)))).code == "empty"


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("offset", [1000, 1024])
def test_a_missing_intercept_is_named(offset, alone):
    hu = phantoms.brain_only(bleeding()).hu if alone else bleeding().scan.hu
    error = refusal(with_hu(hu + offset))
    assert error.code == "not-hu"
    assert "1024" in str(error)


def test_an_intercept_subtracted_twice_is_refused():
    assert refusal(with_hu(bleeding().scan.hu - 1024)).code == "not-hu"


@pytest.mark.parametrize("alone", [False, True])
def test_normalised_values_are_refused(alone):
    hu = phantoms.brain_only(bleeding()).hu if alone else bleeding().scan.hu
    assert refusal(with_hu(hu.clip(0, 80) / 80)).code == "not-hu"
    assert refusal(with_hu((hu - hu.mean()) / hu.std())).code == "not-hu"


@pytest.mark.parametrize(("low", "high"), [(0, 80), (-200, 300), (-1000, 2000)])
def test_eight_bit_pictures_are_refused(low, high):
    picture = np.round((bleeding().scan.hu.clip(low, high) - low) * 255 / (high - low))
    assert refusal(with_hu(picture)).code == "eight-bit"


def test_an_eight_bit_brain_is_refused():
    picture = np.round(phantoms.brain_only(bleeding()).hu.clip(0, 80) * 255 / 80)
    assert refusal(with_hu(picture)).code == "eight-bit"


@pytest.mark.parametrize("alone", [False, True])
def test_mr_is_refused(alone):
    hu = bleeding().scan.hu
    signal = np.where(hu < -200, 0, np.where(hu > 140, 40, 300 + 9 * hu))
    signal = np.abs(signal + np.random.default_rng(0).normal(0, 15, hu.shape))
    assert refusal(with_hu(signal * bleeding().brain if alone else signal)).code in {"not-hu", "windowed"}


@pytest.mark.parametrize(("low", "high"), [(0, 80), (0, 100), (-1024, 100), (0, 400)])
def test_a_whole_head_clipped_to_a_window_is_refused(low, high):
    assert refusal(with_hu(bleeding().scan.hu.clip(low, high))).code == "windowed"


@pytest.mark.parametrize("ceiling", [60, 80])
def test_a_clipped_brain_gives_a_warning(ceiling):
    found = warnings_of(with_hu(phantoms.brain_only(bleeding()).hu.clip(0, ceiling)))
    assert found["windowed"].measured == ceiling


def test_less_than_100_ml_of_brain_is_an_error():
    scan = phantoms.brain_only(bleeding())
    mask = np.zeros(scan.hu.shape, bool)
    mask[:20, :20, :10] = True
    with pytest.raises(ScanError) as e:
        check_scan(scan, mask, USUAL, given=True)
    assert (e.value.code, e.value.unit) == ("no-brain", "mL")


@pytest.mark.parametrize(
    ("cut", "side"),
    [
        ({"high": (95, 115, 45)}, "top"),
        ({"low": (-95, -120, -10)}, "bottom"),
        ({"high": (50, 115, 92)}, "left"),
        ({"low": (-50, -120, -110)}, "right"),
        ({"low": (-95, -70, -110)}, "front"),
        ({"high": (95, 70, 92)}, "back"),
    ],
)
def test_a_cropped_brain_gives_a_warning(cut, side):
    found = warnings_of(phantoms.brain_only(phantoms.head(blood="deep", **cut)), field_of_view=(90.0, 350.0))
    warning = found["cropped-brain"]
    missing_ml = volume_ml(bleeding()) - volume_ml(phantoms.head(blood="deep", **cut))
    assert side in warning.message
    assert warning.unit == "%"
    assert warning.measured == pytest.approx(100 * missing_ml / volume_ml(bleeding()), rel=0.2)
    stated_ml = float(re.search(r"about (\d+) mL", warning.message)[1])
    assert stated_ml == pytest.approx(missing_ml, rel=0.2)


def volume_ml(head):
    return np.count_nonzero(head.brain) * np.prod(head.scan.spacing) / 1000


@pytest.mark.parametrize("lowest", [-65, -60])
def test_a_scan_may_end_at_the_skull_base(lowest):
    assert "cropped-brain" not in warnings_of(phantoms.head(blood="deep", low=(-95, -120, lowest)).scan)


def test_a_sliver_at_the_vertex_may_be_missing():
    cut = {"high": (95, 115, 58)}
    assert 5 < volume_ml(bleeding()) - volume_ml(phantoms.head(blood="deep", **cut)) < 25
    assert "cropped-brain" not in warnings_of(phantoms.head(blood="deep", **cut).scan)
    assert "cropped-brain" in warnings_of(phantoms.head(blood="deep", **cut).scan, cropped_brain=(None, 0.1))


@pytest.mark.parametrize("slice_mm", [1.0, 2.5, 7.0])
def test_the_missing_volume_does_not_depend_on_the_slice_thickness(slice_mm):
    whole, cut = (phantoms.head((2.0, 2.0, slice_mm), high=(95, 115, top)) for top in (92, 44))
    missing_ml = volume_ml(whole) - volume_ml(cut)
    assert missing_brain_ml(cut.brain, cut.scan.spacing, "top") == pytest.approx(missing_ml, rel=0.2)
    assert missing_brain_ml(whole.brain, whole.scan.spacing, "top") == 0


@pytest.mark.parametrize("noise", [0, 4, 12])
def test_a_head_without_blood_gives_a_warning(noise):
    found = warnings_of(phantoms.brain_only(phantoms.head(noise=noise)))
    assert list(found) == ["no-blood"]
    assert found["no-blood"].measured < 0.5


@pytest.mark.parametrize("blood", [*phantoms.BLOOD, "subdural", ((25, 0, 10), 8.2), ((-30, 20, 30), 8.2)], ids=str)
def test_blood_is_seen_from_two_millilitres_and_against_the_skull(blood):
    assert "no-blood" not in warnings_of(phantoms.brain_only(phantoms.head(blood=blood, noise=8, blood_hu=62)))


def test_a_model_can_switch_the_blood_check_off():
    assert warnings_of(phantoms.brain_only(phantoms.head()), no_blood=(0.0, None)) == {}


def test_a_wide_gap_in_the_skull_gives_a_warning():
    small, wide = (phantoms.head(blood="deep", defect=((66, -5, 20), radius)).scan for radius in (15, 45))
    assert "skull-gap" not in warnings_of(small)
    found = warnings_of(wide)["skull-gap"]
    assert found.unit == "cm2"
    assert 20 < found.measured < 64  # of a defect of 64 cm2, whose rim of 10 mm has bone nearby


def test_an_open_top_of_the_scan_is_no_gap():
    assert "skull-gap" not in warnings_of(phantoms.head(blood="deep", high=(95, 115, 45)).scan)


def test_the_thickness_of_the_skull_is_measured():
    found = warnings_of(bleeding().scan, thin_skull=(20.0, None))["thin-skull"]
    assert found.measured == pytest.approx(7 + 4, abs=1)  # the phantom's bone has 7 mm, and blurred edges
    assert found.unit == "mm"
    assert "thin-skull" not in warnings_of(phantoms.brain_only(bleeding()), thin_skull=(20.0, None))


@pytest.mark.parametrize(("hu", "corner", "is_seen"), [(3071, 20, True), (2400, 20, False), (3071, 0, False)])
def test_metal_in_the_slices_of_the_brain_gives_a_warning(hu, corner, is_seen):
    values = bleeding().scan.hu.copy()
    values[60:64, 60:64, corner : corner + 2] = hu
    assert ("metal" in warnings_of(with_hu(values))) == is_seen


def test_a_given_head_with_its_skull_gives_a_warning():
    assert {"skull-present", "brain-volume"} <= set(warnings_of(bleeding().scan, mode="given"))


def test_real_scans_give_the_expected_warnings():
    scans = [DATA / name for name in ("head_ct_ge_dicom.zip", "brain_ct_average_1mm.nii.gz")]
    if not all(path.exists() for path in scans):
        pytest.skip("the real scans are absent")
    head, brain = (warnings_of(read(path)) for path in scans)
    assert list(head) == ["no-blood"]
    assert set(brain) == {"slices", "slice-spacing", "no-blood"}


def test_a_check_is_added_in_one_place(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", dict(checks.CHECKS))

    @register_check("median", "an unusual median", quantity="median of the brain", unit="HU", expected=(20, 30))
    def check_median(case):
        return out_of_range([float(np.median(case.scan.hu[case.mask]))], case.expected, "the median", "HU")

    warning = warnings_of(bleeding().scan)["median"]
    assert (warning.measured, warning.expected, warning.unit) == (33.0, [20, 30], "HU")
    assert warning.message == "the median is 33 HU; 20 to 30 is usual for this model."
    assert "median" not in warnings_of(bleeding().scan, median=(20, 45))
    monkeypatch.setattr("ichprog.scan.CHECKS", checks.CHECKS)
    page = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "scan_checks.py"))
    assert "| `median` | an unusual median | 20 to 30 | HU |\n" in page["warnings_table"]()


def test_an_override_of_an_unknown_check_names_the_nearest_check():
    with pytest.raises(SpecError, match=r"Unknown scan check .brain-volum.\. Did you mean brain-volume"):
        resolve_ranges({"brain-volum": (700, 2000)})


def test_a_check_without_a_range_takes_no_override():
    with pytest.raises(SpecError, match="Unknown scan check 'skull-present'"):
        resolve_ranges({"skull-present": (0, 1)})
