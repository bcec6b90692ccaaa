"""gfx942: its kernels, compiled without a GPU."""

from tests.kernels.test_ahead_of_time import Compiled


class TestGfx942(Compiled):
    architecture = "gfx942"
