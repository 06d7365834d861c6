"""Contrastive training of CLIP: the loss, and accuracies of retrieval (Radford et al. 2021)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def same_captions(captions: Sequence[str]) -> Bool[Tensor, "b b"]:
    """Mask of the pairs of a batch with equal captions."""
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    group = torch.tensor([first[caption] for caption in captions], dtype=torch.int64)
    return group[:, None] == group[None, :]


def contrastive_loss(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    same: Bool[Tensor, "b b"],
    negatives: Float[Tensor, "k d"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE in which pairs with equal captions share the positive.

    Radford et al. 2021, figure 3. The target of a row is uniform over the columns with its caption;
    with distinct captions this is CLIP's own loss. Embeddings are the projected ones of any length
    (``get_image_features(…).pooler_output``), ``logit_scale`` is the logarithm of the inverse
    temperature. ``same`` is symmetric and true on its diagonal (``same_captions``). ``negatives``:
    embeddings of captions that are true of no image of the batch; each image is contrasted with
    them too (Yuksekgonul et al. 2023, section 4).
    """
    images = F.normalize(image_embeds, dim=-1)
    logits = logit_scale.exp() * F.normalize(text_embeds, dim=-1) @ images.T  # [text, image]
    target = same.to(logits.dtype) / same.sum(dim=1, keepdim=True)
    of_images, target_of_images = logits.T, target
    if negatives is not None:
        wrong = logit_scale.exp() * images @ F.normalize(negatives, dim=-1).T
        of_images, target_of_images = torch.cat([of_images, wrong], dim=1), F.pad(target, (0, len(negatives)))
    return (F.cross_entropy(logits, target) + F.cross_entropy(of_images, target_of_images)) / 2


def retrieval_top1(
    image_embeds: Float[Tensor, "b d"], text_embeds: Float[Tensor, "k d"], truth: Int[Tensor, " b"]
) -> float:
    """Share of images whose most similar caption of ``k`` distinct ones is their own, ``truth[i]``."""
    similarity = F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T  # [b, k]
    return (similarity.argmax(dim=1) == truth.to(similarity.device)).double().mean().item()


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_RELATION = re.compile(r"\b(" + "|".join(_OPPOSITE) + r")\b", re.IGNORECASE)


def swap_relation(caption: str) -> str | None:
    """The caption with left and right, above and below exchanged.

    None if it names no such relation.
    """
    swapped, count = _RELATION.subn(lambda match: _OPPOSITE[match[0].lower()], caption)
    return swapped if count else None


def left_right_accuracy(
    image_embeds: Float[Tensor, "b d"], text_embeds: Float[Tensor, "b d"], swapped_embeds: Float[Tensor, "b d"]
) -> float:
    """Share of images more similar to their own caption than to its swapped form; chance is ½.

    Row i of ``swapped_embeds`` embeds ``swap_relation`` of caption i. Raises ValueError for no
    images.
    """
    if len(image_embeds) == 0:
        raise ValueError(
            "left_right_accuracy needs at least one caption with a relation (left of, right of, above, below)"
        )
    true, swapped = F.cosine_similarity(image_embeds, text_embeds), F.cosine_similarity(image_embeds, swapped_embeds)
    return (true > swapped).double().mean().item()
