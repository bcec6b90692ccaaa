"""The promises of `attach` over the configurations of pipelines with transformers whose blocks attend to the text beside them."""

from tests.pipeline.outcomes import keeps_its_promises, of_kind


@of_kind("cross")
def test_attach_keeps_its_promises(cell, turn, results):
    keeps_its_promises(cell, turn, results)
