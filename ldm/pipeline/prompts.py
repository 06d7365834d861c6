"""Prompts of a call: checked, and what the text encoder drops of long ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from autoencoder.config import shown
from ldm.config import ConfigError
from ldm.config.values import plain
from ldm.diffusion.conditioner import Conditioner

if TYPE_CHECKING:
    from ldm.models.text import TextEncoder

CAPTION = "caption"  # the name of the caption among the conditions
SHOWN = 3  # prompts that a warning quotes
QUOTED = 200  # characters quoted of the dropped end of one


class Prompt(NamedTuple):
    """The request for one picture: a caption, and values of the model's conditions by name."""

    text: str
    values: Mapping[str, Any]


def asked(
    prompts: Any, values: Any, conditioner: Conditioner | None, copies: int = 1, captioned: bool = False
) -> list[Prompt]:
    """A Prompt for each picture, ``copies`` of each prompt. Raises ConfigError.

    Args:
        prompts: one text or several; None: none, where values say what is drawn by a model without text.
        values: of the conditions (``Conditioner.each``), for each prompt; None: none are given.
        captioned: the model has text, so that prompts are needed.
    """
    if values is None:
        return [Prompt(text, {}) for text in check_prompts(prompts) for _ in range(copies)]
    if conditioner is None:
        raise ConfigError("values: this model has no conditions beside its caption, leave them out")
    several = isinstance(values, (list, tuple)) and all(isinstance(row, Mapping) for row in values)
    if not (several or isinstance(values, Mapping)):
        raise ConfigError(f"values must be a mapping of conditions, or one for each prompt, got {shown(values)}")
    texts = None if prompts is None and not captioned else check_prompts(prompts)
    rows = conditioner.each(values, None if texts is None else len(texts))
    conditioner.encode(rows)  # refuses values that it cannot
    captions = [""] * len(rows) if texts is None else texts
    return [Prompt(text, row) for text, row in zip(captions, rows, strict=True) for _ in range(copies)]


def texts_of(prompts: Sequence[Prompt | str]) -> list[str]:
    """The captions."""
    return [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]


def without(prompts: Sequence[Prompt | str], name: str, null_caption: str) -> list[Prompt]:
    """The prompts without one condition: `caption`, or a value."""
    whole = [Prompt(prompt, {}) if isinstance(prompt, str) else prompt for prompt in prompts]
    if name == CAPTION:
        return [prompt._replace(text=null_caption) for prompt in whole]
    return [prompt._replace(values={k: v for k, v in prompt.values.items() if k != name}) for prompt in whole]


def check_prompts(prompts: Any) -> list[str]:
    """The prompts as a list. Raises ConfigError naming the first that is not text."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts must be a text or several, got {shown(prompts)}")
    texts = [plain(prompt) for prompt in prompts]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"prompts[{i}] must be text, got {shown(text)}")
        check_text(text, f"prompts[{i}]")
    return texts


def check_text(text: str, name: str) -> None:
    """Raise ConfigError for half of a surrogate pair: bytes on a command line that are not UTF-8 become such."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{name} is not text in UTF-8: {shown(text)}")


def cut_prompts(text: TextEncoder, prompts: Iterable[str], negative: str, warned: set[str]) -> str | None:
    """One line naming all prompts that are longer than the encoder takes, or None where there is none.

    Those in ``warned`` are left out; the others are added to it.
    """
    found = [("prompt", cut) for cut in text.cut(one for one in prompts if one not in warned)]
    found += [("negative prompt", cut) for cut in text.cut({negative} - warned)]
    warned |= {cut.caption for _, cut in found}
    lines = [
        f"{kind} {_short(cut.caption, 40)} ends early,"
        f" its last {cut.tokens} tokens are dropped: {_short(cut.text, QUOTED)}"
        for kind, cut in found[:SHOWN]
    ]
    if len(found) > SHOWN:
        lines.append(f"{len(found) - SHOWN} more are cut")
    return f"the text encoder takes {text.max_length - 2} tokens: {'; '.join(lines)}" if found else None


def _short(text: str, most: int) -> str:
    """A text as a message quotes it: a long one by its two ends."""
    return repr(text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2) :]}")
