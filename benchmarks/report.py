"""Measures everything and writes `docs/speed.md` with its plots: `python benchmarks/report.py`.

The figures go into `benchmarks/results.json`, and the page is written from them; `--from benchmarks/results.json` only
writes it. Where suites are named only these are measured, and the figures of others stay if they are of the same
versions. Figures of other machines stay, and stand beside.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import string
import subprocess
import sys
import tempfile
import textwrap
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results.json", HERE.parent / "docs"
PAGE = "speed.md"
LIBRARIES = ("ichprog", "numpy", "scipy", "nibabel", "torch", "openvino", "monai", "medcam", "accelerate")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # of a processor, that matter here
ROOF = "intensity"  # the axis of the roofline; every other is a plot of its own
SUITES = ("start_up", "prepare", "predict", "roofline", "explain", "train_step")  # in the page's order


def measure(suites: list[str], rounds: int | None, words: str | None, *, slow: bool) -> tuple[dict[str, Any], bool]:
    """Runs the suites.

    Returns:
        The results, and whether everything ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        # -P: what is installed is measured, not what lies in the folder
        command = [sys.executable, "-P", "-m", "pytest", *(suites or [str(HERE)]), f"--benchmark-json={path}"]
        command += ["-m", ""] if slow else []
        command += [f"--rounds={rounds}"] if rounds else []
        command += ["-k", words] if words else []
        fine = subprocess.run(command, check=False).returncode == 0
        if not path.exists():
            sys.exit("Nothing was measured.")
        return condense(json.loads(path.read_text(encoding="utf-8"))), fine


def condense(run: dict[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark wrote of a run, as the machine and a line a figure: medians and their spread."""
    machine, cpu = run["machine_info"], run["machine_info"]["cpu"]
    installed = {each.name: each.version for each in distributions()}
    return {
        "machine": {
            "processor": cpu["brand_raw"],
            "cores": cpu["count"],
            "instructions": [name for name in INSTRUCTIONS if name in cpu.get("flags", ())],
            "system": f"{machine['system']} {machine['machine']}",
        },
        "versions": {
            "Python": platform.python_version(),
            **{name: installed[name] for name in LIBRARIES if name in installed},
        },
        "date": run["datetime"][:10],
        "figures": [
            {"suite": Path(test["fullname"].split("::")[0]).stem.removeprefix("test_"), **_run_jobs(figure)}
            for test in run["benchmarks"]
            for figure in test["extra_info"].get("figures", [])
        ],
    }


def _run_jobs(figure: dict[str, Any]) -> dict[str, Any]:
    said = {key: value for key, value in figure.items() if key in ("what", "unit") or value}
    for who in {"ours", "peer"} & said.keys():
        values = said[who]
        said[who] = {"median": median(values), "least": min(values), "most": max(values), "rounds": len(values)}
    return said


def join(old: list[dict[str, Any]], new: dict[str, Any], *, whole: bool = False) -> list[dict[str, Any]]:
    """Results by machine with new ones among them.

    Args:
        old: Results, a machine each.
        new: What was measured on one.
        whole: Whether that was everything; else figures of its machine stay, if they are of the same versions.
    """
    joined, same = list(old), [at for at, one in enumerate(old) if one["machine"] == new["machine"]]
    for at in same:
        if old[at]["versions"] == new["versions"] and not whole:
            figures = {(figure["suite"], figure["what"]): figure for figure in [*old[at]["figures"], *new["figures"]]}
            new = new | {"figures": sorted(figures.values(), key=lambda figure: SUITES.index(figure["suite"]))}
        elif not whole:
            print("Earlier figures of this machine are of other versions, and are left out.", file=sys.stderr)
        joined[at] = new
    return joined if same else [*joined, new]


def compared(figure: dict[str, Any]) -> tuple[float, bool]:
    """What of a figure is held against its target, and whether it is met."""
    what, bound, target = figure["target"]
    ours, peer = figure["ours"]["median"], figure.get("peer", {}).get("median", math.nan)
    value = {"ratio": ours / peer, "difference": ours - peer, "ours": ours}[what]
    return value, value <= target if bound == "at most" else value >= target


def page(results: list[dict[str, Any]]) -> str:
    """The page's text."""
    named = list(zip(string.ascii_uppercase, results, strict=False))
    parts = [_opening(named)]
    for suite in SUITES:
        title, text = about(suite)
        own = [(at, [figure for figure in one["figures"] if figure["suite"] == suite]) for at, one in named]
        pictures = [
            f"![{title} on {at}, by {axis}]({picture(at, suite, axis)})" for at, f in own for _, axis in plots(f)
        ]
        parts += [f"## {title}", text, _table(own), "\n\n".join(pictures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(suite: str) -> tuple[str, str]:
    """A suite's title and what it does, which its file begins with."""
    path = HERE / f"test_{suite}.py"
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    title, _, text = (said or suite.replace("_", " ").capitalize()).partition("\n")
    return title.rstrip("."), text.strip()


def _opening(named: list[tuple[str, dict[str, Any]]]) -> str:
    measured, said = [], []
    for at, one in named:
        machine, aims = one["machine"], [figure for figure in one["figures"] if "target" in figure]
        instructions = f" with {', '.join(machine['instructions'])}" if machine["instructions"] else ""
        versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
        text = f"- **{at}**: {machine['cores']} cores of {machine['processor']}{instructions}, {machine['system']}, on "
        text = f"{text}{one['date']}; {versions}. {one.get('note', '')}"
        measured.append(textwrap.fill(text, 120, subsequent_indent="  "))
        missed = [figure for figure in aims if not compared(figure)[1]]
        said.append(f"**On {at}, {len(aims) - len(missed)} of {len(aims)} targets are met.**")
        if missed:
            said[-1] += " Missed:\n\n" + "\n".join(f"- {_name(figure)}: {_against(figure)}" for figure in missed)
        said.append(f"![Ratios and their targets on {at}]({picture(at)})")
    return "\n\n".join([_WHAT, "\n".join(measured), _HOW, *said])


_WHAT = """\
# Speed

Each figure of this library stands beside that of a peer that does the same, measured in turns in one run on one
machine. Times are those of that machine; what carries over to another is the ratio, and that only as far as the
machines are alike. A value is the median of the rounds, with the least and the most in brackets. Scans are simulated,
512 x 512 x 32 voxels where nothing else is said, and weights are random in the published layout: neither changes what
there is to compute. Measured on"""

_HOW = """\
```bash
pip install -e ".[study]" --group bench
python benchmarks/report.py
```

This measures everything, adds the machine or renews its figures, and writes this page. `pytest
benchmarks/test_prepare.py` runs one suite and writes nothing."""


def _table(named: list[tuple[str, list[dict[str, Any]]]]) -> str:
    rows = [["on", "what", "ours", "peer", "ours : peer", "target", "met"], ["---"] * 7]
    for at, figure in [(at, figure) for at, figures in named for figure in figures]:
        peer = figure.get("peer")
        ratio = _digits(figure["ours"]["median"] / peer["median"]) if peer and figure["unit"] else ""
        shown = [
            at,
            figure["what"],
            _value(figure, "ours"),
            f"{_value(figure, 'peer')}, {figure['beside']}" if peer else "",
        ]
        met = ["", ""]
        if "target" in figure:
            met = [_target(figure), "yes" if compared(figure)[1] else "**no**"]
        rows.append([*shown, ratio, *met])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else "Not measured."


def _name(figure: dict[str, Any]) -> str:
    return f"{about(figure['suite'])[0]}: {figure['what']}"


def _against(figure: dict[str, Any]) -> str:
    what = figure["target"][0]
    value = compared(figure)[0]
    return f"{_digits(value) if what == 'ratio' else _with_unit(value, figure['unit'])}, target {_target(figure)}"


def _target(figure: dict[str, Any]) -> str:
    what, bound, target = figure["target"]
    if what == "ratio":
        return f"{bound} {_digits(target)}"
    return f"{bound} {_with_unit(target, figure['unit'])}{' more' if what == 'difference' else ''}"


def _value(figure: dict[str, Any], who: str) -> str:
    one, unit = figure[who], figure["unit"]
    shown = _with_unit(one["median"], unit)
    if one["rounds"] == 1:
        return shown
    scale = 1000 if shown.endswith(" ms") else 1
    return f"{shown} ({_digits(one['least'] * scale)} to {_digits(one['most'] * scale)})"


def _with_unit(value: float, unit: str) -> str:
    if unit == "s" and abs(value) < 1:
        value, unit = value * 1000, "ms"
    return f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    """Three of them, and a power of ten only where there is no other way."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def plots(figures: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Suites and the axes along which they have something to draw."""
    return list(dict.fromkeys((figure["suite"], axis) for figure in figures for axis in figure.get("at", ())))


def picture(at: str, *words: str) -> str:
    """A plot's file: that of a machine's suite along an axis, or without words that of all its ratios."""
    return f"{'-'.join(['speed', at.lower(), *words])}.svg"


def digest(figures: list[dict[str, Any]]) -> str:
    """Which figures a plot was drawn from; it is written into the plot."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def draw(results: list[dict[str, Any]]) -> None:
    """Draws every plot into `docs/`, and takes away those that are no more."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    for old in DOCS.glob("speed*.svg"):
        old.unlink()
    style = {"svg.hashsalt": "ichprog", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with mpl.rc_context(style):
        for at, one in zip(string.ascii_uppercase, results, strict=False):
            figures = one["figures"]
            for words in [(), *plots(figures)]:
                drawn = Figure(figsize=(7.5, 4.2), layout="constrained")
                plot = drawn.add_subplot()
                if not words:
                    _draw_ratios(plot, figures)
                else:
                    suite, axis = words
                    own = [figure for figure in figures if figure["suite"] == suite]
                    (_draw_roofline if axis == ROOF else _draw_series)(plot, own, axis)
                plot.spines[["top", "right"]].set_visible(False)
                said = {"Date": None, "Creator": None, "Description": digest(figures)}
                drawn.savefig(DOCS / picture(at, *words), metadata=said)


OURS, PEER, OTHER = "#2a6f97", "#8d99ae", "#c1121f"


def _draw_ratios(plot: Any, figures: list[dict[str, Any]]) -> None:
    """How much more or less than its peer, with the target of each."""
    shown = [figure for figure in figures if figure.get("target", ("",))[0] == "ratio"][::-1]
    rows, found = range(len(shown)), [compared(figure) for figure in shown]
    for met, colour, label in ((True, OURS, "ours : peer, target met"), (False, OTHER, "ours : peer, target missed")):
        own = [(row, value) for row, (value, fine) in zip(rows, found, strict=True) if fine == met]
        plot.barh(
            [row for row, _ in own], [value - 1 for _, value in own], left=1, color=colour, height=0.6, label=label
        )
    plot.plot([figure["target"][2] for figure in shown], rows, "|k", markersize=14, markeredgewidth=2, label="target")
    plot.axvline(1, color=PEER, linewidth=1)
    plot.set_xscale("log")
    names = [f"{_name(figure)}  {_digits(value)}" for figure, (value, _) in zip(shown, found, strict=True)]
    plot.set_yticks(rows, [name.replace("`", "") for name in names], fontsize=7.5)
    plot.set_xlabel("ours : peer")
    plot.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _draw_series(plot: Any, figures: list[dict[str, Any]], axis: str) -> None:
    """Ours and the peer's along an axis, with the spread of the rounds."""
    shown = sorted((figure for figure in figures if axis in figure.get("at", ())), key=lambda one: one["at"][axis])
    for who, colour in (("peer", PEER), ("ours", OURS)):
        points = [(figure["at"][axis], figure[who]) for figure in shown if who in figure]
        places, medians = [place for place, _ in points], [one["median"] for _, one in points]
        below, above = [one["least"] for _, one in points], [one["most"] for _, one in points]
        plot.plot(places, medians, "o-", color=colour, label=who if who == "ours" else shown[0].get("beside"))
        plot.fill_between(places, below, above, color=colour, alpha=0.2, linewidth=0)
    plot.set_ylim(bottom=0)
    plot.set_xlim(left=0)
    plot.set_xlabel(axis)
    plot.set_ylabel(shown[0]["unit"])
    plot.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _draw_roofline(plot: Any, figures: list[dict[str, Any]], axis: str) -> None:
    """Rates reached under the fastest products and what memory can bring; what has no roof is the peer."""
    points = [figure for figure in figures if axis in figure.get("at", ())]
    copied = next((figure["ours"]["median"] for figure in figures if figure["unit"] == "GB/s"), None)
    colours = iter((OURS, OTHER))
    for point in points:
        place, reached = point["at"][axis], point["ours"]["median"]
        colour = next(colours) if "peer" in point else PEER
        plot.plot(place, reached, "o", color=colour, label=f"{point['what']}: {_digits(reached)} {point['unit']}")
        if "peer" in point:
            roof = point["peer"]["median"]
            edge = roof / copied if copied else 1
            plot.plot([1, edge, 1000], [roof / edge, roof, roof], color=colour, linewidth=1)
            plot.annotate(f"{point['beside']}: {_digits(roof)}", (1000, roof), ha="right", va="bottom", color=colour)
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_xlabel("operations for each byte")
    plot.set_ylabel(points[0]["unit"])
    plot.legend(frameon=False, loc="lower right")


def main() -> None:
    """Measures where that is asked for, and writes results, page and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help="suites, such as benchmarks/test_prepare.py; all where not given")
    parser.add_argument("-k", metavar="WORDS", help="tests of these suites, as pytest takes it")
    parser.add_argument("--rounds", type=int, metavar="N", help="times that each is measured")
    parser.add_argument("--not-slow", action="store_true", help="leave out what takes very long")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="results that are there already")
    asked, fine = parser.parse_args(), True
    if asked.source:
        results = json.loads(asked.source.read_text(encoding="utf-8"))
    else:
        measured, fine = measure(asked.suites, asked.rounds, asked.k, slow=not asked.not_slow)
        earlier = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
        whole = fine and not (asked.suites or asked.k or asked.not_slow)
        results = join(earlier, measured, whole=whole)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (DOCS / PAGE).write_text(page(results), encoding="utf-8")
    draw(results)
    if not fine:
        sys.exit("Some of it failed; what was measured is on the page.")


if __name__ == "__main__":
    main()
