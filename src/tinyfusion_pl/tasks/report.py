"""Stage 4: figures and a page that a browser opens offline."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.report import write_report
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say


@dataclass(kw_only=True)
class Report:
    """Draws what the run folder holds."""

    def check(self, inputs: Inputs) -> None:
        """Nothing can be wrong beforehand."""

    @rank_zero_only
    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        say(f"report: figures and page go to {folder / 'report.html'}")
        say(f"Done. Open {write_report(folder.path)}")
