"""The promises of `attach` over the configurations of pipelines with transformers whose blocks have the text among their rows."""

from tests.pipeline.outcomes import keeps_its_promises, of_kind


@of_kind("joint")
def test_attach_keeps_its_promises(cell, turn, results):
    keeps_its_promises(cell, turn, results)
