"""sm_100: its kernels, compiled without a GPU."""

from tests.kernels.test_ahead_of_time import Compiled


class TestSm100(Compiled):
    architecture = "sm_100"
