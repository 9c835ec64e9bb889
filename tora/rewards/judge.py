"""A language model as the judge, behind any server with OpenAI's chat API: a hosted one, or vLLM on another machine."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tora.errors import ConfigError
from tora.rewards.functions import Completion, text_of

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0
INSTRUCTION = """\
Judge the answer to the question. Say briefly what is right and what is wrong, and end with one line `Score: N`, where N
is a number from 0 (useless) to 10 (perfect).

Question:
{prompt}

Answer:
{completion}
"""


class llm_judge:
    """Scores each completion by the number that a language model gives it, divided by `scale`.

    All completions of a group are judged concurrently, at most `concurrency` at once in the whole process. The same
    question is asked once. A request that the server refuses for the moment, or that does not reach it, is repeated
    `retries` times, after 0.5 s, 1 s, 2 s and so on. A completion without a score, because requests fail or because the
    judge's text has no number, raises: it is counted as a failed reward, and the others of its group keep their scores.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        instruction: str = INSTRUCTION,
        pattern: str = r"[Ss]core\s*:\s*\**\s*(-?\d+(?:\.\d+)?)",
        scale: float = 10.0,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        retries: int = 4,
        request_timeout_s: float = 60.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`url`: the API's base, such as `http://127.0.0.1:8000/v1`. `instruction`: the message to the judge, in which
        `{prompt}`, `{completion}` and the columns of the data, such as `{answer}`, are filled in. `pattern`: a regular
        expression whose group is the score; the last match counts. `api_key_env`: the environment variable with the
        key, which may be unset. `options`: further fields of the request; `temperature` is 0 unless they set it.

        Raises ConfigError if an argument is impossible.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"llm_judge: url={url!r} must begin with http:// or https://")
        if not scale or concurrency < 1 or retries < 0 or not request_timeout_s > 0:
            raise ConfigError(
                f"llm_judge: scale={scale}, concurrency={concurrency}, retries={retries} and request_timeout_s="
                f"{request_timeout_s}, expected scale other than 0, at least 1, at least 0 and more than 0"
            )
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"llm_judge: pattern={pattern!r} is no regular expression: {error}") from error
        if self._pattern.groups < 1:
            raise ConfigError(f"llm_judge: pattern={pattern!r} has no group in parentheses for the score")
        self._url, self._instruction, self._scale, self._retries = url.rstrip("/"), instruction, scale, retries
        self._request = {"model": model, "temperature": 0, **(options or {})}
        self._key = os.environ.get(api_key_env)
        self._timeout_s, self._concurrency = request_timeout_s, concurrency
        self._answers: dict[str, asyncio.Task[float]] = {}
        self._client: Any = None
        self._free: asyncio.Semaphore | None = None

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[float]:
        """One score per completion. Raises RuntimeError if one has none; those of the others are kept for later."""
        rows = range(len(completions))
        asked = [
            self._judged({key: column[i] for key, column in columns.items() if _is_column(column)}, prompts[i], text)
            for i, text in zip(rows, completions, strict=True)
        ]
        scores = await asyncio.gather(*asked, return_exceptions=True)
        for score in scores:
            if isinstance(score, BaseException):
                raise score
        return [score for score in scores if not isinstance(score, BaseException)]

    async def _judged(self, row: Mapping[str, Any], prompt: Any, completion: Completion) -> float:
        question = _filled(self._instruction, {**row, "prompt": _text(prompt), "completion": text_of(completion)})
        task = self._answers.get(question)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._answers[question] = asyncio.create_task(self._ask(question))
        return await asyncio.shield(task)

    async def _ask(self, question: str) -> float:
        if self._free is None:
            self._free = asyncio.Semaphore(self._concurrency)
        async with self._free:
            text = await self._answer(question)
        found = self._pattern.findall(text)
        if not found:
            pattern = self._pattern.pattern
            raise RuntimeError(f"the judge's answer has no score, which matches {pattern!r}: {text[-200:]!r}")
        last = found[-1] if isinstance(found[-1], str) else next(filter(None, found[-1]), "")
        return float(last) / self._scale

    async def _answer(self, question: str) -> str:
        import httpx2

        if self._client is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._client = httpx2.AsyncClient(headers=headers, timeout=self._timeout_s, trust_env=True)
        body = {**self._request, "messages": [{"role": "user", "content": question}]}
        for attempt in range(self._retries + 1):
            try:
                response = await self._client.post(f"{self._url}/chat/completions", json=body)
                if response.status_code == 200:
                    return str(response.json()["choices"][0]["message"]["content"] or "")
                reason = f"answered {response.status_code}: {response.text[:200]}"
                if response.status_code not in _RETRIED:
                    break
            except (httpx2.HTTPError, json.JSONDecodeError, LookupError, TypeError) as error:
                reason = f"gave no answer: {type(error).__name__}: {error}"
            if attempt < self._retries:
                await asyncio.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt))
        raise RuntimeError(f"the judge at {self._url} {reason}")


def _is_column(value: Any) -> bool:
    """A column of the data, unlike TRL's `trainer_state`, `log_metric` and `log_extra`."""
    return isinstance(value, list)


def _filled(instruction: str, values: Mapping[str, Any]) -> str:
    """Only known names are filled in, so that braces in the instruction need no escape."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: str(values[match[1]]), instruction)


def _text(prompt: Any) -> str:
    """A conversation with a line per role; the text of a single message alone."""
    if isinstance(prompt, str):
        return prompt
    contents = [_content(message.get("content")) for message in prompt]
    if len(contents) == 1:
        return contents[0]
    roles = (str(message.get("role")) for message in prompt)
    return "\n\n".join(f"{role}: {content}" for role, content in zip(roles, contents, strict=True))


def _content(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", f"<{part.get('type')}>")) for part in content)
    return str(content or "")
