"""Metrics, SAE checks against a pipeline, the judge, and the benchmarks on the embedded data.

A file a thing: `check` (does an SAE belong where it is put), `splice`, `judge`, `before_after`, `sae_metrics`,
`evaluate_saes` and what it measures, `segmentation` and `scenes` (heat maps), `emoji` and `run_emoji` (the erasure
benchmark), `overhead`.
"""
