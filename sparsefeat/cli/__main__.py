"""`python -m sparsefeat.cli`, the same as `sparsefeat`."""

from sparsefeat.cli import app

app(prog_name="sparsefeat")
