"""Draw and write results: plain data in, files out.

The package knows no study. `figures` draws charts, `maps` and `overlay` draw saliency maps over slices, and `tables`
writes CSV, Markdown and LaTeX. `html` writes a self-contained report from the templates in `templates`. `tripod` fills
the TRIPOD+AI checklist.

`prediction_report` writes a result as one HTML file with a viewer, `report_index` a table of many reports, and `pdf` a
printed page. `volumes` prepares scan, masks and maps for the viewer, and `privacy` leaves out what may identify a
patient.
"""

from ichprog.reporting.html import Picture, Section, Table, write_report
from ichprog.reporting.maps import MapPanel, SliceRow, draw_maps
from ichprog.reporting.overlay import plot
from ichprog.reporting.tripod import fill_checklist

__all__ = [
    "MapPanel",
    "Picture",
    "Section",
    "SliceRow",
    "Table",
    "draw_maps",
    "fill_checklist",
    "plot",
    "write_report",
]
