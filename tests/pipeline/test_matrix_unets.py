"""The promises of `attach` over the configurations of pipelines with UNets."""

from tests.pipeline.outcomes import keeps_its_promises, of_kind


@of_kind("unets")
def test_attach_keeps_its_promises(cell, turn, results):
    keeps_its_promises(cell, turn, results)
