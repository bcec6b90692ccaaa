"""The command line: `sparsefeat --help`. `commands/` has one file a command, `app.py` names them.

Every command takes any diffusers folder or hub id; the embedded pipeline and its SAEs are the default.

A command checks what it was given before it imports torch or diffusers, so that a mistake is told at once: this is why
commands import inside their functions. Exit codes: 0, done; 2, what was asked for cannot be (an option, an argument, a
file that one of them names); 1, it could not be done (disk, memory, network), or a check failed; 130 and 143, it was
interrupted or ended from outside. Errors are one sentence on stderr; results and only results are on stdout.
"""

from sparsefeat.cli.app import app

__all__ = ["app"]
