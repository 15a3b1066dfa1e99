"""Write the model pages from the specs in the zoo: `python docs/models.py`.

All content comes from the JSON files of the models and from the networks that they describe. The pages are part of the
repository, and a test fails if they are out of date.
"""

import textwrap
from html import escape
from pathlib import Path
from typing import NamedTuple

from ichprog import networks, zoo
from ichprog.export import CAUTION, card_sections, markdown_table
from ichprog.spec import ModelSpec

FOLDER = Path(__file__).with_suffix("")
NOTICE = "For research only, not for patient care."
LINE_PX, BOX_PX, GAP_PX, MARGIN_PX = 17, 170, 40, 10
PALE, GREY, BLUE, INK = "#eceff1", "#cfd8dc", "#d7e3f1", "#37474f"


class Network(NamedTuple):
    """Size of the network of one fold.

    Attributes:
        parameters: Number of parameters.
        operations: Billions of floating point operations for one scan; a multiplication and an addition are two.
        features: Channels, slices, rows and columns of the features that the heads see.
    """

    parameters: int
    operations: float
    features: tuple[int, ...]


def pages() -> dict[str, str]:
    """Return the content of each file by its name: the list of models, and a page and a picture of each model."""
    specs = [zoo.read_entry(entry) for entry in zoo.entries() if entry.distribution == "ichprog"]
    files = {"index.md": _list_page(specs)}
    for spec in specs:
        network = measure_network(spec)
        files[f"{spec.name}.md"] = _model_page(spec, network)
        files[f"{spec.name}.svg"] = draw_network(spec, network)
    return files


def measure_network(spec: ModelSpec) -> Network:
    """Return the size of the network of a model, which is built without memory for its weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = networks.build(spec).eval()
        features = network.backbone(torch.empty(1, 1, *spec.input.shape))
    parameters = sum(each.numel() for each in network.parameters())
    return Network(parameters, counter.get_total_flops() / 1e9, tuple(features.shape[1:]))


def draw_network(spec: ModelSpec, network: Network) -> str:
    """Return a picture of a model as SVG: input, backbone, features, and a head for each task."""
    window, anatomy = spec.input.window, "brain only" if spec.input.brain_only else "whole head"
    columns: list[list[tuple[str, list[str]]]] = [
        [(PALE, ["head CT", f"{window.low:g} to {window.high:g} HU", anatomy])],
        [(PALE, ["grid", _size(spec.input.shape), "slices, rows, columns"])],
        [(GREY, ["backbone", spec.backbone.name])],
        [(PALE, ["features", f"{network.features[0]} channels", _size(network.features[1:])])],
        [
            (BLUE, [f"head: {task.name}", task.head.name, *textwrap.wrap(", ".join(task.labels), 22)])
            for task in spec.tasks
        ],
    ]
    if spec.fusion is not None:
        columns[3].append((BLUE, [f"fusion: {spec.fusion.name}", *(f"{v.column} ({v.unit})" for v in spec.clinical)]))
    heights = [sum(_height(lines) + GAP_PX / 2 for _, lines in column) - GAP_PX / 2 for column in columns]
    width, height = len(columns) * (BOX_PX + GAP_PX) - GAP_PX + 2 * MARGIN_PX, max(heights) + 2 * MARGIN_PX
    parts, places = [], []
    for number, (column, tall) in enumerate(zip(columns, heights, strict=True)):
        x, y = MARGIN_PX + number * (BOX_PX + GAP_PX), (height - tall) / 2
        places.append([])
        for colour, lines in column:
            parts.append(_box(x, y, colour, lines))
            places[-1].append((x, y + _height(lines) / 2))
            y += _height(lines) + GAP_PX / 2
    parts += [_arrow(places[k][0], places[k + 1][0]) for k in range(3)]
    for task, place in zip(spec.tasks, places[4], strict=True):
        parts += [_arrow(source, place) for source in places[3][: 2 if task.uses_clinical else 1]]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">\n<title>{escape(spec.name)}</title>\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{"".join(parts)}</svg>\n'
    )


def _height(lines: list[str]) -> float:
    return LINE_PX * len(lines) + 14


def _box(x: float, y: float, colour: str, lines: list[str]) -> str:
    area = f'x="{x:g}" y="{y:g}" width="{BOX_PX}" height="{_height(lines):g}"'
    shape = f'<rect {area} rx="5" fill="{colour}" stroke="{INK}"/>'
    bold = ' font-weight="bold"'
    texts = "".join(
        f'<text x="{x + BOX_PX / 2:g}" y="{y + LINE_PX * (row + 1) + 3:g}" text-anchor="middle"'
        f"{bold if row == 0 else ''}>{escape(line)}</text>"
        for row, line in enumerate(lines)
    )
    return f"{shape}{texts}\n"


def _arrow(source: tuple[float, float], target: tuple[float, float]) -> str:
    """Return an arrow between two boxes, each given by the middle of its left side."""
    path = f"M{source[0] + BOX_PX:g} {source[1]:g}L{target[0]:g} {target[1]:g}"
    return f'<path d="{path}" stroke="{INK}" fill="none" marker-end="url(#tip)"/>\n'


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _list_page(specs: list[ModelSpec]) -> str:
    rows = [
        [
            f"[{spec.name}]({spec.name}.md)" + (" (the default)" if spec.name == zoo.DEFAULT else ""),
            ", ".join(f"{task.name} ({len(task.labels)})" for task in spec.tasks),
            spec.summary,
        ]
        for spec in specs
    ]
    return f"""\
# Models

A name consists of a backbone and tasks, and its meaning never changes. The table shows the number of labels of each
task in parentheses. Models with the same backbone differ only in tasks and weights, so that multi-task and single-task
models can be compared.

![One network with three heads, and three networks of one task each](../pictures/multi-task.svg)

{markdown_table(["name", "tasks", "summary"], rows)}

{_caution(NOTICE)}
Each page states the notice, the limits and the licences of its model. `python docs/models.py` writes these pages.
"""


def _model_page(spec: ModelSpec, network: Network) -> str:
    card = card_sections(spec, warning="[warning](../scans.md#warnings)")
    parts = {"Network": _network_section(spec, network), **card}
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    return f"""\
# {spec.name}

{spec.summary}

{_caution(spec.notice)}
{body}
"""


def _network_section(spec: ModelSpec, network: Network) -> str:
    costs = [
        ["parameters of a fold", f"{network.parameters:,}"],
        ["floating point operations for a scan and a fold", f"{network.operations:.3g} billion"],
    ]
    return f"""\
![Scan, grid, backbone, features and heads of {spec.name}]({spec.name}.svg)

{markdown_table(["cost", ""], costs)}

[Speed](../speed.md) has seconds and memory."""


def _caution(notice: str) -> str:
    lines = textwrap.wrap(CAUTION, 120, initial_indent="    ", subsequent_indent="    ")
    return f'!!! warning "{notice}"\n' + "\n".join(lines) + "\n"


def main() -> None:
    """Write every page and picture, and remove those of models that no longer exist."""
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for old in FOLDER.iterdir():
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
