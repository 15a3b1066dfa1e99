"""The tutorials as notebooks are those of the pages, and they run."""

import runpy
from pathlib import Path

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter

import ichprog

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = runpy.run_path(str(DOCS / "notebooks.py"))
PAGES = NOTEBOOKS["pages"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_notebook_is_that_of_the_page(page):
    """Run `python docs/notebooks.py` if this fails."""
    stored = nbformat.read(DOCS / "notebooks" / f"{page.stem}.ipynb", as_version=4)
    nbformat.validate(stored)
    sources = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (stored, NOTEBOOKS["build"](page))]
    assert sources[0] == sources[1]
    codes = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in codes)
    assert not [output for cell in codes for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem != "plugins-fusion")) for page in PAGES],
)
def test_a_notebook_runs(page):
    notebook = NOTEBOOKS["build"](page)
    NOTEBOOKS["execute"](notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_a_figure_shows_itself_in_a_notebook_without_an_inline_backend(scan_path):
    figure = ichprog.plot([], scan_path, prediction=ichprog.predict("compact.prognosis_gcs3_age_v2", scan_path))
    formats, _ = DisplayFormatter().format(figure)
    assert formats["image/png"].startswith(b"\x89PNG")
