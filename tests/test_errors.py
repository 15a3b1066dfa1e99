"""Error messages say what was given, what is allowed and what to do next."""

import pytest

from ichprog import IchprogError, InvalidValueError, UnknownNameError


@pytest.mark.parametrize(
    ("known", "hint", "message"),
    [
        ([], "", "Unknown device 'gpu'."),
        (["cpu"], "", "Unknown device 'gpu'. Did you mean cpu? Expected cpu."),
        (["a", "b"], "Use a.", "Unknown device 'gpu'. Expected one of: a, b. Use a."),
        (range(14), "", "Unknown device 'gpu'. Expected one of: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more."),
        ([f"gpu{k}" for k in range(15)], "", "Unknown device 'gpu'. Did you mean gpu9 or gpu8 or gpu7?"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest_and_the_allowed_names(known, hint, message):
    assert str(UnknownNameError("device", "gpu", known, hint)) == message


def test_an_invalid_value_comes_with_the_allowed_values():
    error = InvalidValueError("alpha", -1, "a positive number", "Use --alpha 0.05.")
    assert str(error) == "Invalid alpha -1. Expected a positive number. Use --alpha 0.05."
    assert isinstance(error, IchprogError)
    assert isinstance(error, ValueError)
