"""How fast the ops are, and whether they are right: what `sparsefeat bench` and the repository's bench/ share.

`timing` (one `measure()` for everything), `figures` (every op at a shape, made from the files of `ops/`), `sae_case` and
`answers` (inputs, and how near an answer must be), `speed_table` (the tables), `machine` (what a result was measured on).
"""
