"""An environment of verifiers v1 as one writes it for any trainer: products, with a calculator. Nothing here is Tora's.

`tora run examples/agents/verifiers.yaml` trains the model in its only seat.
"""

import json
import random
import re

import verifiers.v1 as vf
from openai import AsyncOpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Work out an arithmetic expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "Such as 12 * 34."}},
                "required": ["expression"],
            },
        },
    }
]


def calculate(expression: str) -> str:
    first, second = re.fullmatch(r"\s*(\d+)\s*[*]\s*(\d+)\s*", expression).groups()
    return str(int(first) * int(second))


class MultiplyData(vf.TaskData):
    answer: str


class MultiplyTask(vf.Task[MultiplyData]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        said = re.search(r"<answer>(.*?)</answer>", trace.last_reply or "")
        return float(said is not None and said[1].strip() == self.data.answer)


class MultiplyConfig(vf.TasksetConfig):
    num_tasks: int = 4096
    seed: int = 0


class MultiplyTaskset(vf.Taskset[MultiplyTask, MultiplyConfig]):
    def load(self):
        rng = random.Random(self.config.seed)
        for _ in range(self.config.num_tasks):
            a, b = rng.randint(11, 99), rng.randint(11, 99)
            yield MultiplyTask(MultiplyData(prompt=f"What is {a} * {b} ?", answer=str(a * b)), self.config.task)


class MultiplyHarness(vf.Harness[vf.HarnessConfig]):
    """The agent's program, which runs in this process."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, tool_interception_url=None
    ) -> vf.ProgramResult:
        client = AsyncOpenAI(base_url=endpoint, api_key=secret)
        messages = [{"role": "user", "content": data.prompt}]
        for _ in range(3):
            reply = await client.chat.completions.create(model=ctx.model, messages=messages, tools=TOOLS)
            message = reply.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                try:
                    result = calculate(**json.loads(call.function.arguments))
                except Exception as error:  # whatever the model wrote
                    result = f"error: {error}"
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["MultiplyHarness", "MultiplyTaskset"]
