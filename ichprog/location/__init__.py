"""Location: where in the brain a haemorrhage lies, by registration of the brain to an atlas.

`locate` takes masks of the blood and of the brain. A `Location` has the side, the location, the probability of an
infratentorial haemorrhage, and the share of the blood in each region. The layer needs NumPy alone.
"""

from ichprog.location.locate import KINDS, Location, locate

__all__ = ["KINDS", "Location", "locate"]
