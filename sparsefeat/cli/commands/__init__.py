"""A file a command: each holds one function of the command's name, listed in `sparsefeat/cli/app.py`."""
