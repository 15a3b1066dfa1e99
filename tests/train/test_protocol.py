"""Training protocols: presets, quirks, values and documentation."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from ichprog import InvalidValueError, UnknownNameError
from ichprog.train import PRESETS, QUIRKS, Protocol


def test_only_the_paper_preset_has_quirks():
    assert PRESETS["paper"].quirks() == [sentence for _, sentence in QUIRKS]
    assert PRESETS["default"].quirks() == []
    assert len(PRESETS["paper"].replace(zoom_mode="random").quirks()) == len(QUIRKS) - 1


@pytest.mark.parametrize(
    ("change", "error", "expected_message"),
    [
        ({"epoch": 3}, UnknownNameError, "Unknown protocol field 'epoch'. Did you mean epochs"),
        ({"epochs": 0}, InvalidValueError, "Invalid protocol epochs 0. Expected a whole number from 1 to 1e.06"),
        ({"epochs": 3.5}, InvalidValueError, "Invalid protocol epochs 3.5. Expected a whole number"),
        ({"learning_rate": "fast"}, InvalidValueError, "learning_rate 'fast'. Expected a finite number"),
        ({"learning_rate": math.nan}, InvalidValueError, "Invalid protocol learning_rate nan"),
        (
            {"balance": "both"},
            InvalidValueError,
            "Invalid protocol balance 'both'. Expected 'none', 'class_weights' or 'oversample'",
        ),
        ({"recalibrate": 1}, InvalidValueError, "Invalid protocol recalibrate 1. Expected true or false"),
    ],
)
def test_a_protocol_refuses_an_invalid_field(change, error, expected_message):
    with pytest.raises(error, match=expected_message):
        PRESETS["default"].replace(**change)


def test_a_whole_number_is_accepted_for_a_float():
    assert PRESETS["default"].replace(learning_rate=1).learning_rate == 1.0


def test_every_field_of_the_protocol_is_documented():
    """The docstring names each field; the page's table shows the values of both presets."""
    names = [field.name for field in dataclasses.fields(Protocol)]
    assert all(f"{name}: " in Protocol.__doc__ for name in names)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    documented = []
    for row in re.findall(r"^\| (`[a-z_]+`.*) \|$", page.partition("## Presets")[2], re.MULTILINE):
        cells = [cell.strip().replace("`", "") for cell in row.split("|")]
        if len(cells) == 4:
            documented += (fields := cells[0].split(", "))
            for preset, values in zip(("default", "paper"), cells[1:3], strict=True):
                for name, value in zip(fields, values.split(", ") if values else (), strict=bool(values)):
                    actual = PRESETS[preset].to_dict()[name]
                    assert (value if isinstance(actual, str) else json.loads(value)) == actual, (preset, name)
    assert documented == names
    assert page.partition("### Quirks")[2].partition("## The folder")[0].count("\n- ") == len(QUIRKS)
