"""sm_80: its kernels, compiled without a GPU."""

from tests.kernels.test_ahead_of_time import CompiledInFull


class TestSm80(CompiledInFull):
    architecture = "sm_80"
