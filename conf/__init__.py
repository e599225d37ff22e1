"""Configurations; a package, so that Hydra finds them as pkg://tinyfusion_pl.conf wherever it is installed."""
