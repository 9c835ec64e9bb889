"""The connections to an OpenEnv server, by OpenEnv's own client. Nothing here imports Tora: it runs in whichever
interpreter has `openenv`."""

from __future__ import annotations

_clients = {}
"""By the environment that they serve."""


async def ask(environment, base_url, operation, arguments):
    """`operation`: `reset` or `step`, with its keyword arguments. Returns observation, reward and whether the episode
    is over. `import` does no more than that, for which a reset's time limit would be short. Raises ImportError if
    OpenEnv is not installed."""
    from openenv.core.generic_client import GenericEnvClient  # pyright: ignore[reportMissingImports]

    if operation == "import":
        return {}, None, False
    client = _clients.get(environment)
    if client is None:
        client = GenericEnvClient(base_url=base_url)
        await client.connect()
        _clients[environment] = client
    result = await (client.reset(**arguments) if operation == "reset" else client.step(arguments))
    return result.observation, result.reward, result.done
