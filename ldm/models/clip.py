"""A small CLIP to train: tokenizer, towers, and what becomes the text encoder (Radford et al. 2021)."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm.config import ClipConfig
from ldm.files.disk import replace
from ldm.models.text import TextEncoder, quiet, tower_of, written_files

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Deviation of a word's initial embedding: large beside what the layers add, so that the states of words stay distinct.
EMBEDDING_STD = 2.0
LONGEST_WORD = 1000  # characters: the time to learn merges from a word grows with its square
# One word for CLIP: letters, or neither letters, digits nor space (Python counts four control characters as space).
_LONG_WORD = re.compile(rf"[^\W_]{{{LONGEST_WORD + 1},}}|(?:[^\w\s]|[_\x1c-\x1f]){{{LONGEST_WORD + 1},}}")


def train_tokenizer(captions: Iterable[str], merges: int, max_length: int) -> CLIPTokenizer:
    """Learn a byte-complete BPE in OpenAI's layout, so that no text is unknown.

    The vocabulary is 256 byte symbols, the same 256 at the end of a word, at most ``merges``
    learned merges (fewer if the captions have fewer pairs), start and end of text. The same
    captions give the same tokenizer. Words are cut after LONGEST_WORD characters.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point, which is OpenAI's order
    base = symbols + [s + WORD_END for s in symbols]
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    # As special tokens the symbols have fixed ids. Found in the text, their ids, and with them the order of equally
    # frequent pairs, would follow a hash map.
    trainer = trainers.BpeTrainer(
        vocab_size=len(base) + merges,
        min_frequency=0,
        special_tokens=base,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    shortened = (_LONG_WORD.sub(lambda word: word[0][:LONGEST_WORD], text) for text in captions)
    learner.train_from_iterator(shortened, trainer)
    learned: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:merges]
    tokens = dict.fromkeys([*base, *("".join(pair) for pair in learned), START, END])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=learned, model_max_length=max_length)


def vocabulary_hash(tokenizer: CLIPTokenizer) -> str:
    """sha256 over tokens and merges."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return hashlib.sha256(json.dumps([bpe["vocab"], bpe["merges"]], sort_keys=True).encode()).hexdigest()


def build_clip(config: ClipConfig, tokenizer: CLIPTokenizer, image_size: int, image_channels: int) -> CLIPModel:
    """A new CLIP with text and vision towers of one width.

    Images are [b, image_channels, image_size, image_size]. Weights come from torch's global
    generator. ``logit_scale`` is the logarithm of the inverse temperature.
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
        "eos_token_id": tokenizer.eos_token_id,  # with the default, the pooled output would be that of position 0
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": image_size, "patch_size": config.patch_size, "num_channels": image_channels}
    model = CLIPModel(
        CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=config.projection)
    )
    embeddings = model.text_model.embeddings
    with torch.no_grad():  # transformers starts both at 0.02
        embeddings.token_embedding.weight.normal_(std=EMBEDDING_STD)
        embeddings.position_embedding.weight.normal_(std=EMBEDDING_STD / 4)
        positions = model.vision_model.embeddings.position_embedding.weight
        positions.mul_(config.position_std / model.vision_model.config.initializer_range)
    return model


def from_clip(clip_model: CLIPModel, tokenizer: CLIPTokenizer) -> TextEncoder:
    """An independent copy of a trained CLIP's text tower, without the projection."""
    model = CLIPTextModel(copy.deepcopy(clip_model.config.text_config))  # type: ignore[arg-type]
    tower_of(model).load_state_dict(clip_model.text_model.state_dict())
    return TextEncoder(model, tokenizer)


def save_clip(clip_model: CLIPModel, folder: str | Path) -> None:
    """Write both towers in transformers' own format, each file whole or not at all.

    Raises OSError.
    """
    with quiet():
        files = written_files(lambda temporary: clip_model.save_pretrained(temporary))
    for name, content in files.items():
        replace(Path(folder) / name, content)
