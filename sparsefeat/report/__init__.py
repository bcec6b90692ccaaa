"""HTML pages and figures: what was found, steered and erased, for people to look at."""

from __future__ import annotations

from sparsefeat.report.figures import contact_sheet, enlarge, overlay
from sparsefeat.report.heat_maps import over_frames, over_steps, save_animation, sheet_by, words_sheet
from sparsefeat.report.page import check_folder, write_page

__all__ = [
    "check_folder",
    "contact_sheet",
    "enlarge",
    "over_frames",
    "over_steps",
    "overlay",
    "save_animation",
    "sheet_by",
    "words_sheet",
    "write_page",
]
