"""Rows to codes: topk.py, threshold.py, auxk.py and pursuit.py are the ops; what they are made of is below them."""
