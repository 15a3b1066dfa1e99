"""Measures what every plugin costs and writes `docs/costs.md`: `python benchmarks/costs.py`.

Plugins of other distributions are measured where they are installed. Families have members without number, of which a
few are measured.
"""

import sys
from pathlib import Path

from ichprog import profiling
from ichprog.errors import IchprogError

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"
OF_FAMILIES = (
    "timm/mobilenetv3_small_100",
    "timm/resnet18",
    "timm/efficientnet_b0",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
)

OPENING = """\
# What plugins cost

Parameters, operations, memory and time of every backbone, head and saliency method, built without options, in torch
as it stands, in float32 on a processor, with the weights it starts from. What is compared here is plugins with each
other: a model on a processor is run by OpenVINO where that can, and is [faster](speed.md).

`ichprog plugins profile` measures what is installed where you are, `ichprog plugins profile NAME...` one plugin or several;
it has [options](command-line.md#plugins). Families such as `timm/*` have members without number, of which a few are
here. This page is written by

```bash
pip install -e . ./plugins/ichprog-captum ./plugins/ichprog-timm
OMP_NUM_THREADS=1 python benchmarks/costs.py
```

## What is counted

- **parameters**: the numbers in it that are learnt or could be, exactly.
- **GFLOP**: thousands of millions of floating-point operations, a multiply-add counting as two: those of convolutions,
  matrix products and attention, by the formulas of `torch.utils.flop_counter`, there and back. Normalisation, ReLUs,
  pooling and sums are not counted.
- **MiB**: what tensors hold at once at most: weights, input, and what is made on the way and kept for the way back.
  What an operation uses within itself is not counted, and neither are libraries: a process with torch takes some
  hundred MiB more.
- **s**: the median of up to five runs after a first one; of those that take long there are fewer. On another machine
  times differ, and so do their ratios. The other columns do not depend on the machine.

A **backbone** turns one grid into features. The grid is that of the zoo's first model with the backbone, and of the
default model where the zoo has none.

A **head** turns the features of the default model into the probabilities of three labels.

A **saliency method** makes one map of the `compact` backbone with a linear head on the mean of its features. *Forward*
counts grids that go through the network, *back* those for which a gradient comes back from the score, to the grid or
only to a layer. As in `ichprog.explain` one forward pass comes first, and is counted. The built-in methods go on from
it, and share it where several are asked for. Of another network a map takes as many passes, each as dear as that
network.
"""


def page(found: list[profiling.Cost], failed: list[tuple[str, str]]) -> str:
    """The page's text."""
    return f"{OPENING}\nTimes are of {profiling.machine()}.\n\n{profiling.table(found, failed=failed)}\n"


def main() -> None:
    """Measures and writes."""
    found, failed = [], []
    families = [name for name in profiling.REGISTRIES["backbone"].names() if name.endswith("/*")]
    more = [("backbone", name) for name in OF_FAMILIES if any(name.startswith(family[:-1]) for family in families)]
    for kind, name in sorted([*profiling.claims(), *more], key=lambda one: list(profiling.REGISTRIES).index(one[0])):
        print(name, file=sys.stderr)
        try:
            found.append(profiling.measure(kind, name))
        except IchprogError as error:
            failed.append((name, str(error)))
    PAGE.write_text(page(found, failed), encoding="utf-8")


if __name__ == "__main__":
    main()
