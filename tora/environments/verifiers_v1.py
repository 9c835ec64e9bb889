"""Environments of verifiers v1, in an interpreter that has them: `agent_python`. Nothing here imports Tora.

`verifiers` needs an `openai` of another major version than vLLM, so the two cannot be installed together.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os

_held = {}
"""Environments that serve, by their configs as JSON: a future of each, and the task that holds it."""


def _config_of(environment):
    from verifiers.v1.utils.loaders import resolve_env_config  # pyright: ignore[reportMissingImports]

    return resolve_env_config(environment)


def tasks(environment, first, count):
    """The tasks `first` to `first + count` of an environment's taskset as rows, for `tora.tasks.verifiers_v1.tasks`.
    `environment`: what `verifiers.v1` takes as its `env` table. `count` may be None."""
    import itertools

    from verifiers.v1.utils.loaders import load_taskset  # pyright: ignore[reportMissingImports]

    config = _config_of(environment)
    end = None if count is None else first + count
    chosen = itertools.islice(iter(load_taskset(config.taskset)), first, end)
    return [{"prompt": _messages(t.data), "environment": environment, "task": _wire(t.data)} for t in chosen]


def _wire(data):
    return data.model_dump(mode="json")


def _messages(data):
    """The prompt as chat messages, which is only shown: the environment's own program sends it to the policy."""
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    return [*system, {"role": "user", "content": data.prompt_text}]


async def play(base_url, api_key, environment, task, **row):
    """One episode of a task, with its environment's own program, tools and rewards. Returns the reward: the sum of the
    task's; of several agents' the mean of those that are trained. Raises RuntimeError if the episode fails."""
    from verifiers.v1.clients import EvalClientConfig, ModelContext  # pyright: ignore[reportMissingImports]
    from verifiers.v1.types import SamplingConfig  # pyright: ignore[reportMissingImports]

    env = await _serving(environment)
    variable = f"TORA_SESSION_{api_key}"
    os.environ[variable] = api_key  # the client takes a key from nowhere else
    try:
        client = EvalClientConfig(base_url=base_url, api_key_var=variable)
        context = ModelContext(client=client, model="policy", sampling=SamplingConfig())
        kind = type(env.taskset).task_type()
        (slot,) = env.slots(kind(kind.data_type().model_validate(task), env.config.taskset.task))
        episode = await env.run_slot(slot, context)
    finally:
        del os.environ[variable]
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not episode.ok:
        raise RuntimeError("; ".join(f"{e.type}: {e.message}" for e in errors) or "the episode failed")
    rewards = [trace.reward for trace in episode.traces if trace.agent.trainable]
    return sum(rewards) / len(rewards)


async def _serving(environment):
    """The environment, with its shared tools and what else it serves to all its episodes."""
    key = json.dumps(environment, sort_keys=True)
    if key not in _held:
        ready = asyncio.get_running_loop().create_future()
        _held[key] = ready, asyncio.create_task(_hold(environment, ready))
    try:
        return await asyncio.shield(_held[key][0])
    except Exception:
        _held.pop(key, None)  # the next episode tries again
        raise


async def _hold(environment, ready):
    from verifiers.v1.utils.loaders import load_environment  # pyright: ignore[reportMissingImports]

    try:
        env = load_environment(_config_of(environment))
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(env.serving())
            ready.set_result(env)
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # verifiers ends its process where a login is missing
        if ready.done():
            raise
        ready.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
