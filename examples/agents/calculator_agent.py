"""An agent as one writes it for any OpenAI-compatible API: it answers questions with a calculator.

`tora run examples/agents/calculator.yaml` trains the model behind it. Nothing here is Tora's.
"""

from __future__ import annotations

import json
import re

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


async def solve(base_url: str, api_key: str, prompt: str, answer: str, **row) -> float:
    """1.0 if the answer is right."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": prompt}]
    for _ in range(3):
        reply = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
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
    said = re.search(r"<answer>(.*?)</answer>", message.content or "")
    return float(said is not None and said[1].strip() == str(answer))
