"""The image under the transform that the model itself thinks best: RITUAL+ (Woo et al. 2024).

    with Ritual(view=ChosenTransform.of(model, processor))(model):
        out = model.generate(**inputs)

After arXiv 2405.17821, v2, where the model is asked which transform would help most and RITUAL goes on with
it. The released code has RITUAL only, so wording and reading of the answer are ours: the model gets its
prompt with a request added to the user's turn, and answers it greedily, beside the run that is decoded. An
answer that names no transform leaves the draw to chance, as in RITUAL.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.decoding.views import PIXELS, RandomTransform, mask_of, samples_of, with_tokens
from visionsel.multimodal.families import find_family
from visionsel.multimodal.prompts import tail_lengths
from visionsel.multimodal.session import open_session

__all__ = ["REQUEST", "ChosenTransform", "kind_named"]

_WORDS = {  # how the request calls them, and what counts as naming one
    "hflip": ("mirror", r"mirror|horizontal"),
    "vflip": ("upside-down", r"upside|vertical"),
    "rotate": ("rotate", r"rotat"),
    "jitter": ("recolor", r"recolou?r|colou?r"),
    "blur": ("blur", r"blur"),
    "crop": ("crop", r"crop|zoom"),
}
REQUEST = (
    " Do not answer this yet. First choose how to look at the image a second time, to check the answer: say "
    "which one change of the image keeps all that the answer depends on. Reply with one of these words: "
    "{words}."
)


@dataclass(frozen=True)
class ChosenTransform:
    """The image of each sample under the transform that the model names for it.

    Args:
        model: that is asked; it is the one that decodes.
        processor: its, whose chat template made the prompts.
        transform: what the kinds are, with the ones to choose from; it draws where none is named.
        request: what is added to the user's turn, with `{words}` for those to choose from.
        max_new_tokens: of the model's reply.

    Raises:
        ValueError: for a request without `{words}`.
    """

    model: nn.Module
    processor: Any
    transform: RandomTransform
    request: str = REQUEST
    max_new_tokens: int = 12

    def __post_init__(self) -> None:
        if "{words}" not in self.request:
            raise ValueError("request needs {words}, where the transforms to choose from are named")

    @classmethod
    def of(cls, model: nn.Module, processor: Any, **options: Any) -> "ChosenTransform":
        """With `RandomTransform.of(model, processor=processor, **options)`."""
        return cls(model, processor, RandomTransform.of(model, processor=processor, **options))

    @classmethod
    def beside(cls, model: nn.Module) -> "ChosenTransform":
        """With the processor that lies where the weights of the model are from.

        Raises:
            ValueError: when there is none.
        """
        from transformers import AutoProcessor

        name: Any = getattr(model, "name_or_path", "")
        try:
            if not name:
                raise OSError("it was not loaded from a folder or hub")
            return cls.of(model, AutoProcessor.from_pretrained(name))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"no processor is found beside the model ({error}); pass "
                "view=ChosenTransform.of(model, processor)"
            ) from error

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same inputs with other pixels."""
        return self.apply(inputs, self.kinds(inputs))

    def kinds(self, inputs: dict[str, Any]) -> list[str | None]:
        """What the model chooses for each sample; None where it names nothing.

        Raises:
            ValueError: for prompts that the chat template did not make.
        """
        ids, mask = inputs["input_ids"], mask_of(inputs)
        words = ", ".join(_WORDS[kind][0] for kind in self.transform.kinds)
        text = self.request.format(words=words)
        added = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        place = torch.arange(ids.shape[1], device=ids.device)
        ends = place.expand_as(ids).masked_fill(mask == 0, -1).amax(1) + 1
        cuts = ends - torch.tensor(tail_lengths(self.processor, ids, mask), device=ids.device)
        asked = with_tokens(inputs, added, cuts.tolist())
        with open_session(self.model) as session, session.beside():
            answers: Tensor = self.model.generate(  # type: ignore[operator]
                **asked,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                max_new_tokens=self.max_new_tokens,
                return_dict_in_generate=False,
            )
        replies = self.processor.batch_decode(answers[:, asked["input_ids"].shape[1] :])
        return [kind_named(reply, self.transform.kinds) for reply in replies]

    def apply(self, inputs: dict[str, Any], kinds: list[str | None]) -> dict[str, Any]:
        """The inputs with the pixels of each sample under its kind; None: under one drawn."""
        view = self.transform(inputs)
        tokens = find_family(self.model).token_ids(self.model)
        for kind in sorted({kind for kind in kinds if kind is not None}):
            changed = replace(self.transform, kinds=(kind,))(inputs)
            for name, grids in PIXELS.items():
                if inputs.get(name) is None:
                    continue
                token = tokens["image" if name == "pixel_values" else "video"]
                owners = torch.tensor(samples_of(inputs, name, token, self.transform.patch))
                rows = torch.tensor([one == kind for one in kinds])[owners]
                if inputs[name].ndim == 2:
                    rows = rows.repeat_interleave(inputs[grids].prod(1).cpu())
                rows = rows.to(inputs[name].device)
                view[name] = view[name].clone()
                view[name][rows] = changed[name][rows]
        return view


def kind_named(reply: str, kinds: tuple[str, ...]) -> str | None:
    """The transform that a reply names first, out of some kinds."""
    found = {kind: re.search(rf"\b(?:{_WORDS[kind][1]})", reply.lower()) for kind in kinds}
    places = {kind: match.start() for kind, match in found.items() if match}
    return min(places, key=lambda kind: places[kind]) if places else None
