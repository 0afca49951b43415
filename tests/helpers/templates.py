"""Chat templates in the shapes that models of today have, and a tokenizer that knows the tokens of all of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

CALL: dict[str, Any] = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "a word", "parameters": {"type": "object"}}}

TOKENS = (
    "<s>", "</s>", "<pad>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|role|>", "<|eot|>", "<start>",
    "<stop>", "[INST]", "[/INST]", "[TOOL]", "[/TOOL]", "<|User|>", "<|Assistant|>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>",
)  # fmt: skip
WORDS = "question answer thought one two three blue sky look_up word user assistant system tool think channel final\n\n"


@functools.cache
def _backend() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([f"{a} {b}\n{a}:\n\n<{b}>{a}" for a in WORDS.split() for b in WORDS.split()], trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return str(backend.to_str())


def tokenizer_for(template: str, eos: str) -> Any:
    """A tokenizer with this template and end token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()), eos_token=eos, pad_token="<pad>", chat_template=template
    )


@dataclass(frozen=True)
class Shape:
    """A template and what is special about it."""

    template: str
    stops: tuple[str, ...]
    """Tokens that may end a turn."""
    eos: str
    examples: int = 1
    """How many examples the conversation of the tests becomes."""
    reasons: bool = True
    """Whether the template has a place for reasoning."""


CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "<s>{% for m in messages %}<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|role|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|role|>\n\n{% endif %}"
)
# No system turn: its text stands in the first user's turn. The assistant has another name.
NO_SYSTEM = (
    "<s>{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ (m.content or '') | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
# The system's text moves along to the last user's turn, and nothing prompts for a turn.
BRACKETS = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {% if m is sameas users[-1] and "
    "messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL]{{ m.content }}[/TOOL]"
    "{% elif m.role == 'assistant' %} {{ (m.tool_calls[0].function | tojson) if m.tool_calls else m.content }}</s>"
    "{% endif %}{% endfor %}"
)
# Thoughts are written behind the last question only, and there an empty one too.
LAST_THOUGHT = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set text = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought.strip() }}\n</think>\n\n{% endif %}{{ text }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought, finished turns have none.
OPENS_THOUGHT = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|User|>"
    "{{ m.content }}{% elif m.role == 'tool' %}[TOOL]{{ m.content }}[/TOOL]{% else %}<|Assistant|>"
    "{{ (m.content or '').split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
NO_END = (
    "[{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As NO_END, and thoughts of earlier answers are left out.
NO_END_THOUGHT = NO_END.replace(
    "{{ m.content or '' }}",
    "{% if m.reasoning_content and loop.index0 > (messages | map(attribute='role') | list | join(' ')).split(' ')"
    ".index('user') and not (messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list) %}"
    "<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content or '' }}",
)
# Thoughts and answers on channels, and another end where nothing follows.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set later = messages[loop.index0 + 1:] | "
    "selectattr('role', 'equalto', 'user') | list %}"
    "{% if m.thinking and not later %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to={{ m.tool_calls[0].function.name }}<|channel|>commentary<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Finished conversations close with the end of the sequence.
CLOSED = (
    "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# A thought is open in the generation prompt; finished turns begin with an empty one; earlier thoughts are cut out.
ALWAYS_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set later = messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list %}"
    "<think>{% if m.reasoning_content and not later %}{{ '\n' + m.reasoning_content + '\n' }}{% endif %}</think>"
    "{% endif %}"
    "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The generation prompt says that there is nothing to think.
CLOSED_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")

SHAPES: dict[str, Shape] = {
    "chatml": Shape(CHATML, ("<|im_end|>",), "<|im_end|>", reasons=False),
    "chatml, base model": Shape(CHATML, ("<|im_end|>",), "</s>", reasons=False),
    "headers": Shape(HEADERS, ("<|eot|>",), "</s>", reasons=False),
    "no system": Shape(NO_SYSTEM, ("<stop>",), "</s>", reasons=False),
    "brackets": Shape(BRACKETS, ("</s>",), "</s>", examples=2, reasons=False),
    "last thought": Shape(LAST_THOUGHT, ("<|im_end|>",), "<|im_end|>", examples=2),
    "opens thought": Shape(OPENS_THOUGHT, ("</s>",), "</s>", examples=3),
    "no end": Shape(NO_END, ("<|user|>", "<|observation|>", "</s>"), "</s>", reasons=False),
    "no end, thoughts": Shape(NO_END_THOUGHT, ("<|user|>", "<|observation|>", "</s>"), "</s>", examples=2),
    "channels": Shape(CHANNELS, ("<|call|>", "<|return|>", "<|end|>"), "<|return|>", examples=2),
    "closed": Shape(CLOSED, ("<|end|>",), "</s>", reasons=False),
    "always a thought": Shape(ALWAYS_THOUGHT, ("<|im_end|>",), "<|im_end|>", examples=2),
    "closed thought": Shape(CLOSED_THOUGHT, ("<|im_end|>",), "<|im_end|>", examples=3, reasons=False),
}

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "think first"},
    {"role": "user", "content": "question one"},
    {"role": "assistant", "content": None, "reasoning_content": "thought one", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "answer two", "reasoning_content": "thought two"},
    {"role": "user", "content": "question three"},
    {"role": "assistant", "content": "answer three", "reasoning_content": "thought three"},
]
"""Three turns of the assistant, with a system turn, a call, and reasoning."""
