"""What is run on a GPU: `python -m bench.gpu smoke`, two and a half minutes, then `python -m bench.gpu full`, seven."""
