"""The main job on the embedded default: draw, read features, steer one, erase two concepts, map words, write the page."""

from sparsefeat.demo.run import findings, run_demo

__all__ = ["findings", "run_demo"]
