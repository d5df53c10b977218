"""What `train.sentinel` can be told, on its command line and in its configurations."""

from dataclasses import dataclass, field

from train.sentinel_pairs import COHERENCE, SPLITTERS

__all__ = ["PairOptions", "TuneOptions", "ValidateOptions"]


@dataclass(frozen=True)
class PairOptions:
    """How the pairs are made.

    Args:
        images: a folder of images; None: scenes of the shapes world, which `distribution`, `seed`, `size` and
            `co_occurrence` choose.
        distribution: of the scenes, see `ShapesWorld`.
        size: how many scenes, or at most how many images of the folder.
        seed: of the scenes and of sampling; below 2**28, training of the embedded model has its own above.
        co_occurrence: of the distribution "train".
        question: the user's turn.
        detectors: `annotations` (of scenes), `answers` (of the model itself, asked whether it is there), or
            names or folders of open-vocabulary detectors of transformers. The paper has two.
        threshold: from which a box of these counts.
        synonyms: a table in CHAIR's format; None: that of COCO for a folder, the shapes for scenes.
        sentences: what a sentence is, `sentences` or `phrases`.
        coherence: which true sentences may win, `named` or `new`.
        candidates: sampled at each step (the authors' code: 10).
        temperature: of sampling (the authors' code: 0.7).
        max_sentences: of a text.
        max_new_tokens: of a sentence.

    Raises:
        ValueError: naming the value that is wrong.
    """

    images: str | None = None
    distribution: str = "anti"
    size: int = 400
    seed: int = 0
    co_occurrence: float = 0.8
    question: str = "Please describe this image in detail."
    detectors: list[str] = field(default_factory=lambda: ["annotations"])
    threshold: float = 0.3
    synonyms: str | None = None
    sentences: str = "sentences"
    coherence: str = "named"
    candidates: int = 10
    temperature: float = 0.7
    max_sentences: int = 16
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("size", "max_sentences", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"pairs.{name} must be at least 1, got {getattr(self, name)}")
        if self.candidates < 2:
            raise ValueError(f"pairs.candidates must be at least 2 to make a pair, got {self.candidates}")
        if not self.temperature > 0:
            raise ValueError(f"pairs.temperature must be above 0, got {self.temperature}")
        if not 0 <= self.seed < 2**28:
            raise ValueError(f"pairs.seed must be from 0 to 2**28 - 1, got {self.seed}")
        for name, known in (("sentences", tuple(SPLITTERS)), ("coherence", COHERENCE)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"pairs.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not self.detectors:
            raise ValueError("pairs.detectors is empty; the paper has two")
        if self.images is not None and "annotations" in self.detectors:
            raise ValueError(
                f"pairs.detectors has annotations, which the images of {self.images} lack; name detectors of "
                "transformers, such as a GroundingDINO and an OWLv2"
            )


@dataclass(frozen=True)
class TuneOptions:
    """How the updates are trained; the defaults are the authors' for models of 7 B parameters.

    Args:
        rank, alpha: of the low-rank updates, which are scaled by alpha / rank.
        lr: the peak rate of AdamW, without weight decay or warmup; it falls to 0 along a cosine.
        beta: of DPO (the authors' script: 0.1).
        epochs: passes over the pairs.
        batch_size: pairs at a time.
        accumulate: batches for each update (the authors: 64 pairs).
        max_grad_norm: gradients are clipped to it.
        bf16: autocast, for GPUs.
        gradient_checkpointing: less memory for more time.
        seed: of the first values of the updates and of the order of the pairs.

    Raises:
        ValueError: naming the value that is wrong.
    """

    rank: int = 128
    alpha: int = 256
    lr: float = 2e-6
    beta: float = 0.1
    epochs: int = 1
    batch_size: int = 16
    accumulate: int = 4
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"tune.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "beta", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"tune.{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class ValidateOptions:
    """The scenes that `validate` describes.

    Args:
        distributions: each is measured by itself.
        seeds: of the scenes.
        size: scenes of each seed.
    """

    distributions: list[str] = field(default_factory=lambda: ["anti", "balanced"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    size: int = 100
