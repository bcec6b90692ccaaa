"""The encoders as Triton kernels: pre-activations through a scratch, candidates in registers, a bf16 prefilter, thresholds."""
