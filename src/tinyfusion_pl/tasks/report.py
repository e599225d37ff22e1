"""Stage 4: figures, and a report page that a browser opens offline."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.checksums import Damaged
from tinyfusion_pl.report import write_report
from tinyfusion_pl.report.reading import DECISIONS, METRICS, RECORD, SAMPLES
from tinyfusion_pl.tasks.folder import Inputs, RunFolder, say
from tinyfusion_pl.tasks.origins import changed_files

READ = (DECISIONS, METRICS, RECORD, SAMPLES)  # and all logs


@dataclass(kw_only=True)
class Report:
    """The report of the run folder."""

    def check(self, inputs: Inputs) -> None:
        """Do nothing: the report has no settings."""

    @rank_zero_only
    def run(self, folder: RunFolder, inputs: Inputs) -> None:
        """Write the figures and the page."""
        self.check_files(folder)
        say(f"report: writing figures and {folder / 'report.html'}")
        say(f"Done. Open {write_report(folder.path)}")

    def check_files(self, folder: RunFolder) -> None:
        """Report files of finished stages that are missing or have changed."""
        for stage in ("learn_mask", "recover", "evaluate"):
            try:
                done = folder.result(stage) or {}
            except Damaged as error:
                say(f"report: {error}")
                continue
            left = {
                name: checksum for name, checksum in done.get("files", {}).items() if name in READ
            } | done.get("logs", {})
            for name, what in changed_files(folder, left).items():
                say(
                    f"report: {folder / name} is {what} since {stage} finished; the page shows the "
                    f"current content. Rerun task={stage}"
                )
