"""Every part of vLLM that its documentation does not promise and that Tora uses, with the reason.

Imports neither vLLM nor torch. `tests/unit/test_vllm_internals.py` finds each in the installed vLLM's source, and fails
on an import that is not listed. `python -m actors.vllm_engine.internals FOLDER` looks for them in another version's
source, such as that of an unpacked wheel.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

TESTED = ("0.32",)
"""Versions that the tests have run with."""
READ = {"0.33": "each name below is in its source; a dozen of the files were compared and differ in nothing here"}
"""Versions of which that alone is true."""

INTERNALS: Mapping[str, str] = {
    # starting and stopping an engine in this process
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "the config is made first, so that it can name the GPU",
    "vllm.config:VllmConfig": "type of that config",
    "vllm.config.device:DeviceConfig.device": "which GPU the in-process executor uses; no argument sets it",
    "vllm.v1.executor.uniproc_executor:UniProcExecutor._distributed_args": "reads the GPU's index from that device",
    "vllm.v1.executor:Executor": "LLMEngine asks for one",
    "vllm.v1.executor.abstract:Executor.get_class": "the one that fits the config",
    "vllm.v1.engine.llm_engine:LLMEngine": "an engine that its caller steps",
    "vllm.v1.engine.llm_engine:LLMEngine.collective_rpc": "calls the worker extension",
    "vllm.v1.engine.llm_engine:LLMEngine.set_weight_version": "labels tokens with the version that sampled them",
    "vllm.v1.engine.llm_engine:LLMEngine.renderer": "expands images as vLLM does",
    "vllm.v1.engine.llm_engine:LLMEngine.sleep": "pauses the scheduler, which freeing the cache asks for",
    "vllm.v1.engine.llm_engine:LLMEngine.release_kv_cache_memory": "frees the cache alone while a learner steps",
    "vllm.v1.engine.llm_engine:LLMEngine.wake_up": "maps it again",
    "vllm.v1.core.sched.scheduler:Scheduler.has_requests": "whether its workers know of all that has finished",
    "vllm.v1.engine.core:EngineCore.batch_queue": "steps that are under way",
    "vllm.v1.engine.core:cleanup_dist_env_and_memory": "would destroy the learner's process group",
    "vllm.distributed.parallel_state:GroupCoordinator": "vLLM's own groups, destroyed beside the learner's",
    "vllm.distributed.parallel_state:_NODE_COUNT": "forgotten, or a later engine would believe it",
    "vllm.model_executor.models.registry:_run_in_subprocess": "would start a Python without Tora's import fixes",
    "vllm.usage.usage_lib:UsageContext": "LLMEngine asks for it",
    "vllm.platforms:current_platform": "whether vLLM runs on a CPU",
    "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper": "the LoRA product on a CPU has no setting",
    # requests and versions
    "vllm.inputs:tokens_input": "a prompt as token ids",
    "vllm.inputs:EngineInput": "type of a prompt",
    "vllm.multimodal.inputs:PlaceholderRange": "where an image's features go among a prompt's tokens",
    "vllm.exceptions:VLLMClientError": "what a rejected request raises",
    "vllm.sampling_params:RequestOutputKind": "outputs of finished requests alone",
    "vllm.lora.model_manager:process_packed_modules_mapping": "splits layers that a model's files have whole",
    "vllm.model_executor.layers.fused_moe.layer:FusedMoEConfig": "says that experts have adapters where none have",
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig": "the same class",
    "vllm.lora.request:LoRARequest": "names the adapter of a request",
    "vllm.config.lora:MaxLoRARanks": "the ranks that vLLM serves",
    "vllm.v1.core.sched.scheduler:Scheduler.requests": "occupancy, and requests that move to a new version",
    "vllm.v1.core.sched.scheduler:Scheduler.kv_cache_manager": "occupancy, and the size of a hashed block",
    "vllm.v1.request:Request.block_hashes": "a continued request's further blocks get a name of their own",
    "vllm.v1.request:Request.update_block_hashes": "and are hashed again",
    "vllm.v1.request:Request.num_computed_tokens": "whether a request has begun",
    "vllm.v1.request:Request.mm_features": "cached outputs of an adapted tower are named after the adapter",
    # adapters
    "vllm.lora.model_manager:LoRAModelManager.modules": "the layers that carry adapters",
    "vllm.lora.model_manager:LoRAModelManager.packed_modules": "which modules a layer packs",
    "vllm.lora.model_manager:LoRAModelManager.lora_index_to_id": "which slot an adapter's id has",
    "vllm.lora.model_manager:LoRAModelManager._registered_adapters": "an id without a file on disk",
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": "gives an id its slot",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.lora_manager": "the way to the slots, in both runners",
    "vllm.lora.worker_manager:WorkerLoRAManager._adapter_manager": "the manager of the slots",
    "vllm.lora.lora_model:LoRAModel": "an empty adapter under an id",
    "vllm.lora.utils:_all_lora_classes": "the factory of LoRA layers has no hook for DoRA's",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": "base of DoRA's layers",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": "where B A x is added",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_async_impl": "the same on a second stream",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.lora_a_stacked": "A of every slot",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.lora_b_stacked": "B of every slot",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase._token_lora_indices": "each token's slot, at one address",
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": "base of the grouped product on a CPU",
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.add_lora_linear": "float32, which its kernels refuse",
    "vllm.model_executor.layers.linear:LinearBase": "its weight is the learner's too",
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": "the same, of embedding and head",
    "vllm.model_executor.layers.linear:RowParallelLinear": "its first rank alone adds the bias",
    "vllm.config:get_current_vllm_config": "whether adapters may have gains, while the model is built",
    "vllm.model_executor.models.registry:ModelRegistry": "whether vLLM has a model of an architecture",
    # whole weights
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": "replaces the served weights",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": "a tied head is repacked on a CPU",
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": "finds that head",
    # log-probs
    "vllm.v1.sample.sampler:Sampler.forward": "reports the policy beside the distribution drawn from",
    "vllm.v1.sample.sampler:batched_count_greater_than": "is compiled for ranks that nobody reads",
    "vllm.triton_utils:HAS_TRITON": "whether there is a second model runner, with a sampler of its own",
    "vllm.v1.worker.gpu.sample.sampler:Sampler.__call__": "the same as Sampler.forward in Model Runner V2",
    "vllm.v1.worker.gpu.sample.sampler:Sampler.sampling_states": "the temperatures there",
    # tools
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": "vLLM's parsers of tool calls ask for it",
    "vllm.tool_parsers:ToolParserManager": "finds such a parser by name",
}
"""By `module:Name` or `module:Class.attribute`."""


def warning(version: str) -> str | None:
    """A line on a vLLM that the tests have not run with; None for one that they have."""
    minor = ".".join(version.split(".")[:2])
    if minor in TESTED:
        return None
    known = READ.get(minor, "Tora's use of its internals is not tested with it")
    return f"vLLM {version} is not a version that Tora was tested with, {' or '.join(TESTED)}: {known}."


def missing(folder: Path) -> list[str]:
    """The internals that the source in a folder, which holds `vllm`, does not have."""
    return [name for name in INTERNALS if not _has(folder, *name.split(":"))]


def _has(folder: Path, module: str, name: str) -> bool:
    outer, _, inner = name.partition(".")
    found = _names(folder, module)
    return outer in found and (not inner or inner in _members(folder, module, outer))


@cache
def _tree(folder: Path, module: str) -> ast.Module | None:
    path = folder.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text())
    return None


def _names(folder: Path, module: str) -> set[str]:
    """What a module defines, assigns or imports, in any of its branches."""
    tree = _tree(folder, module)
    return set() if tree is None else {name for node in ast.walk(tree) for name in _bound(node)}


def _bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        yield node.value  # names of `__getattr__` and of lazy imports


def _members(folder: Path, module: str, name: str) -> set[str]:
    """A class's methods, fields and attributes, and those of a class that is imported under the name."""
    tree = _tree(folder, module)
    assert tree is not None
    members: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for part in ast.walk(node):
                members.update(_bound(part))
                if isinstance(part, ast.Attribute):
                    members.add(part.attr)
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            members |= _members(folder, node.module, name) if _tree(folder, node.module) else set()
    return members


if __name__ == "__main__":
    gone = missing(Path(sys.argv[1]))
    print("\n".join(gone) or f"all {len(INTERNALS)} are there")
    sys.exit(bool(gone))
