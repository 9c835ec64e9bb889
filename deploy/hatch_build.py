"""Adds a second copy of `tora/compat.py` to wheels, including editable ones, at the top of site-packages, and a `.pth`
file that makes every interpreter of the environment run it. See `tora/compat.py`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "tora_import_fixes"


class ImportFixes(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Includes copies from outside the project, because hatchling moves project files that it should include."""
        self._folder = Path(tempfile.mkdtemp())
        shutil.copy(Path(self.root, "tora", "compat.py"), self._folder / f"{MODULE}.py")
        (self._folder / f"{MODULE}.pth").write_text(f"import {MODULE}; {MODULE}.install()\n")
        for file in self._folder.iterdir():
            build_data["force_include"][str(file)] = file.name

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self._folder)
