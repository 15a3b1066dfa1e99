"""Write tutorials and pages of plugins as notebooks, with their outputs: `python docs/notebooks.py`.

Each `docs/tutorial-*.md` and `docs/plugins-*.md` becomes `docs/notebooks/*.ipynb`. Blocks of Python and lines
`$ command` become cells, which are executed in an empty folder. A test fails if the cells differ from the page.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS / "notebooks"
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?![a-z]+:|#)")  # to another page or a picture
TIMEOUT_S = 900


def build(page: Path) -> Any:
    """Return the notebook of a page, without outputs."""
    from nbformat import v4

    parts = _BLOCK.split(page.read_text(encoding="utf-8"))
    cells = [v4.new_markdown_cell(_LINK.sub("](../", parts[0]).strip())]
    for language, code, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        lines = code.splitlines()
        if language == "console":  # the page shows what a command prints; the notebook runs it
            lines = ["!" + line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        cells.append(v4.new_code_cell("\n".join(lines)))
        if text.strip():
            cells.append(v4.new_markdown_cell(_LINK.sub("](../", text).strip()))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same in every run
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(notebook: Any) -> None:
    """Run the cells of a notebook in an empty folder, and keep their outputs in it.

    Raises:
        CellExecutionError: A cell fails.
    """
    from nbclient import NotebookClient

    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=TIMEOUT_S,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,  # keeps the last state of a progress bar
        ).execute(env=os.environ | {"PATH": programs})
    notebook.metadata.pop("language_info", None)  # has the version of the interpreter


def pages() -> list[Path]:
    """Return the pages that become notebooks."""
    return sorted([*DOCS.glob("tutorial-*.md"), *DOCS.glob("plugins-*.md")])


def main() -> None:
    """Write every notebook."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[page.stem for page in pages()], metavar="PAGE", help="write one notebook")
    args = parser.parse_args()
    NOTEBOOKS.mkdir(exist_ok=True)
    for page in pages():
        if args.only in (None, page.stem):
            notebook = build(page)
            execute(notebook)
            target = NOTEBOOKS / f"{page.stem}.ipynb"
            nbformat.write(notebook, target)
            print(target)


if __name__ == "__main__":
    main()
