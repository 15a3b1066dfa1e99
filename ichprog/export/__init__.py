"""How a model leaves the house: as one file that other runtimes read, or as a folder on the Hub with a model card.

`program` is the file, `parcel` the folder, `card` what is said of a model in prose.
"""

from ichprog.export.graphs import export, refuse_unless_possible
from ichprog.export.model_card import CAUTION, card, sections, table
from ichprog.export.upload import Parcel, pack, publish

__all__ = ["CAUTION", "Parcel", "card", "export", "pack", "publish", "refuse_unless_possible", "sections", "table"]
