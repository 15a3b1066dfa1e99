"""Draw the diagrams of the documentation: `python docs/diagrams.py`, with the command `dot` of Graphviz.

Each diagram is a text in the language of Graphviz, `docs/pictures/NAME.dot`. The class of a node selects its colour.
The diagram of the architecture is drawn from the table of its page.
"""

import itertools
import re
import subprocess
import textwrap
from pathlib import Path

from ichprog.io import write_text

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
INK = "#37474f"
DEFAULTS = {
    "G": {"bgcolor": "white", "pad": 0.1, "ranksep": 0.35, "nodesep": 0.18, "style": "rounded", "color": INK},
    "N": {"shape": "box", "style": "rounded,filled", "fillcolor": "#eceff1", "margin": "0.12,0.06", "height": 0.3},
    "E": {"arrowsize": 0.6},
}
LETTERS = {"fontname": "Helvetica", "fontsize": 11, "color": INK}
CLASS_COLOURS = {"command": "#d7e3f1", "file": "#ffffff", "result": "#dcebdc", "caution": "#f6ded9"}


def architecture() -> str:
    """Return the layers of the package as a diagram, from the table of the page about the architecture."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (`.+?`) \|", page, re.MULTILINE)
    layers = [
        ", ".join(name for _, names in group for name in re.findall(r"`(\w+)`", names))
        for _, group in itertools.groupby(rows, key=lambda row: row[0])
    ]
    labels = ["\\n".join(textwrap.wrap(names, 50)) for names in layers]
    nodes = [f'  layer{number} [label="{label}"]' for number, label in enumerate(labels)]
    arrows = " -> ".join(f"layer{number}" for number in range(len(layers)))
    return "\n".join(["digraph {", *nodes, f"  {arrows}", "}"])


def draw(source: str) -> str:
    """Return a diagram as SVG."""
    options = [f"-{kind}{key}={value}" for kind, own in DEFAULTS.items() for key, value in (LETTERS | own).items()]
    command = ["dot", "-Tsvg", *options]
    svg = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout  # noqa: S603
    style = "".join(f".{name} :is(path, polygon) {{fill: {colour}}}\n" for name, colour in CLASS_COLOURS.items())
    # The version of Graphviz in the comments would change the file without changing the picture.
    svg = re.sub(r"<!.*?>\n", "", svg, flags=re.DOTALL)
    return svg.replace("<g ", f"<style>\n{style}</style>\n<g ", 1)


def main() -> None:
    """Draw every diagram."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(PICTURES.glob("*.dot"))}
    for name, source in (sources | {"architecture": architecture()}).items():
        write_text(PICTURES / f"{name}.svg", draw(source))


if __name__ == "__main__":
    main()
