"""The text between the turns of an episode: as one whole rendering has it, and refused where no such text exists."""

from __future__ import annotations

import pytest
from agents import SCHEMA, TEMPLATE
from tiny import END, PAD, make_tokenizer

from tora.environments.content import Content
from tora.environments.template import TurnTemplate
from tora.errors import ConfigError

QUESTION = "Guess my number."


def make(template: str | None = TEMPLATE) -> TurnTemplate:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (END, PAD)]
    return TurnTemplate(tokenizer, [SCHEMA], stops)


@pytest.mark.parametrize("observation", [None, "", " It is odd.", "\n\nIt is ünfair <|im_start|>."])
@pytest.mark.parametrize(
    "source", [QUESTION, [{"role": "system", "content": "Play."}, {"role": "user", "content": ""}]]
)
def test_an_episode_put_together_is_the_whole_conversation(source, observation: str | None) -> None:
    """Token for token what the template makes of the conversation at once."""
    template, tokenizer = make(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [dict(m) for m in ([{"role": "user", "content": source}] if isinstance(source, str) else source)]
    messages[-1]["content"] += observation or ""
    ids = [*template.prompt(source), *template.opening(source, observation and Content(observation))]
    for turn, answers in (("I look.", ["1"]), ("Twice.", ["2", ""]), ("  odd \n spaces\n", ["<|im_end|>"])):
        ids += tokenizer(turn)["input_ids"] + [tokenizer.eos_token_id]
        results = [{"role": "tool", "name": "look", "content": answer} for answer in answers]
        ids += template.answers(results)
        messages += [{"role": "assistant", "content": turn}, *results]
        whole = tokenizer.apply_chat_template(
            messages, tools=[SCHEMA], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert ids == list(whole["input_ids"])


def test_the_prompt_does_not_depend_on_the_observation() -> None:
    template = make()
    text = make_tokenizer().decode(template.prompt(QUESTION))
    assert text.endswith(f"user\n{QUESTION}") and "look" in text


STRIPS = TEMPLATE.replace(
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    ("{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endif %}{% endfor %}"),
)
FORGETS = TEMPLATE.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    (
        "<|im_start|>{{ m.role }}\n{% if m.role == 'user' or loop.index > loop.length - 2 %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endif %}{% endfor %}"
    ),
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has none"),
        (STRIPS, "rewrites the turns"),
        (FORGETS, "rewrites the turns"),
        (TEMPLATE.replace("{{ t | tojson }}", ""), "look is not in the prompt"),
        (TEMPLATE.replace("<|im_end|>\n", "</s>\n"), "none of the model's stop tokens"),
        ("{{ raise_exception('no tools') }}", "cannot render a conversation with tools: no tools"),
    ],
)
def test_a_template_that_cannot_carry_episodes_is_refused(template: str | None, message: str) -> None:
    assert STRIPS != TEMPLATE != FORGETS
    with pytest.raises(ConfigError, match=message):
        make(template)


@pytest.mark.parametrize("source", [[], [{"role": "user", "content": [{"type": "text", "text": "a"}]}]])
def test_a_prompt_must_end_in_text(source) -> None:
    with pytest.raises(ConfigError, match="must end in a message of text"):
        make().prompt(source)


def test_a_template_that_begins_the_reasoning_itself() -> None:
    begun = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    template = make(begun)
    assert make_tokenizer().decode(template.opening(QUESTION, None)).endswith("assistant\n<think>\n")
