"""The table of checks of a GPU run, with ops that do in their first step what an op on a GPU may do wrong."""

import os
import time
from unittest import mock

import sparsefeat_kernels as kernels

from bench.gpu import checks as real
from bench.gpu.children import Step


def adds_one(total, *rest, right=kernels.feature_stats_):
    right(total, *rest)
    total[0, 5] += 1.0


def raises(*_):
    raise RuntimeError("an illegal memory access was encountered")


def hangs(*_):
    time.sleep(600)


def aborts(*_):
    os.abort()


BROKEN = {"feature_stats": adds_one, "latent_major": raises, "sparse_edit": hangs, "sparse_decode": aborts}


def checks(name, rehearse):
    first, *others = real.checks(name, rehearse)
    if name not in BROKEN:
        return [first, *others]
    op = f"{name}_" if hasattr(kernels, f"{name}_") else name  # feature_stats is a module

    def run():
        with mock.patch.object(kernels, op, BROKEN[name]):
            return first.run()

    return [Step(first.name, run), *others]
