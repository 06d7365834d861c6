"""Text to images: one folder holds everything, and it is a diffusers pipeline folder.

pipe = ldm.Pipeline.from_pretrained("runs/demo")
images = pipe(["a small red circle on a white background"], steps=20, guidance_scale=3.0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from autoencoder.config import shown
from ldm.config import ConfigError, SampleConfig
from ldm.config.values import changed
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.nodes import Callback as StepCallback
from ldm.pipeline import draw, habits
from ldm.pipeline.guides import Guides
from ldm.pipeline.habits import Pictures
from ldm.pipeline.model import Device, Dtype, Model, Place, Self, Text
from ldm.pipeline.prompts import Prompt
from ldm.pipeline.watch import Watch

if TYPE_CHECKING:
    from typing import SupportsFloat, SupportsIndex, TypeAlias

    Whole: TypeAlias = SupportsIndex
    Number: TypeAlias = SupportsFloat
else:  # checked by the call itself, as the configuration checks them and with the argument's name
    Whole = Number = Any


@dataclass
class Pipeline(Model):
    """A trained model, ready to draw from.

    Several threads may draw at the same time, each with LoRAs and guides of its own. Methods that
    change the model for all (``load_lora``, ``merge_lora``, ``to``) may be called while no thread draws.
    """

    _guides: Guides = field(default_factory=Guides, init=False, repr=False)
    _bar: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # options of the progress bar

    def __call__(
        self,
        prompts: Text | Iterable[Text] | None = None,
        *,
        steps: Whole | None = None,
        guidance_scale: Number | None = None,
        sampler: Text | None = None,
        seed: Whole | None = None,
        negative_prompt: Text | None = None,
        eta: Number | None = None,
        size: Whole | tuple[Whole, Whole] | None = None,
        image: Any = None,
        mask: Any = None,
        values: Any = None,
        batch_size: Whole = 16,
        output_type: Text = "pil",
        callback: Callable[[int, int], None] | None = None,
        progress: bool | None = None,
        **further: Any,
    ) -> Pictures:
        """One picture per prompt, in a list. Image i of a seed starts from the same noise at any batch size.

        Args:
            prompts: one or several captions, of which an unconditional model takes only the number;
                "" is a caption too.
            steps, guidance_scale, sampler, seed, negative_prompt, eta: left out, the model's defaults hold.
            size: side in pixels, or (height, width), multiples of the autoencoder's factor; left out, that of training.
            image: a picture to start from, or one for each prompt: files, pictures of Pillow or arrays uint8
                [h, w, c]. ``strength`` says how much of it is drawn anew (docs/editing.md).
            mask: white where ``image`` is drawn, black where it is kept; likewise.
            values: of the model's conditions beside the caption: ``{"digit": 7, "size": [0.2, 0.3]}``, one for all
                prompts or a list of theirs; or such a mapping for each (docs/conditions.md).
            batch_size: pictures computed together.
            output_type: pil; np or pt, in [0, 1]; latent, not decoded. ``.images`` of the list is then
                the whole array, [n, h, w, c] of np and [n, c, h, w] of the others.
            callback: called with (pictures finished, pictures in all) after each batch.
            progress: a bar of the steps on stderr; left out, where that is a terminal.
            further: any other field of SampleConfig (``guidance_rescale``, ``autoguidance``,
                ``classifier`` …) and diffusers' names of these arguments (``ldm.pipeline.habits``).

        Raises:
            ConfigError: an argument is unknown, of another type or out of range; the message names it.
            NonFiniteError: something computed is NaN or infinite; the message names the part and the step.
        """
        named = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler, "seed": seed, "eta": eta}
        named |= {"prompts": prompts, "negative_prompt": negative_prompt, "size": size, "output_type": output_type}
        named |= {"image": image, "mask": mask, "values": values}
        given = habits.in_our_words({**named, **further}, self.sample_size)
        prompts, size, kind, copies, step_end, image, mask, values = (
            given.pop(name, None) for name in habits.OF_THE_CALL
        )
        settings = changed(self.defaults, given)
        for name, function in (("callback", callback), ("callback_on_step_end", step_end)):
            if function is not None and not callable(function):
                raise ConfigError(f"{name} must be a function, got {shown(function)}")
        start = {"image": image, "mask": mask, "values": values, "copies": copies}
        drawing = draw.prepare(self, self._guides, prompts, settings, size, batch_size, **start)
        replaced = habits.step_end(self, step_end, drawing.times) if step_end else None

        with self._progress(drawing, progress) as bar:

            def after(step: int, x: Tensor, x0: Tensor) -> Tensor | None:
                bar.update()
                return replaced(step, x, x0) if replaced else None

            batches, done = [], 0
            for images in draw.draw(drawing, after, decoded=kind != "latent"):
                batches.append(habits.finished(kind, images))
                done += len(images)
                if callback:
                    callback(done, len(drawing.prompts))
        return habits.together(kind, batches)

    def sample(
        self,
        prompts: Sequence[str],
        settings: SampleConfig,
        *,
        size: Whole | tuple[Whole, Whole] | None = None,
        batch_size: Whole = 16,
        indices: Sequence[int] | None = None,
        callback: StepCallback | None = None,
        image: Any = None,
        mask: Any = None,
        values: Any = None,
    ) -> Iterator[Float[Tensor, "b C H W"]]:
        """Batches of images in about [−1, 1], in the order of the prompts. Arguments are checked at once.

        ``indices``: the number of each image within the seed, which determines its noise (left out:
        0, 1, …); a process that draws a share of the images passes theirs.
        ``callback(step, x, x0)``: after each step of each batch, with the sample and the x̂_0 that the
        step used, both as diffused; its return value, unless None, replaces the sample.
        ``size``, ``image``, ``mask``, ``values``: as in a call.
        """
        drawing = draw.prepare(self, self._guides, prompts, settings, size, batch_size, indices, image, mask, values)
        return draw.draw(drawing, callback)

    def denoiser(self, prompts: Sequence[Prompt | str], settings: SampleConfig, watch: Watch | None = None) -> Denoiser:
        """The denoiser for these prompts, with guidance and LoRAs. ``watch``: sees what each part computes."""
        return draw.denoiser(self, self._guides, prompts, settings, watch)

    def to(self, *place: Device | Dtype | None, device: Device | None = None, dtype: Dtype | None = None) -> Self:
        """As ``Model.to``, with the guides."""
        super().to(*place, device=device, dtype=dtype)
        self._guides.to(self.device, self.dtype)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar of later calls, as in diffusers: ``disable=True``."""
        self._bar = options

    def _progress(self, drawing: draw.Drawing, progress: bool | None) -> tqdm:
        """A bar of all steps, by default where stderr is a terminal (tqdm's ``disable=None``)."""
        options = {"disable": None, **self._bar}
        if progress is not None:
            options["disable"] = not progress
        return tqdm(total=drawing.steps * len(list(drawing.batches())), **options)

    @classmethod
    def from_single_file(cls, path: Place, **options: Any) -> Self:
        """As ``from_pretrained``, which reads single files too."""
        return cls.from_pretrained(path, **options)

    if not TYPE_CHECKING:  # where every other name is a mistake

        def __getattr__(self, name: str) -> Any:
            """Parts under diffusers' names, and one line for names that it has and this has not."""
            if name in habits.PARTS:
                return habits.PARTS[name](self)
            if name in habits.ATTRIBUTES:
                raise AttributeError(f"Pipeline.{name}: {habits.ATTRIBUTES[name]}")
            return object.__getattribute__(self, name)  # raises, with the error of a property where there is one

        def __setattr__(self, name: str, value: Any) -> None:
            if name in habits.SET:
                raise AttributeError(f"Pipeline.{name} = …: {habits.SET[name]}")
            super().__setattr__(name, value)
