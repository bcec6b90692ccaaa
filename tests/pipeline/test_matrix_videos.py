"""The promises of `attach` over the configurations of pipelines with transformers of videos."""

from tests.pipeline.outcomes import keeps_its_promises, of_kind


@of_kind("videos")
def test_attach_keeps_its_promises(cell, turn, results):
    keeps_its_promises(cell, turn, results)
