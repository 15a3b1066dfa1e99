"""Run the command line with the backbone "intensity" registered, as a process that a test kills."""

import sys

from ichprog import registry
from ichprog.cli import run

from support.models import intensity_backbone

if __name__ == "__main__":
    registry.register_backbone("intensity", intensity_backbone)
    sys.argv[0] = "ichprog"
    run()
