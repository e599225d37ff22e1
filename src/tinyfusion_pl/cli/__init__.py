"""The command line: ``tinyfusion``, or equivalently ``python -m tinyfusion_pl``."""

import os

# Before torch is imported. OpenMP threads that spin at barriers slow training tenfold as soon as
# anything else runs on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tinyfusion_pl.cli.command_line import COMMANDS, main
from tinyfusion_pl.cli.run_identity import config_hash

__all__ = ["COMMANDS", "config_hash", "main"]
