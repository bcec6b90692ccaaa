"""Heat maps from a pipeline's attention, and the words they belong to."""

from sparsefeat.attention.heat_map import HeatMap
from sparsefeat.attention.heat_maps import HeatMaps
from sparsefeat.attention.real_image import read_image
from sparsefeat.attention.recording import HeatMapRecording
from sparsefeat.attention.words import Token, token_indices, tokens_of, words_of

__all__ = ["HeatMap", "HeatMapRecording", "HeatMaps", "Token", "read_image", "token_indices", "tokens_of", "words_of"]
