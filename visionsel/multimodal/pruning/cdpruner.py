"""CDPruner: tokens that matter to the question and differ from one another.

    with CDPruner(keep=0.1)(model): ...                                      # by the decoder's embeddings
    with CDPruner(keep=0.1, relevance=ClipRelevance(clip, tokenizer, question))(model): ...
    with CDPruner(keep=0.1, relevance=lambda tokens: my_scores)(model): ...  # [B, N]

After Zhang et al. 2025, "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning
in MLLMs" (NeurIPS; arXiv:2506.10967), with the greedy inference of Chen et al. 2018, "Fast Greedy MAP
Inference for Determinantal Point Process". What differs from the authors' code:

- Relevance is scaled from its minimum and maximum in each sample. There it is over the batch, and so what
  is kept of a sample depends on its neighbours.
- Without a CLIP, the projected tokens are compared with the text after the image as the decoder embeds it.
- Tokens that add nothing (copies of kept ones, or more tokens than dimensions) fill up by index, not by
  rounding errors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionsel.multimodal.pruning.checks import check_keep, counts, require_finite, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["CDPruner", "ClipRelevance", "select", "text_relevance"]


@dataclass(frozen=True)
class CDPruner(Pruner):
    """The likely tokens of a determinantal point process conditioned on the text (Zhang et al. 2025).

    Args:
        keep: ratio or number of tokens.
        relevance: from the tokens to their relevance `[B, N]`; more is better, and it is scaled to [0, 1]
            in each sample. `ClipRelevance` is the authors'. None: `text_relevance` of the text after the
            last image. One that reads the vision tower has an attribute `tower = True`.

    Raises:
        ValueError: for values out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import CDPruner
        >>> with CDPruner(keep=0.25)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (16.0, 16.0, 16.0, 16.0)
    """

    keep: float | int = 0.25
    relevance: Callable[[VisualTokens], Tensor] | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        clip = hasattr(self.relevance, "visual_projection") or hasattr(self.relevance, "encode_text")
        if self.relevance is not None and (clip or not callable(self.relevance)):
            raise ValueError(
                f"relevance must be a function of the tokens, got {type(self.relevance).__name__}; for a "
                "CLIP use ClipRelevance(model, tokenizer, text)"
            )

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(0, self._select, tower=getattr(self.relevance, "tower", False))]

    def _select(self, tokens: VisualTokens) -> Tensor:
        if self.relevance is None:
            relevance = text_relevance(tokens.features, *tokens.text_features())
        else:
            relevance = self.relevance(tokens)
            if relevance.shape != tokens.valid.shape:
                raise ValueError(
                    f"relevance must be {list(tokens.valid.shape)} (samples, tokens), got "
                    f"{list(relevance.shape)}"
                )
        require_finite("relevance", relevance, tokens.valid)
        return select(_scaled(relevance, tokens.valid), tokens.features, self.keep, tokens.valid)


def select(relevance: Tensor, features: Tensor, keep: float | int, valid: Tensor | None = None) -> Tensor:
    """Greedily keep the tokens that make the determinant of their kernel largest.

    The kernel of tokens i and j is their cosine similarity times the relevance of both. The token that
    multiplies the determinant most comes next; the factor is updated by one row of a Cholesky factorisation
    a step.

    Args:
        relevance: `[B, N]`, used as given.
        features: `[B, N, C]`.
        keep: ratio or number of tokens.
        valid: bool `[B, N]`: which tokens there are; default all.

    Returns:
        bool `[B, N]`.

    Raises:
        ValueError: for a keep out of range, and for NaN.
    """
    valid = valid_or_all(valid, features)
    require_finite("relevance", relevance, valid)
    require_finite("features", features, valid)
    number = counts(keep, valid)
    unit = _unit(features, valid)
    weight = relevance.to(unit.dtype).masked_fill(~valid, 0)
    kernel = weight[:, :, None] * (unit @ unit.transpose(1, 2)) * weight[:, None]
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # by what a token would multiply the determinant
    # rounding errors: equal tokens are taken in their order, and what is left of a copy is nothing
    tolerance = 16 * torch.finfo(gain.dtype).eps
    nothing = 8 * tolerance * gain

    samples, steps = torch.arange(len(gain), device=gain.device), int(number.amax())
    factor = gain.new_zeros(len(gain), steps, gain.shape[1])
    kept = torch.zeros_like(valid)
    for step in range(steps):
        free = gain.masked_fill(kept | ~valid, -torch.inf)
        best = (free >= free.amax(1, keepdim=True) * (1 - tolerance)).byte().argmax(1)  # the first of these
        pivot = gain[samples, best][:, None]
        row = kernel[samples, best] - torch.einsum(
            "bs,bsn->bn", factor[samples, :step, best], factor[:, :step]
        )
        row = torch.where(pivot > 0, row / pivot.clamp(min=torch.finfo(gain.dtype).tiny).sqrt(), 0)
        factor[:, step] = row
        gain = gain - row.square()
        gain = torch.where(gain > nothing, gain, 0)
        kept[samples, best] |= step < number
    return kept & valid


def text_relevance(features: Tensor, text: Tensor, text_valid: Tensor | None = None) -> Tensor:
    """The mean cosine similarity of each token to the text.

    Args:
        features: `[B, N, C]`.
        text: `[B, T, C]` embeddings of text tokens.
        text_valid: bool `[B, T]`: which of them there are; default all.

    Returns:
        `[B, N]`; 0 where there is no text.
    """
    text_valid = valid_or_all(text_valid, text)
    mean = _unit(text, text_valid).sum(1) / text_valid.sum(1).clamp(min=1)[:, None]
    return torch.einsum("bnc,bc->bn", _unit(features), mean)


def _scaled(relevance: Tensor, valid: Tensor) -> Tensor:
    """To (0, 1] in each sample; all 1 where tokens do not differ. The small number is the authors'."""
    wide = relevance.to(torch.promote_types(relevance.dtype, torch.float32))
    low = wide.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = wide.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return ((wide - low + 1e-6) / (high - low + 1e-6)).masked_fill(~valid, 0)


def _unit(features: Tensor, valid: Tensor | None = None) -> Tensor:
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide if valid is None else wide.masked_fill(~valid[..., None], 0), dim=-1)


@dataclass(frozen=True)
class ClipRelevance:
    """Relevance by a CLIP whose image side is the model's vision tower, as in LLaVA-1.5 (Zhang et al. 2025).

    It is minus the cosine similarity of patch and text: in CLIP patches look less like the text that
    describes them. Patches are read from the last layer but one. The CLIP sees the pixels again, so one
    pass of its image side is added.

    Args:
        model: `transformers.CLIPModel`, or an open_clip model with its own vision transformer.
        tokenizer: the CLIP's: one of transformers, or of open_clip. A text that is too long is cut into
            pieces, whose similarities are averaged (open_clip's tokenizers cut it off).
        text: the question; or one for each sample of the batch.

    Raises:
        ValueError: for no text.
        NotImplementedError: for another kind of CLIP; later for a model whose tower cuts pictures otherwise.
    """

    model: nn.Module
    tokenizer: Callable[..., Any]
    text: str | Sequence[str]

    tower: ClassVar[bool] = True  # to learn which patches a token stands for

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("text is empty; give the question, or one for each sample")
        if not (self._of_transformers or isinstance(getattr(self._open_clip, "proj", None), Tensor)):
            raise NotImplementedError(
                f"a CLIP of type {type(self.model).__name__}: give a transformers.CLIPModel, an open_clip "
                "model with a vision transformer of its own, or a function of the tokens to CDPruner"
            )

    @property
    def _of_transformers(self) -> bool:
        return hasattr(self.model, "visual_projection")

    @property
    def _open_clip(self) -> Any:
        return getattr(self.model, "visual", None)

    @torch.no_grad()
    def __call__(self, tokens: VisualTokens) -> Tensor:
        """`[B, N]`."""
        texts = [self.text] if isinstance(self.text, str) else list(self.text)
        batch = len(tokens.valid)
        if batch % len(texts):
            raise ValueError(f"{len(texts)} texts for a batch of {batch}; give one, or one for each sample")
        parameter = next(self.model.parameters())
        pixels = tokens.encoded["image"].arguments["pixel_values"].to(parameter)
        if pixels.ndim != 4:
            raise NotImplementedError(
                f"ClipRelevance reads pixel values [crops, 3, H, W], got {list(pixels.shape)}"
            )
        patches = _unit(self._patches(pixels))
        means = torch.stack([_unit(self._text(text)).mean(0) for text in texts])
        crops = iter(-(means @ patches.transpose(1, 2)).to(tokens.features.device))  # each [texts, patches]

        def of(crop: Any) -> Tensor:
            values = next(crops)
            if values.shape[-1] != crop.patches:
                raise NotImplementedError(
                    f"the CLIP cuts a picture into {values.shape[-1]} patches, the model's tower into "
                    f"{crop.patches}; use the CLIP that the tower is from"
                )
            return values

        row = torch.arange(batch, device=tokens.valid.device)
        return tokens.pool_tower(of)[row, row // (batch // len(texts))]  # beams stand side by side

    def _patches(self, pixels: Tensor) -> Tensor:
        """`[crops, patches, D]` in the space that texts share."""
        clip: Any = self.model
        if self._of_transformers:
            states = clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
            return clip.visual_projection(clip.vision_model.post_layernorm(states[:, 1:]))
        out = clip.visual.forward_intermediates(
            pixels, indices=2, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return out["image_intermediates"][0] @ clip.visual.proj

    def _text(self, text: str) -> Tensor:
        """`[pieces, D]`."""
        clip: Any = self.model
        device = next(clip.parameters()).device
        if not self._of_transformers:
            return clip.encode_text(self.tokenizer([text]).to(device))
        pieces = self.tokenizer(
            text,
            truncation=True,
            max_length=clip.config.text_config.max_position_embeddings,
            padding=True,
            return_overflowing_tokens=True,
            return_tensors="pt",
        )
        ids, mask = (pieces[name].to(device) for name in ("input_ids", "attention_mask"))
        return clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
