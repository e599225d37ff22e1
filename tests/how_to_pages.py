"""The code blocks of the pages in docs/how_to."""

import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "how_to"


def code_blocks(page: str, language: str) -> list[str]:
    text = (FOLDER / f"{page}.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
