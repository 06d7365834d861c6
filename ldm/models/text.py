"""CLIP: the frozen text encoder that conditions the U-Net, and what training a small one takes.

Radford et al. 2021. The only file that imports transformers and tokenizers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as hf_logging

from ldm.config import NULL_CAPTION, ClipConfig

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
EMBEDDING_STD = 2.0  # of a word's initial embedding: large beside what the layers add, so that a word's state stays its own

# What is read of a hub model: one text encoder with its tokenizer, safetensors alone.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_MODEL_FILES = ("config.json", "model.safetensors")
_HUB_FILES = [
    *_MODEL_FILES,
    *_TOKENIZER_FILES,
    *(f"text_encoder/{name}" for name in _MODEL_FILES),
    *(f"tokenizer/{name}" for name in _TOKENIZER_FILES),
]


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(captions: Iterable[str], merges: int, max_length: int) -> CLIPTokenizer:
    """Learn a byte-complete BPE in OpenAI's layout, so that no text is unknown.

    The vocabulary is 256 byte symbols, the same 256 at the end of a word, at most ``merges`` learned merges (fewer
    where the captions have fewer pairs), start and end of text. The same captions give the same tokenizer.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point, which is OpenAI's order
    base = symbols + [s + WORD_END for s in symbols]
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    # Given as special tokens the symbols have fixed ids; found in the text, their ids, and with them the order of
    # equally frequent pairs, follow a hash map.
    trainer = trainers.BpeTrainer(
        vocab_size=len(base) + merges, min_frequency=0, special_tokens=base, end_of_word_suffix=WORD_END, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:merges]
    tokens = dict.fromkeys([*base, *("".join(pair) for pair in learned), START, END])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=learned, model_max_length=max_length)  # type: ignore[arg-type]


def vocabulary_hash(tokenizer: CLIPTokenizer) -> str:
    """sha256 over tokens and merges."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return hashlib.sha256(json.dumps([bpe["vocab"], bpe["merges"]], sort_keys=True).encode()).hexdigest()


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write ``tokenizer.json`` and its configuration, and the ``vocab.json`` and ``merges.txt`` that older readers want."""
    tokenizer.save_pretrained(str(folder))
    tokenizer.backend_tokenizer.model.save(str(folder))


# ---------------------------------------------------------------- model


def build_clip(config: ClipConfig, tokenizer: CLIPTokenizer, image_size: int, image_channels: int) -> CLIPModel:
    """A new CLIP with a text and a vision tower of one width, for images [b, image_channels, image_size, image_size].

    Weights come from torch's global generator. ``logit_scale`` is the logarithm of the inverse temperature.
    """
    if image_size % config.patch_size:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {config.patch_size}")
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.projection,
        "attention_dropout": 0.0,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # left to its default, the pooled output is that of position 0
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": image_size, "patch_size": config.patch_size, "num_channels": image_channels}
    model = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=config.projection))
    embeddings = model.text_model.embeddings
    with torch.no_grad():  # transformers starts both at 0.02
        embeddings.token_embedding.weight.normal_(std=EMBEDDING_STD)
        embeddings.position_embedding.weight.normal_(std=EMBEDDING_STD / 4)
    return model


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], length: int) -> tuple[Int[Tensor, "b l"], int]:
    """Token ids, each row padded or cut to ``length``, and how many captions were cut.

    A caption that spells ``<|endoftext|>`` holds those characters, not the token.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = tokenizer(captions, split_special_tokens=True, verbose=False)["input_ids"] if captions else []
    truncated = sum(len(row) > length for row in rows)
    rows = [[*row[: length - 1], end] if len(row) > length else row + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64).view(len(captions), length), truncated


class TextEncoder:
    """A frozen CLIP text tower with its tokenizer: captions → [b, max_length, width] in float32."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens but the text encoder {model.config.vocab_size}: they must come from one model"
            )
        self.model, self.tokenizer = model.float().eval().requires_grad_(False), tokenizer

    @classmethod
    def from_pretrained(cls, name: str | Path) -> TextEncoder:
        """Read a model folder (``text_encoder/`` and ``tokenizer/``, or both together in it) or a model of the hub.

        Raises ValueError where a file is missing or unreadable, or weights and configuration do not belong together.
        """
        folder = Path(name) if Path(name).is_dir() else _download(str(name))
        split = (folder / "text_encoder").is_dir()
        model_folder, tokenizer_folder = (folder / "text_encoder", folder / "tokenizer") if split else (folder, folder)
        model = _load_model(model_folder)
        if not ({"tokenizer.json", "vocab.json"} & {file.name for file in tokenizer_folder.glob("*")}):
            raise ValueError(f"{tokenizer_folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
        try:
            return cls(model, CLIPTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True))
        except (OSError, ValueError) as error:
            raise ValueError(f"{tokenizer_folder}: {_one_line(error)}") from None

    def save(self, folder: str | Path) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` into a model folder, as diffusers and transformers read them."""
        target = Path(folder) / "text_encoder"
        target.mkdir(parents=True, exist_ok=True)
        self.model.config.architectures = ["CLIPTextModel"]
        self.model.config.save_pretrained(str(target))
        # transformers 4 leaves the encoder random where the prefix is missing; transformers 5 reads both
        state = {f"text_model.{key}": value.detach().cpu().contiguous() for key, value in _tower(self.model).state_dict().items()}
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(self.tokenizer, Path(folder) / "tokenizer")

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; returns itself."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are and the states come out."""
        return self.model.device

    @property
    def width(self) -> int:
        """Channels of a state: the U-Net's context width."""
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens of every caption, start, end and padding included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def hash(self) -> str:
        """sha256 over all that determines the states: weights, vocabulary, and the settings that are in neither."""
        bpe = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        config = self.model.config
        settings = [self.max_length, self.tokenizer.pad_token_id, config.num_attention_heads, config.hidden_act, config.layer_norm_eps]
        digest = hashlib.sha256(json.dumps([settings, bpe["vocab"], bpe["merges"]], sort_keys=True).encode())
        for key, value in sorted(_tower(self.model).state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tokenize(self, captions: list[str]) -> tuple[Int[Tensor, "b l"], int]:
        """Token ids, each row padded to ``max_length``, and how many captions were cut to fit. Runs on the CPU."""
        return tokenize(self.tokenizer, captions, self.max_length)

    @torch.no_grad()
    def encode_ids(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Last hidden states after the final layer norm, in float32 whatever autocast says.

        Without an attention mask: Stable Diffusion trains and samples so, and the states of padding differ with one.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.model(input_ids=ids.to(self.device)).last_hidden_state

    def encode(self, captions: list[str]) -> Float[Tensor, "b l d"]:
        """States of the captions, on the encoder's device."""
        return self.encode_ids(self.tokenize(captions)[0])


def from_clip(clip_model: CLIPModel, tokenizer: CLIPTokenizer) -> TextEncoder:
    """The text tower of a trained CLIP, final layer norm included and projection left out, as an independent copy."""
    model = CLIPTextModel(copy.deepcopy(clip_model.config.text_config))  # type: ignore[arg-type]
    _tower(model).load_state_dict(clip_model.text_model.state_dict())
    return TextEncoder(model, tokenizer)


def save_clip(clip_model: CLIPModel, folder: str | Path) -> None:
    """Write both towers in transformers' own format."""
    with _quiet():
        clip_model.save_pretrained(str(folder))


class CaptionTable:
    """States of a set of captions, encoded once and kept on the encoder's device: 4 · max_length · width bytes for each.

    NULL_CAPTION is always among them. ``truncated`` counts the captions cut to fit.
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
        """States in the order of ``captions``. Raises ValueError for a caption that was not encoded."""
        for caption in captions:
            if caption not in self._row:
                raise ValueError(f"caption {caption!r} is not among the {len(self)} of the table")
        rows = torch.tensor([self._row[caption] for caption in captions], dtype=torch.int64)
        return self._states[rows.to(self._states.device, non_blocking=True)]


def _tower(model: CLIPTextModel) -> torch.nn.Module:
    """The module whose parameters bear no prefix: earlier releases of transformers 5 nest it in the model."""
    return getattr(model, "text_model", model)


def _load_model(folder: Path) -> CLIPTextModel:
    """The text tower in ``folder``, every weight from the file."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no text encoder: config.json is missing")
    if not ((folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()):
        raise ValueError(f"{folder} holds no model.safetensors (pickled weights are not read: convert them to safetensors)")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(f"model_type is {kind!r}, but only CLIP text encoders are read (clip_text_model or clip)")
        with _quiet():
            config = CLIPTextConfig.from_pretrained(str(folder), local_files_only=True)
            model, info = CLIPTextModel.from_pretrained(  # type: ignore[misc]
                str(folder),
                config=config,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported in info, with names
                output_loading_info=True,
            )
        _check_keys(info)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {_one_line(error)}") from None
    return model


def _check_keys(info: dict[str, set]) -> None:
    """Refuse weights that would stay random, and weights of text layers that the configuration does not have."""
    own = ("text_model.", "encoder.", "embeddings.", "final_layer_norm.")  # a full CLIP holds its vision tower besides
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"])
    extra = sorted(key for key in info["unexpected_keys"] if key.startswith(own) and not key.endswith("position_ids"))
    for keys, what in ((missing, "is missing from"), (wrong, "has another shape than config.json says in"), (extra, "is not expected in")):
        if keys:
            raise ValueError(f"{keys[0]} {what} model.safetensors ({len(keys)} such weights)")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bar and load report off the terminal: what they would say is checked and raised."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def _download(name: str) -> Path:
    """The hub model's text encoder and tokenizer as a local folder."""
    from huggingface_hub import snapshot_download

    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith("."):
        raise ValueError(f"no folder {name}, and it is not the name of a hub model either (owner/name)")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"no folder {name}, and the hub gives no such model: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
