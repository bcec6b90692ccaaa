"""Steps of a GPU run after which their process is of less use, or of none."""

import os
import sys

from bench.gpu.children import Step


def illegal():
    raise RuntimeError("an illegal memory access")


def loses():
    sys.modules["__main__"].synchronised = illegal
    return {"fault": ""}


def raises():
    raise ValueError("no")


def well(**more):
    return lambda: {"fault": "", "process": os.getpid()} | more


def steps(name):
    return [
        Step("raises", raises),
        Step("captures", well(spoilt=True)),
        Step("loses", loses),
        Step("answers", well()),
    ]
