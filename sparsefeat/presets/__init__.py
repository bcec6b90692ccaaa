"""The published systems, assembled: their hookpoints, their constants, and an instrument for each thing they do.

    from sparsefeat import presets

    sae = presets.sdxl_unbox.load("wendlerc/sdxl-turbo-saes", "up.0.1", subfolder=...)
    with sf.attach(pipe, presets.sdxl_unbox.paint(sae, 2301, mask, strength=10)):
        ...

One module a system; its docstring names the paper, and where the released code deviates from it. The default is always
the paper; the released behaviour has a name of its own.
"""

from sparsefeat.presets import concept_steerers, flux_sae, itd, saeuron, sdxl_unbox

__all__ = ["concept_steerers", "flux_sae", "itd", "saeuron", "sdxl_unbox"]
