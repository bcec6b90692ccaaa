"""Pages of an SAE's latents: an index that can be searched, and a page for each."""

from __future__ import annotations

from sparsefeat.report.latents.pages import unfinished_place, write_feature_pages
from sparsefeat.report.latents.surveying import words_of

__all__ = ["unfinished_place", "words_of", "write_feature_pages"]
