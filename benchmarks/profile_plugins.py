"""Profile every installed plugin and write `docs/profiling.md`: `python benchmarks/profile_plugins.py`.

A family of plugins cannot list its members, so a few members are named here.
"""

import sys
from pathlib import Path

from ichprog import profiling
from ichprog.errors import IchprogError

PAGE = Path(__file__).parents[1] / "docs" / "profiling.md"
FAMILY_MEMBERS = (
    "timm/mobilenetv3_small_100",
    "timm/resnet18",
    "timm/efficientnet_b0",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
)

OPENING = """\
# Profiling plugins

This page lists parameters, operations, memory and time of every backbone, head and saliency method. Plugins are built
without options and run in torch, in float32 on a CPU, with their initial weights. The figures compare plugins with each
other. OpenVINO runs most models on a CPU [faster](speed.md).

`ichprog plugins profile` measures the installed plugins, and `ichprog plugins profile NAME...` measures some of them.
See its [options](command-line.md#plugins). A family such as `timm/*` has too many members to list, so the table has a
few of them. These commands write this page:

```bash
pip install -e . ./plugins/ichprog-captum ./plugins/ichprog-timm
OMP_NUM_THREADS=1 python benchmarks/profile_plugins.py
python docs/pictures.py FOLDER --only profiling.svg
```

![The seconds of each backbone and of each saliency method, from the tables below](pictures/profiling.svg)

## Columns

- **parameters**: the number of parameters, trainable or not.
- **GFLOP**: floating-point operations in units of 10^9, forward and backward. A multiply-add counts as two. Only
  convolutions, matrix products and attention are counted, by the formulas of `torch.utils.flop_counter`.
- **MiB**: the peak size of all tensors at one time: weights, input and intermediate tensors. Buffers inside an
  operation and libraries are not counted. A process with torch takes some hundred MiB more.
- **s**: the median time of up to five runs after a first one; slow plugins have fewer runs. Times and their ratios
  depend on the machine. The other columns do not.

A **backbone** computes the features of one grid. The grid is that of the zoo's first model with the backbone, or of the
default model if the zoo has none.

A **head** computes the probabilities of three labels from the features of the default model.

A **saliency method** computes one map of the `compact` backbone with a linear head on the mean of its features.
*Forward* counts the grids that pass through the network. *Backward* counts the grids for which a gradient of the score
is computed, with respect to the grid or to a layer. The forward pass that `ichprog.explain` shares between methods is
included. The built-in methods need only this pass. For another network, multiply the counts by the cost of its passes.
"""


def page(profiles: list[profiling.Profile], failed: list[tuple[str, str]]) -> str:
    """Return the text of the page."""
    return f"{OPENING}\nTimes are from {profiling.machine()}.\n\n{profiling.table(profiles, failed=failed)}\n"


def main() -> None:
    """Profile the plugins and write the page."""
    profiles, failed = [], []
    families = [name for name in profiling.REGISTRIES["backbone"].names() if name.endswith("/*")]
    members = [("backbone", name) for name in FAMILY_MEMBERS if any(name.startswith(each[:-1]) for each in families)]
    kinds = list(profiling.REGISTRIES)
    for kind, name in sorted([*profiling.select(), *members], key=lambda plugin: kinds.index(plugin[0])):
        print(name, file=sys.stderr)
        try:
            profiles.append(profiling.profile(kind, name))
        except IchprogError as error:
            failed.append((name, str(error)))
    PAGE.write_text(page(profiles, failed), encoding="utf-8")


if __name__ == "__main__":
    main()
