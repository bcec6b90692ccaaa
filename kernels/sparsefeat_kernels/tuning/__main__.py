"""`python -m sparsefeat_kernels.tuning`."""

from .measure import main

main()
