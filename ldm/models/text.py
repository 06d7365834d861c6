"""The frozen text encoder that conditions the U-Net: CLIP's text tower and tokenizer (Radford et al. 2021)."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save as serialized
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from ldm.config import NULL_CAPTION
from ldm.files.disk import replace
from ldm.models.lora import shared_copy

LONGEST_CAPTION = 10_000  # characters of a caption that are looked at; 77 tokens take some hundred
_SPACE = re.compile(r"[^\S\x1c-\x1f]+")

# settings of how a model returns its output
_OUTPUT = ("return_dict", "output_hidden_states", "output_attentions", "_attn_implementation")
_NotOurs = (KeyboardInterrupt, SystemExit)  # not faults of the library that is called
ACTIVATIONS = ("quick_gelu", "gelu")  # of OpenAI's CLIP and of OpenCLIP's
# Keys of older config.json files that do not concern CLIP's text tower: text generation, and leftovers of old releases.
_OLD_SETTINGS = GenerationConfig().to_dict().keys() | {
    "model_type", "torch_dtype", "dropout", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
    "tie_word_embeddings", "tie_encoder_decoder", "cross_attention_hidden_size", "add_cross_attention", "is_decoder",
    "finetuning_task", "num_labels", "tokenizer_class", "prefix", "sep_token_id", "task_specific_params", "max_length",
}  # fmt: skip


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write ``tokenizer.json``, its configuration, and ``vocab.json``, ``merges.txt`` for older readers."""
    tokenizer.save_pretrained(str(folder))
    tokenizer.backend_tokenizer.model.save(str(folder))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], length: int) -> tuple[Int[Tensor, "b l"], int]:
    """Token ids, each row padded or cut to ``length``, and the number of captions that were cut.

    A caption that spells ``<|endoftext|>`` holds those characters, not the token. A caption longer
    than LONGEST_CAPTION is read up to that length, after folding its white space.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    folded = [text if len(text) <= LONGEST_CAPTION else _SPACE.sub(" ", text) for text in captions]
    shortened = [text[:LONGEST_CAPTION] for text in folded]
    rows = tokenizer(shortened, split_special_tokens=True, verbose=False)["input_ids"] if captions else []
    truncated = sum(len(row) > length or len(text) > LONGEST_CAPTION for row, text in zip(rows, folded, strict=True))
    rows = [[*row[: length - 1], end] if len(row) > length else row + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64).view(len(captions), length), truncated


@dataclasses.dataclass(frozen=True)
class Cut:
    """A caption that is longer than the encoder takes.

    Attributes:
        tokens: number of tokens dropped at its end.
        text: the dropped text.
    """

    caption: str
    tokens: int
    text: str


class TextEncoder:
    """A frozen CLIP text tower with its tokenizer: captions → [b, max_length, width] in float32."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens but the text encoder {model.config.vocab_size}: "
                "they must come from one model"
            )
        self.model, self.tokenizer = model.float().eval().requires_grad_(False), tokenizer

    @classmethod
    def from_tensors(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Mapping[str, bytes]
    ) -> TextEncoder:
        """Build from the contents of config.json, the weights and the tokenizer's files.

        Weights are named `text_model.…`; those in float32 stay memory-mapped. Raises ValueError if
        weights and configuration do not belong together.
        """
        _check_config(config)
        tower = {key: value for key, value in (config.get("text_config") or config).items() if key not in _OUTPUT}
        try:
            with torch.device("meta"), quiet():
                model = CLIPTextModel(CLIPTextConfig.from_dict(tower))
        except Exception as error:  # transformers raises many kinds for a setting of another type or out of range
            raise ValueError(f"config.json: {_one_line(error)}") from None
        _fill(tower_of(model), {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()})
        with TemporaryDirectory() as folder:
            for name, content in tokenizer.items():
                (Path(folder) / name).write_bytes(content)
            encoder = cls(model, _load_tokenizer(Path(folder)))
        encoder.check_tokens()
        return encoder

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return json.loads(self.model.config.to_json_string(use_diff=True)) | {"architectures": ["CLIPTextModel"]}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, with the prefix `text_model.`.

        Without it transformers 4 would leave the encoder random; transformers 5 reads both.
        """
        return {f"text_model.{key}": value for key, value in tower_of(self.model).state_dict().items()}

    def save(self, folder: str | Path) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` into a model folder, as diffusers reads them."""
        target = Path(folder) / "text_encoder"
        replace(target / "config.json", (json.dumps(self.config, indent=2) + "\n").encode())
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        replace(target / "model.safetensors", serialized(state, metadata={"format": "pt"}))
        for name, content in self.tokenizer_files().items():
            replace(Path(folder) / "tokenizer" / name, content)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The contents of `tokenizer/`."""
        return written_files(lambda folder: save_tokenizer(self.tokenizer, folder))

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; returns itself."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def shared_copy(self) -> TextEncoder:
        """An encoder with the same weights, whose tower can be changed by a LoRA of its own."""
        copied = copy.copy(self)
        copied.model = shared_copy(self.model)
        return copied

    @property
    def device(self) -> torch.device:
        """Device of the weights and of the states."""
        return self.model.device

    @property
    def tower(self) -> torch.nn.Module:
        """The network itself, whose parameters have no prefix."""
        return tower_of(self.model)

    @property
    def width(self) -> int:
        """Channels of a state: the U-Net's context width."""
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens of every caption, start, end and padding included."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    @property
    def hash(self) -> str:
        """sha256 over everything that determines the states: weights, vocabulary, further settings."""
        bpe = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        config = self.model.config
        settings = [
            self.max_length,
            self.tokenizer.pad_token_id,
            config.num_attention_heads,
            config.hidden_act,
            config.layer_norm_eps,
        ]
        digest = hashlib.sha256(json.dumps([settings, bpe["vocab"], bpe["merges"]], sort_keys=True).encode())
        for key, value in sorted(tower_of(self.model).state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_tokens(self) -> None:
        """Raise ValueError unless the encoder has a state for every token that the tokenizer makes."""
        size, length = self.model.config.vocab_size, self.tokenizer.model_max_length
        if type(length) not in (int, float) or not length >= 3:
            raise ValueError(f"its tokenizer: model_max_length is {length!r}: expected a whole number from 3")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if type(number := getattr(self.tokenizer, name)) is not int or not 0 <= number < size:
                raise ValueError(f"its tokenizer: {name} is {number!r}: expected one of its {size} tokens")
        if strange := [token for token, number in self.tokenizer.get_vocab().items() if not 0 <= number < size]:
            raise ValueError(f"its tokenizer: token {strange[0]!r} has a number that is none of 0 to {size - 1}")
        try:
            self.tokenize(["a photo, of 2 ✿"])
        except _NotOurs:
            raise
        except BaseException as error:  # as in _load_tokenizer
            raise ValueError(f"its tokenizer: {_one_line(error)}") from None

    def tokenize(self, captions: list[str]) -> tuple[Int[Tensor, "b l"], int]:
        """Token ids, each row padded to ``max_length``, and the number of captions cut.

        Runs on the CPU.
        """
        return tokenize(self.tokenizer, captions, self.max_length)

    def cut(self, captions: Iterable[str]) -> list[Cut]:
        """The captions that are cut to fit, each once, with the text that is dropped."""
        distinct, room = list(dict.fromkeys(captions)), self.max_length - 1  # the last is the end of text
        if not distinct:
            return []
        read = self.tokenizer(distinct, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
        rows = zip(distinct, read["input_ids"], read["offset_mapping"], strict=True)
        return [
            Cut(caption, len(row) - 1 - room, caption[places[room][0] :].strip())
            for caption, row, places in rows
            if len(row) > self.max_length
        ]

    @torch.no_grad()
    def encode_ids(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Last hidden states after the final layer norm, in float32 even under autocast.

        Without an attention mask, as Stable Diffusion trains and samples: with one, the states of
        padding would differ.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.model(input_ids=ids.to(self.device)).last_hidden_state

    def encode(self, captions: list[str]) -> Float[Tensor, "b l d"]:
        """States of the captions, on the encoder's device."""
        return self.encode_ids(self.tokenize(captions)[0])


def written_files(save: Callable[[str], Any]) -> dict[str, bytes]:
    """The files that ``save`` writes into a folder, by name. Raises OSError."""
    with TemporaryDirectory() as folder:
        try:
            save(folder)
        except Exception as error:  # those of transformers' and tokenizers' compiled code have no class of their own
            if "os error" not in str(error):
                raise
            raise OSError(f"{folder} cannot be written: {' '.join(str(error).split())}") from None
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


class CaptionTable:
    """States of a set of captions, encoded once and kept on the encoder's device.

    They take 4 · max_length · width bytes a caption. NULL_CAPTION is always among them.
    ``truncated`` counts the captions cut to fit.
    """

    def __init__(self, encoder: TextEncoder, captions: Iterable[str], batch: int) -> None:
        distinct = list(dict.fromkeys([NULL_CAPTION, *captions]))
        self._row = {caption: i for i, caption in enumerate(distinct)}
        self._states = torch.empty(len(distinct), encoder.max_length, encoder.width, device=encoder.device)
        self.truncated = 0
        for start in range(0, len(distinct), batch):
            ids, truncated = encoder.tokenize(distinct[start : start + batch])
            self._states[start : start + batch] = encoder.encode_ids(ids)
            self.truncated += truncated

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, captions: list[str]) -> Float[Tensor, "b l d"]:
        """States in the order of ``captions``.

        Raises ValueError for a caption that was not encoded.
        """
        for caption in captions:
            if caption not in self._row:
                raise ValueError(f"caption {caption!r} is not among the {len(self)} of the table")
        rows = torch.tensor([self._row[caption] for caption in captions], dtype=torch.int64)
        return self._states[rows.to(self._states.device, non_blocking=True)]


def tower_of(model: CLIPTextModel) -> torch.nn.Module:
    """The module whose parameters have no prefix.

    Earlier releases of transformers 5 nest it in the model.
    """
    return getattr(model, "text_model", model)


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in ``folder``.

    Raises ValueError if there is none: transformers would make one up.
    """
    there = {file.name for file in folder.glob("*")}
    # both of them: without merges, single letters are found and nothing else
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
        raise ValueError("it holds no tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except _NotOurs:
        raise
    except BaseException as error:  # for an unreadable file tokenizers raises nothing more specific, or panics
        raise ValueError(f"its tokenizer: {_one_line(error)}") from None


def padded_with(tokenizer: Mapping[str, bytes], token: str) -> dict[str, bytes]:
    """The files of a tokenizer that pads with another token.

    Raises ValueError if its settings cannot be read.
    """
    files = {name: content for name, content in tokenizer.items() if name != "special_tokens_map.json"}
    try:
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer_config.json: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ValueError("tokenizer_config.json should hold a JSON object")
    return files | {"tokenizer_config.json": json.dumps(settings | {"pad_token": token}, indent=2).encode()}


def _fill(tower: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the tower, built without memory, its weights.

    Raises ValueError unless names and shapes are its own.
    """
    wanted = tower.state_dict()
    for names, what in (
        (wanted.keys() - tensors.keys(), "is missing"),
        (tensors.keys() - wanted.keys(), "belongs to no layer of it"),
    ):
        if names:
            raise ValueError(f"text encoder: {min(names)} {what} ({len(names)} such weights)")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"text encoder: {name} is {list(tensor.shape)}, config.json says {list(wanted[name].shape)}"
            )
    tower.load_state_dict(dict(tensors), assign=True)
    embeddings = tower.get_submodule("embeddings")
    positions = torch.arange(wanted["embeddings.position_embedding.weight"].shape[0])
    # the one tensor that no file holds
    embeddings.register_buffer("position_ids", positions.expand(1, -1), persistent=False)


def _check_config(layout: object) -> None:
    """Raise ValueError for a model other than CLIP, an unknown setting, or a value out of range."""
    kind = layout.get("model_type") if isinstance(layout, Mapping) else layout
    if kind not in ("clip", "clip_text_model") or not isinstance(layout, Mapping):
        raise ValueError(f"model_type is {kind!r}, but only CLIP text encoders are read (clip_text_model or clip)")
    tower = layout.get("text_config") or {} if kind == "clip" else layout
    if not isinstance(tower, Mapping):
        raise ValueError("config.json: text_config should be a mapping of settings")
    known = {f.name for f in dataclasses.fields(CLIPTextConfig)}  # type: ignore[arg-type]
    for key in tower:
        if key not in known | _OLD_SETTINGS and not key.startswith("_"):
            near = difflib.get_close_matches(key, sorted(known), n=1)
            raise ValueError(
                f"config.json: unknown key {key}"
                + (f": did you mean {near[0]}?" if near else " of a CLIP text encoder")
            )
    epsilon = tower.get("layer_norm_eps", 1e-5)
    if type(epsilon) not in (int, float) or not 0 <= epsilon <= 1:
        raise ValueError(f"config.json: layer_norm_eps is {epsilon!r}: expected a number from 0 to 1")
    if (activation := tower.get("hidden_act", "quick_gelu")) not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act is {activation!r}, but CLIP has {' or '.join(ACTIVATIONS)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bar and load report off the terminal.

    Their faults are checked and raised.
    """
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000] or type(error).__name__
