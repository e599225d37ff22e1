"""Configurations; a package, so that Hydra finds them as pkg://tinyfusion_pl.conf wherever it is installed.

Importing it registers the resolvers that they use, for who composes them in Python.
"""

import tinyfusion_pl.cli.command_line  # noqa: F401
