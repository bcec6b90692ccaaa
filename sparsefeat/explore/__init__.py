"""The page you paint on: `sparsefeat explore`. `explorer` and `edits` know nothing of the page; `page` needs Gradio."""

from sparsefeat.explore.edits import Edit, LatentEdit, Source, WordEdit, painted, python_lines, with_edit
from sparsefeat.explore.explorer import Asked, Explorer, Feature, Stopped, Unedited

__all__ = [
    "Asked",
    "Edit",
    "Explorer",
    "Feature",
    "LatentEdit",
    "Source",
    "Stopped",
    "Unedited",
    "WordEdit",
    "painted",
    "python_lines",
    "with_edit",
]
