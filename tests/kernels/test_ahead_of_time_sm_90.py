"""sm_90: its kernels, compiled without a GPU."""

from tests.kernels.test_ahead_of_time import CompiledInFull


class TestSm90(CompiledInFull):
    architecture = "sm_90"
