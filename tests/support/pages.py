"""The pages of the documentation, and the fenced blocks in them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
GENERATED = ("docs/config.md",)
"""Pages whose generator has tests of its own."""
WRITTEN = [page for page in PAGES if page.relative_to(ROOT).as_posix() not in GENERATED]
FENCE = re.compile(r"^```(\w*)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("tora", "actors", "learner", "configs", "deploy", "docs", "tests", "examples", ".github", ".ci")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. `file` is the file name after its language, if any."""

    page: Path
    language: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.file or self.text.splitlines()[0][:40]}"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(page, *match.groups()) for match in FENCE.finditer(page.read_text())]
    return [block for block in found if not languages or block.language in languages]


def every_block(*languages: str) -> list[Block]:
    return [block for page in WRITTEN for block in blocks(page, *languages)]


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


# Pages, links, paths and names.


def write_files(folder: Path, page: Path) -> None:
    """Writes the page's named blocks to `folder`, as its reader would."""
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
