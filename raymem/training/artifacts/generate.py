"""Generates text with an artefact: continues a text, or answers a conversation in the tokenizer's chat template.

What the model reads is made as training makes it: the template's rendering with the generation prompt, one begin token
where the tokenizer adds one, and every token that ends an assistant's turn ends the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from raymem.errors import ModelError
from raymem.training.artifacts.load import load_artifact
from raymem.training.data.chat.template import Template, Turn
from raymem.training.dist_env import DistEnv

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """What a model wrote."""

    text: str
    """The text without the tokens that end it."""
    is_whole: bool
    """Whether the model itself ended it, rather than the limit on new tokens."""


def stop_ids(model: Any, tokenizer: Any, template: Template) -> list[int]:
    """Return the ids of all tokens that end what a model writes, in order.

    These are the end tokens of the tokenizer and of the generation configs, and of a chat template the token behind an
    assistant's turn; where it writes none, the marker of the turn that follows, with which training ends such a turn.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *getattr(tokenizer, "stop_ids", ())}
    ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
    if template.exists:
        tokens = sorted({*template.stops, *filter(None, [template.user_marker])})
        ids |= {token for token in tokenizer.convert_tokens_to_ids(tokens) if token != tokenizer.unk_token_id}
    return sorted(token for token in ids if isinstance(token, int) and token >= 0)


def prompt_ids(tokenizer: Any, text: str, *, rendered: bool) -> list[int]:
    """Tokenise what a model is to go on from, as training does.

    Args:
        rendered: a chat template wrote the text, and its begin token if it has one; else that is ours to add.
    """
    backend, begin = tokenizer.backend_tokenizer, tokenizer.bos_token_id
    ids = list(backend.encode(text, add_special_tokens=False).ids)
    if begin is None or backend.encode("a").ids[:1] != [begin]:
        return ids
    written = next((at for at, token in enumerate(ids) if token != begin), len(ids))
    return [begin] * (written > 0 or not rendered) + ids[written:]


@torch.no_grad()
def continued(
    model: Any, tokenizer: Any, ids: Sequence[int], stops: Collection[int], *, max_new_tokens: int,
    temperature: float = 0.0, streamer: Any = None,
) -> list[int]:  # fmt: skip
    """Return the ids that a model puts behind a prompt, with the one that ends them if there is one.

    Ranks that share a model take part in each of its forward passes, and must draw from streams seeded alike; all get
    the same ids.

    Args:
        temperature: 0 always takes the likeliest token.
        streamer: of transformers; gets the ids as they come.
    """
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = _generated(
        model, tokenizer, [ids], stops, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
    )  # fmt: skip
    return output[0]


@torch.no_grad()
def continued_all(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], stops: Collection[int], *, max_new_tokens: int
) -> list[list[int]]:
    """Return what :func:`continued` would of each prompt, greedily, in one batch; without the tokens that end them.

    Products of other shapes round otherwise, so a close choice of a token may differ from that of one prompt alone.
    """
    answers = _generated(model, tokenizer, prompts, stops, max_new_tokens=max_new_tokens, do_sample=False)
    return [ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))] for ids in answers]


def _generated(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], stops: Collection[int], **options: Any
) -> list[list[int]]:
    """Return the ids that ``model.generate`` puts behind prompts, which are padded on the left."""
    device = next(model.parameters()).device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    output = model.generate(
        input_ids=torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=device),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        trust_remote_code=False,
        logits_processor=[_of_rank_0] if isinstance(model, FSDPModule) else None,
        **options,
    )
    return [list(map(int, row)) for row in output[:, longest:]]


def _of_rank_0(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Give every rank the logits of rank 0: one that rounded otherwise would stop elsewhere, and the others wait."""
    scores = scores.contiguous()
    dist.broadcast(scores, src=0)
    return scores


class Responder:
    """A loaded model that continues texts and answers conversations.

    Args:
        directory: of an adapter or a model.
        dist_env: if it is sharded, the workers share the model, and all of them make the same calls.

    Raises:
        ModelError: see :func:`raymem.training.artifacts.load.load_artifact`.
    """

    def __init__(self, directory: str | Path, dist_env: DistEnv | None = None) -> None:
        self.name = str(directory)
        model, self.tokenizer = load_artifact(directory, dist_env=dist_env)
        self.model = model
        if dist_env is None or not dist_env.sharded:
            self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.template = Template(self.tokenizer, self.name)
        self.stops = stop_ids(model, self.tokenizer, self.template)

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and answer may have together; None where the model has no such limit."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    def read_text(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued.

        Raises:
            ModelError: it is empty, or longer than the model's context.
        """
        ids = prompt_ids(self.tokenizer, text, rendered=False)
        if not ids:
            raise ModelError("--prompt: it is empty; give the beginning of a text")
        return self._fitting(ids)

    def require_template(self) -> None:
        """Raise ModelError if the tokenizer has no chat template."""
        if not self.template.exists:
            raise ModelError(
                f"the tokenizer of {self.name} has no chat template, so that its model cannot be talked to; continue "
                f"texts with it: raymem generate {self.name} --prompt TEXT"
            )

    def read_turns(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids with which the template asks for the answer to a conversation.

        Raises:
            ModelError: the tokenizer has no chat template, or the conversation is longer than the model's context.
            DataError: the template refuses the conversation.
        """
        self.require_template()
        (text,) = self.template.render([turns], None, "the conversation", add_generation_prompt=True)
        return self._fitting(prompt_ids(self.tokenizer, text, rendered=True))

    def _fitting(self, ids: list[int]) -> list[int]:
        if self.context is not None and len(ids) >= self.context:
            raise ContextFull(
                f"the prompt is {len(ids)} tokens long, and the model's context of {self.context} tokens has to hold "
                "the answer too; shorten it"
            )
        return ids

    def respond(
        self, ids: Sequence[int], *, max_new_tokens: int, temperature: float, on_text: OnText | None = None
    ) -> Generated:
        """Write behind a prompt; at most as much as the context has room for.

        Args:
            temperature: 0 always takes the likeliest token; else PyTorch's global stream decides.
            on_text: gets the text in pieces as it comes.
        """
        if self.context is not None:
            max_new_tokens = min(max_new_tokens, self.context - len(ids))
        streamer = None if on_text is None else _streamer(self.tokenizer, self.stops, on_text)
        new = continued(
            self.model, self.tokenizer, ids, self.stops,
            max_new_tokens=max_new_tokens, temperature=temperature, streamer=streamer,
        )  # fmt: skip
        is_whole = bool(new) and new[-1] in self.stops
        text = self.tokenizer.decode(new[:-1] if is_whole else new, skip_special_tokens=True)
        return Generated(str(text), is_whole)


class ContextFull(ModelError):
    """A prompt is longer than the model's context."""


def generate(
    directory: str | Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, raw: bool = False,
    system: str | None = None, dist_env: DistEnv | None = None,
) -> Generated:  # fmt: skip
    """Answer a prompt in the chat template, if the tokenizer has one, or continue it as a text.

    Args:
        temperature: 0 is greedy.
        raw: continue it even if there is a template.
        system: what the conversation begins with.
        dist_env: see :class:`Responder`.

    Raises:
        ModelError: see :class:`Responder` and its methods; or a system text without a template.
        DataError: the template takes no system text.
    """
    responder = Responder(directory, dist_env)
    if raw or not responder.template.exists:
        if system is not None:
            why = "--raw leaves the chat template off" if raw else f"the tokenizer of {directory} has no chat template"
            raise ModelError(f"--system: {why}, so that there is no place for it; write it into --prompt")
        ids = responder.read_text(prompt)
    else:
        turns = [{"role": "system", "content": system}] if system is not None else []
        ids = responder.read_turns([*turns, {"role": "user", "content": prompt}])
    torch.manual_seed(seed)
    found = responder.respond(ids, max_new_tokens=max_new_tokens, temperature=temperature)
    return found if raw or not responder.template.exists else Generated(found.text.strip(), found.is_whole)


def _streamer(tokenizer: Any, stops: Collection[int], on_text: OnText) -> Any:
    """Return a streamer of transformers that hands on whole words, without the tokens that end the text."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in stops:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
