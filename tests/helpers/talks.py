"""A conversation, and tokenizers of other habits, for the tests of encoding."""

from __future__ import annotations

from typing import Any

from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Example
from raymem.training.data.packed.pack import Encoded

PLACE = "x.jsonl:17"


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TALK = [
    turn("system", "the first"),
    turn("user", "question one"),
    turn("assistant", "answer two\nthree"),
    turn("user", "question four"),
    turn("assistant", "five"),
    turn("user", "six"),
]


def encoded(encoder: Encoder, example: Example) -> Encoded:
    """The one encoded example that an example gives."""
    ((only,),) = encoder.encode([example], [PLACE])
    return only


def targeted(tokenizer: Any, example: Encoded) -> str:
    return str(tokenizer.decode(example.input_ids[example.targets]))


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_template(tokenizer: Any, template: str | None) -> Any:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def sentencepiece_like() -> Any:
    """A tokenizer as Llama 2 has it: begins with <s>, a space in front of words is part of them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *sorted({*"\u2581abcdeglnorsuwy:"} | {"\n"})]
    merges = [("\u2581", "y"), ("\u2581y", "e"), ("\u2581ye", "s"), ("y", "e"), ("ye", "s")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
