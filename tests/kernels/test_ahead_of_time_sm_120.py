"""sm_120: the encoders, compiled without a GPU. For the other kernels the older ones stand."""

from tests.kernels.test_ahead_of_time import ENCODERS, Compiled


class TestSm120(Compiled):
    architecture = "sm_120"
    kernels = ENCODERS
