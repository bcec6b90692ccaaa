"""The published systems once more, each written out from its formulas in dense torch with plain forward hooks.

The presets are tested against these. Nothing here imports `sparsefeat`, nothing is fast, and every product is taken in
float64 from the tensors as the pipeline gives them and rounded once, to the activations' own dtype.
"""
