from typing import Any

import pytest
import torch

from ldm.config import ClipTrainingConfig
from ldm.config.reading import build
from ldm.models.contrastive import contrastive_loss, same_captions
from ldm.models.text import tokenize
from ldm.training.stages.clip import ClipTask

LEFT = "a red circle left of a blue square on a white background"
RIGHT = "a red circle right of a blue square on a white background"
ABOVE = "a pink star above a green ring on a navy background"
BELOW = "a pink star below a green ring on a navy background"


def task(swap_relations: bool) -> ClipTask:
    tree = {
        "run": "r",
        "data": {"source": "shapes-two", "image_size": 24, "size": 64},
        "model": {"width": 16, "layers": 1, "heads": 2, "max_length": 32, "merges": 32, "patch_size": 8},
        "swap_relations": swap_relations,
    }
    return ClipTask(build(ClipTrainingConfig, tree))


def loss(task: ClipTask, batch: Any) -> torch.Tensor:
    return task.micro_step({"clip": task.clip}, batch, 0, lambda loss: None)["loss"]


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_an_image_is_contrasted_with_swapped_captions_too() -> None:
    swapping, captions, pixels = task(True), [LEFT, ABOVE, "a star"], images(3)
    embeds = swapping.clip(
        input_ids=tokenize(swapping.tokenizer, [*captions, RIGHT, BELOW], 32)[0], pixel_values=pixels
    )
    own, false = embeds.text_embeds[:3], embeds.text_embeds[3:]
    expected = contrastive_loss(embeds.image_embeds, own, swapping.clip.logit_scale, same_captions(captions), false)
    torch.testing.assert_close(loss(swapping, {"image": pixels, "text": captions}), expected.detach())


@pytest.mark.parametrize("captions", [["a red star", "a blue ring", "a star"], [LEFT, RIGHT, "a star"]])
def test_no_caption_of_the_batch_counts_as_false(captions: list[str]) -> None:
    batch = {"image": images(3), "text": captions}
    torch.testing.assert_close(loss(task(True), batch), loss(task(False), batch))
