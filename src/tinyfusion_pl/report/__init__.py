"""Pictures, page and comparison of run folders.

Reads only files of the folder, so it works on a finished, an interrupted and a copied run.
"""

from .compare import compare
from .grid import write_grid
from .page import write_report
from .words import headline

__all__ = ["compare", "headline", "write_grid", "write_report"]
