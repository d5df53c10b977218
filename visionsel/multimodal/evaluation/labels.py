"""What a model calls things, and the categories of a data set: names matched by the similarity of texts.

    matcher = LabelMatcher(["cat", "traffic_light"], clip, tokenizer)
    matcher(["kitten", "stop light"])      # for each name [(category, weight)]

An open-ended detector writes names of its own. The protocol of GenerateU (Lin et al. 2024, arXiv:2403.10191)
and VL-SAM (Lin et al. 2024, arXiv:2410.05963) gives a detection the category whose text is the most similar,
"a {name}" against "a {category}", by CLIP. Another form spreads its score over categories in proportion to
the softmax of the similarities.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visionsel.multimodal.shipped import shipped

__all__ = ["LabelMatcher", "Match", "encode_texts", "exact_names", "load_text_model", "similar_labels"]

Match = tuple[Any, float]
"""A category as the caller counts them, and what part of a detection's score it gets."""

TEMPLATE = "a {}"
_BATCH = 256


class LabelMatcher:
    """Categories for names.

    Args:
        categories: names by id, or in a list, where they are their own ids. Underscores stand for blanks, as
            in LVIS.
        model, tokenizer: a CLIP of open_clip and its tokenizer. None: `exact` alone decides, and names that
            are no category's get none.
        template: of the texts; `{}` is the name.
        exact: a name that is a category's, or one of its synonyms, in any case, gets it at full weight.
        temperature: None: the most similar category, at full weight (VL-SAM). A number: the `top` categories
            by weight, the softmax over all categories of similarity / temperature; CLIP's own is 0.01.
        top: categories that a name gets at most, where there is a temperature.
        synonyms: other names of a category, by id, such as LVIS lists.

    Raises:
        ValueError: for no categories, one of the models without the other, neither model nor `exact`, a
            template without `{}`, or a number out of range.
    """

    def __init__(
        self,
        categories: Mapping[Any, str] | Sequence[str],
        model: Any = None,
        tokenizer: Callable[..., Tensor] | None = None,
        *,
        template: str = TEMPLATE,
        exact: bool = False,
        temperature: float | None = None,
        top: int = 5,
        synonyms: Mapping[Any, Sequence[str]] | None = None,
    ) -> None:
        named = (
            dict(categories) if isinstance(categories, Mapping) else {one: one for one in list(categories)}
        )
        if not named:
            raise ValueError("there are no categories to match names with")
        if (model is None) != (tokenizer is None) or (model is None and not exact):
            raise ValueError("give a CLIP and its tokenizer, or neither with exact=True")
        if "{}" not in template:
            raise ValueError(f"the template needs {{}} where the name stands, got {template!r}")
        if top < 1 or not (temperature is None or temperature > 0):
            raise ValueError(
                f"top must be at least 1 and the temperature above 0, got {top} and {temperature}"
            )
        self.template, self.temperature, self.top = template, temperature, top
        self._ids = list(named)
        self._exact = exact_names(named, synonyms) if exact else {}
        self._model, self._tokenizer = model, tokenizer
        self._known: dict[str, list[Match]] = {}
        self._texts: Tensor | None = None
        self._plain = [_plain(name) for name in named.values()]

    def __call__(self, names: Sequence[str]) -> list[list[Match]]:
        """For each name its categories with their weights, the heaviest first; empty where there is none.

        Raises:
            ValueError: for a text that the tokenizer does not take.
        """
        plain = [_plain(name) for name in names]
        new = [name for name in dict.fromkeys(plain) if name not in self._known]
        for name in new:
            if (category := self._exact.get(name)) is not None or not name:
                self._known[name] = [(category, 1.0)] if name else []
        left = [name for name in new if name not in self._known]
        if left and self._model is None:
            self._known |= {name: [] for name in left}
        elif left:
            for name, found in zip(left, self._similar(left), strict=True):
                self._known[name] = found
        return [list(self._known[name]) for name in plain]

    def _similar(self, names: Sequence[str]) -> list[list[Match]]:
        if self._texts is None:
            self._texts = self._encode(self._plain)
        places, weights = similar_labels(self._encode(names), self._texts, self.temperature, self.top)
        return [
            [(self._ids[place], weight) for place, weight in zip(*pair, strict=True)]
            for pair in zip(places.tolist(), weights.tolist(), strict=True)
        ]

    def _encode(self, names: Sequence[str]) -> Tensor:
        texts = [self.template.replace("{}", name) for name in names]
        assert self._tokenizer is not None
        return encode_texts(self._model, self._tokenizer, texts)


def similar_labels(
    names: Tensor, categories: Tensor, temperature: float | None = None, top: int = 1
) -> tuple[Tensor, Tensor]:
    """The rule on embeddings: which categories names get, and their weights.

    Args:
        names: unit vectors `[N, D]`.
        categories: unit vectors `[C, D]`.
        temperature: None: the most similar one, at weight 1. A number: the heaviest `top` of the softmax over
            the `C` similarities divided by it.
        top: at most `C` of them are given; with a temperature only.

    Returns:
        places among the categories, int64 `[N, k]`, and weights, float32 `[N, k]`, the heaviest first. Of
        equally similar ones the first counts.
    """
    similar = names.float() @ categories.float().T
    if temperature is None:
        best = similar.argmax(1, keepdim=True)
        return best, torch.ones_like(best, dtype=torch.float32)
    weights, places = (similar / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    return places[:, :top], weights[:, :top]


@torch.no_grad()
def encode_texts(model: Any, tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts, float32 `[N, D]` on the CPU, by a CLIP of open_clip and its tokenizer."""
    device = next(model.parameters()).device
    parts = [
        model.encode_text(tokenizer(list(texts[start : start + _BATCH])).to(device), normalize=True)
        for start in range(0, len(texts), _BATCH)
    ]
    return torch.cat([part.float().cpu() for part in parts])


def exact_names(
    categories: Mapping[Any, str], synonyms: Mapping[Any, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Category ids by names in lower case with blanks; a name comes before the synonym of another."""
    names = {_plain(name): category for category, name in categories.items()}
    for category, others in (synonyms or {}).items():
        for other in others:
            names.setdefault(_plain(other), category)
    return names


def load_text_model(spec: str, device: str | None = None) -> tuple[Any, Callable[..., Tensor]]:
    """A CLIP for `LabelMatcher`, and its tokenizer.

    Args:
        spec: `"embedded"`: the small one of the package, which knows the shapes world. `"NAME:WEIGHTS"`: a
            model of open_clip with a file of weights, or a tag of open_clip's; `"local-dir:FOLDER"` and
            `"hf-hub:NAME"` as open_clip has them.
        device: default: cpu.

    Raises:
        ImportError: without the extra "multimodal".
        ValueError: for a spec without weights.
        RuntimeError: for a model or weights that open_clip does not know.
    """
    if spec == "embedded":
        model, _, own = shipped("load_clip")
        return model.to(device or "cpu"), own
    name, _, weights = spec.partition(":")
    if not weights:
        raise ValueError(
            f'which weights? expected "embedded", "NAME:WEIGHTS" such as "ViT-B-32:openai", '
            f'or "local-dir:FOLDER"; got {spec!r}'
        )
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('matching names needs open_clip: pip install "visionsel[multimodal]"') from error
    whole = name in ("local-dir", "hf-hub")
    named = spec if whole else name
    model, _, _ = open_clip.create_model_and_transforms(named, pretrained=None if whole else weights)
    return model.eval().to(device or "cpu"), open_clip.get_tokenizer(named)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
