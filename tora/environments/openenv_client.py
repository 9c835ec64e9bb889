"""The connections to an OpenEnv server, by OpenEnv's own client. Nothing here imports Tora: it runs in whichever
interpreter has `openenv`."""

from __future__ import annotations

_clients = {}
"""By the environment that they serve."""


async def ask(environment, base_url, operation, arguments):
    """`operation`: `reset` or `step`, with its keyword arguments. Returns observation, reward and whether the episode
    is over."""
    from openenv.core.generic_client import GenericEnvClient  # pyright: ignore[reportMissingImports]

    client = _clients.get(environment)
    if client is None:
        client = GenericEnvClient(base_url=base_url)
        await client.connect()
        _clients[environment] = client
    result = await (client.reset(**arguments) if operation == "reset" else client.step(arguments))
    return result.observation, result.reward, result.done


def check():
    """Raises ImportError if OpenEnv is not installed."""
    import openenv.core.generic_client  # noqa: F401  # pyright: ignore[reportMissingImports]
