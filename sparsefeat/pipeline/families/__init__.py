"""The model families, one file each. `registry.py` says which one a component of a pipeline is of."""
