"""Subgroups: split patients by the values of a column."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_MAX_VALUES = 6  # a numeric column with at most this many values is split by value


def by_value(values: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
    """Split patients by value, or by terciles if a numeric column has more than six values.

    Args:
        values: Cells of the column `(N,)`, text or numbers. Empty text, None and NaN are blank.

    Returns:
        By name of the subgroup the members `(N,)` bool. Patients with a blank are in no subgroup.

    Examples:
        >>> by_value(["F", "M", "", "F"])["F"]
        array([ True, False, False,  True])
    """
    cells = ["" if value is None else str(value).strip() for value in values]
    try:
        numbers = np.array([float(cell) if cell else np.nan for cell in cells])
    except ValueError:
        text = np.array(cells)
        return {str(value): text == value for value in np.unique(text) if value}
    finite = numbers[np.isfinite(numbers)]
    if len(levels := np.unique(finite)) <= _MAX_VALUES:
        return {f"{value:g}": numbers == value for value in levels}
    first, second = np.quantile(finite, [1 / 3, 2 / 3])
    groups = {
        f"<= {first:.4g}": numbers <= first,
        f"{first:.4g} to {second:.4g}": (numbers > first) & (numbers <= second),
        f"> {second:.4g}": numbers > second,
    }
    return {name: members for name, members in groups.items() if members.any()}


def by_edges(values: np.ndarray, edges: Sequence[float]) -> dict[str, np.ndarray]:
    """Split patients at numbers; a value that equals an edge belongs to the higher subgroup.

    Args:
        values: Numbers `(N,)`, NaN if blank.
        edges: Numbers at which one subgroup ends and the next begins.

    Returns:
        By name of the subgroup the members `(N,)` bool. Patients with a blank are in no subgroup.

    Examples:
        >>> by_edges(np.array([60.0, 70.0, np.nan]), [70])
        {'< 70': array([ True, False, False]), '>= 70': array([False,  True, False])}
    """
    groups = {}
    for low, high in itertools.pairwise([-math.inf, *sorted(edges), math.inf]):
        name = f"< {high:g}" if low == -math.inf else f">= {low:g}" if high == math.inf else f"{low:g} to < {high:g}"
        groups[name] = (values >= low) & (values < high)
    return groups
