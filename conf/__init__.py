"""Configurations: a package, so that Hydra finds them as pkg://tinyfusion_pl.conf.

Importing it registers the resolvers that they use, so that they can also be composed in Python.
"""

import tinyfusion_pl.cli.command_line  # noqa: F401  (registers the resolvers that main.yaml uses)
