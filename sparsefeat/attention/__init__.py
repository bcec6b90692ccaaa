"""Heat maps from a pipeline's attention, the words they belong to, and what is done with them: refinement, guidance."""

from sparsefeat.attention.guidance import AStar, AttendAndExcite
from sparsefeat.attention.heat_map import HeatMap
from sparsefeat.attention.heat_maps import HeatMaps
from sparsefeat.attention.losses import mean_overlap, overlap
from sparsefeat.attention.real_image import read_image
from sparsefeat.attention.recording import HeatMapRecording
from sparsefeat.attention.self_attention import SelfAttention, SelfAttentionRecording
from sparsefeat.attention.t2i_zero import CorrectionBySimilarities, CrossTokenNMS
from sparsefeat.attention.words import Token, token_indices, tokens_of, words_of

__all__ = [
    "AStar",
    "AttendAndExcite",
    "CorrectionBySimilarities",
    "CrossTokenNMS",
    "HeatMap",
    "HeatMapRecording",
    "HeatMaps",
    "SelfAttention",
    "SelfAttentionRecording",
    "Token",
    "mean_overlap",
    "overlap",
    "read_image",
    "token_indices",
    "tokens_of",
    "words_of",
]
