"""`tora ls`: our configs by family, each with a line that says what it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

_TITLES = {
    "": "Quick-starts: tiny models, on a CPU in minutes",
    "smollm2": "SmolLM2: a pretrained model that a CPU can train",
    "qwen3": "Qwen3",
    "qwen2_5": "Qwen2.5",
    "qwen3_vl": "Qwen3-VL, with images",
    "llama3_1": "Llama 3.1",
    "llama3_2": "Llama 3.2",
}
_METHODS = {"full": "all weights", "lora": "LoRA or DoRA", "qlora": "QLoRA", "dora": "DoRA", "qdora": "QDoRA"}


def listing(names: list[str], configs: Path) -> Iterator[str]:
    """The lines. `names` as `config_names` gives them, `configs`: their folder."""
    width = max(map(len, names))
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rpartition("/")[0], []).append(name)
    for family in sorted(families, key=lambda f: [*_TITLES].index(f) if f in _TITLES else len(_TITLES)):
        yield _TITLES.get(family, family)
        for name in families[family]:
            text = f"  {name:{width}}  {_description(name, configs / f'{name}.yaml')}"
            most = max(40, shutil.get_terminal_size((120, 24)).columns)
            yield text if len(text) <= most else f"{text[: most - 3]}..."
        yield ""
    yield "tora run NAME trains, tora cp NAME FILE makes a copy to edit, tora help KEY explains a key."


def _description(name: str, file: Path) -> str:
    """The file's first sentence; made of its name where it has none."""
    first = file.read_text().splitlines()[0]
    if first.startswith("# "):
        sentence = first.removeprefix("# ").strip()
        if not sentence.startswith(("tune ", "tora ")):
            return sentence.partition(". ")[0]
    size, _, rest = name.rpartition("/")[2].partition("_")
    method = _METHODS.get(rest.partition("_")[0], rest)
    return f"{size}, {method}, {'one device' if rest.endswith('single_device') else 'several GPUs'}"
