"""Features of a pipeline: codes as they are recorded, their statistics, and the search among them."""

from sparsefeat.features.blindspots import Blindspots
from sparsefeat.features.chance import Naming, name_of
from sparsefeat.features.collecting import CollectStatistics, collect_statistics
from sparsefeat.features.encoder_names import EncoderName, example_vectors, name_by_encoder
from sparsefeat.features.neuronpedia import export_neuronpedia
from sparsefeat.features.record import Record, Recording, TopLatent
from sparsefeat.features.scores import area_under_curve, normalized_mean_difference
from sparsefeat.features.search import CollectExamples, Example, Examples, Found, search
from sparsefeat.features.statistics import Statistics
from sparsefeat.features.word_maps import WordCorrelations, WordLatent

__all__ = [
    "Blindspots",
    "CollectExamples",
    "CollectStatistics",
    "EncoderName",
    "Example",
    "Examples",
    "Found",
    "Naming",
    "Record",
    "Recording",
    "Statistics",
    "TopLatent",
    "WordCorrelations",
    "WordLatent",
    "area_under_curve",
    "collect_statistics",
    "example_vectors",
    "export_neuronpedia",
    "name_by_encoder",
    "name_of",
    "normalized_mean_difference",
    "search",
]
