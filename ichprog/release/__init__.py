"""How a model leaves the house: as one file that other runtimes read, or as a folder on the Hub with a model card.

`program` is the file, `parcel` the folder, `card` what is said of a model in prose.
"""

from ichprog.release.card import CAUTION, card, sections, table
from ichprog.release.parcel import Parcel, pack, publish
from ichprog.release.program import export, refuse_unless_possible

__all__ = ["CAUTION", "Parcel", "card", "export", "pack", "publish", "refuse_unless_possible", "sections", "table"]
