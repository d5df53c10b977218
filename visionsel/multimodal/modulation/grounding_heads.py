"""Strengthening the heads that point at what is being named; a method of visionsel's own.

Some heads attend to the object whose name is about to be said. `GroundingHeads.calibrate` finds them on
annotated images: heads that point are candidates; each is strengthened by itself, and of those that lower
invention without lowering recall the best are put together as long as they help each other. Which heads is
measured on one half of the samples, what it gives on the other half, beside a control: other heads at the
same strength. Part of a gain can be that fewer objects are mentioned; the report has recall and mentions for
that.

`save` writes the heads of a model with their report, `load` reads them; they work on that kind of model only.
`GroundingHeads.preset("embedded")` has those of the model of the package.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.data.shapes import CAPTION_PROMPT, SHAPES
from visionsel.files import write_json
from visionsel.multimodal.head_presets import ABOUT, describe_model, preset_file, refuse_other_model
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation.heads import scaled_heads
from visionsel.multimodal.modulation.pointing import Pointing, pointing
from visionsel.multimodal.modulation.samples import generate_captions, object_name
from visionsel.multimodal.session import Session, open_session

__all__ = ["GroundingHeads", "invention"]

PRESETS = Path(__file__).parent / "grounding_presets"
Score = Callable[[Sequence[str], Sequence[Any]], Mapping[str, float]]
Heads = dict[int, list[int]]


@dataclass(frozen=True)
class GroundingHeads(Intervention):
    """Chosen heads are strengthened, in the prompt and in decoding.

    Attributes:
        heads: for each layer its heads, from 0.
        strength: what their outputs are multiplied by.
        report: how `calibrate` found them, and what they and the control give; None for heads given by hand.
        model: whose heads they are: `type` and `decoder`, as their configurations call them, `layers`,
            `heads` a layer and `width` of the decoder. None for heads given by hand, which are taken as they
            are.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import GroundingHeads
        >>> heads = GroundingHeads.preset("embedded")
        >>> with heads(model):
        ...     answer = model.generate(**inputs)
    """

    heads: Mapping[int, Sequence[int]]
    strength: float = 1.6
    report: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    model: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @contextmanager
    def attach(self, session: Session) -> Iterator[dict[int, Tensor]]:
        """See `Intervention`; yields for each layer bool `[heads]`: the strengthened ones.

        Raises:
            ValueError: for layers or heads that do not exist, heads of another model, or a strength that is
                no positive number.
        """
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"strength must be a positive number, got {self.strength!r}; 1 changes nothing")
        if self.model is not None:
            refuse_other_model(self.model, session.model, "GroundingHeads.calibrate")
        with scaled_heads(session, self.heads, self.strength) as chosen:
            yield chosen

    def save(self, path: str | Path) -> Path:
        """Write heads, strength, report and model as JSON, whole or not at all."""
        content = {
            "model": self.model,
            "heads": _plain(self.heads),
            "strength": self.strength,
            "report": self.report,
        }
        return write_json(content, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "GroundingHeads":
        """Read what `save` wrote.

        Args:
            path: of the file.
            model: that the heads are for; None: it is checked when the context is entered.

        Raises:
            FileNotFoundError: where there is no file.
            ValueError: for a file with other content, or heads that do not fit the model.
        """
        try:
            content = json.loads(Path(path).read_text())
            heads = {int(layer): [int(head) for head in chosen] for layer, chosen in content["heads"].items()}
            about = content.get("model")
            if about is not None and set(about) != set(ABOUT):
                raise ValueError(f"of the model it must say {', '.join(ABOUT)}")
            found = cls(heads, float(content["strength"]), content.get("report"), about)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no preset of heads: {error}") from error
        if model is not None:
            with found(model):  # checks, and leaves the model as it was
                pass
        return found

    @classmethod
    def preset(cls, name: str) -> "GroundingHeads":
        """Heads that ship with the package, with their report.

        Args:
            name: `"embedded"`: of `visionsel.embedded.load_lvlm`, as
                `python -m visionsel.embedded.grounding_preset` finds them.

        Raises:
            ValueError: for a name that there is not.
        """
        return cls.load(preset_file(PRESETS, name, "GroundingHeads.calibrate"))

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        processor: Any,
        samples: Sequence[Any],
        *,
        strength: float = 1.6,
        prompt: str = CAPTION_PROMPT,
        candidates: int = 8,
        most: int = 4,
        recall_loss: float = 0.01,
        score: Score | None = None,
        seed: int = 0,
        batch_size: int = 25,
        max_new_tokens: int = 64,
    ) -> "GroundingHeads":
        """Choose heads of a model, and measure what they do.

        Args:
            model: a vision-language model.
            processor: its own, with a chat template.
            samples: with `image`, `captions` and `objects`, as those of `ShapesWorld`. The even ones are for
                choosing, the odd ones for the report.
            strength: of the heads.
            prompt: that asks for a description.
            candidates: how many of the heads that point best are tried.
            most: how many are chosen at most.
            recall_loss: how much lower recall may be than without.
            score: from captions and samples to `chair_i` and `recall`; None: `invention`.
            seed: of the control, whose heads are drawn.
            batch_size: samples at a time.
            max_new_tokens: of a caption.

        Returns:
            the heads, with the model, and a report: `baseline`, `chosen` and `control`, scores of the odd
            samples; `control_heads`; `trials`, scores of the even ones for each set that was tried;
            `pointing` and `chance`, see `pointing`; `samples`.

        Raises:
            ValueError: for fewer than 4 samples or impossible numbers, or when no head lowers invention
                without lowering recall; nothing is to be strengthened then.
        """
        if len(samples) < 4 or candidates < 1 or most < 1:
            raise ValueError(
                "calibration needs at least 4 samples, 1 candidate and 1 head; got "
                f"{len(samples)}, {candidates} and {most}"
            )
        names = {object_name(item) for sample in samples for item in sample.objects}
        score = score or partial(invention, names=names | set(SHAPES) if names <= set(SHAPES) else names)
        even = [samples[number] for number in range(0, len(samples), 2)]
        odd = [samples[number] for number in range(1, len(samples), 2)]
        points = pointing(model, processor, even, prompt, batch_size)

        def measure(heads: Heads, part: list[Any]) -> dict[str, float]:
            with ExitStack() as stack:
                if heads:
                    stack.enter_context(cls(heads, strength)(model))
                said = generate_captions(model, processor, part, prompt, batch_size, max_new_tokens)
            return {key: float(value) for key, value in score(said, part).items()}

        heads, trials = _choose(points, partial(measure, part=even), candidates, most, recall_loss)
        control = _others(heads, points, seed)
        report = {
            "baseline": measure({}, odd),
            "chosen": measure(heads, odd),
            "control": measure(control, odd) if control else None,
            "control_heads": _plain(control),
            "trials": trials,
            "pointing": points.hits.tolist(),
            "chance": points.chance,
            "samples": [len(even), len(odd)],
        }
        with open_session(model) as session:
            return cls(heads, strength, report, describe_model(session.model))

    def table(self) -> str:
        """The report for reading: a line each for the baseline, the chosen heads and the control.

        Raises:
            ValueError: for heads that were not calibrated.
        """
        if self.report is None:
            raise ValueError("these heads were given by hand; calibrate() makes a report")
        lines = {"baseline": "", "chosen": f"{_plain(self.heads)} x{self.strength:g}"}
        lines["control"] = f"{self.report['control_heads']} x{self.strength:g}"
        measures = list(self.report["baseline"])
        rows = ["".join([f"{'':10}", *(f"{measure:>10}" for measure in measures)])]
        for name, heads in lines.items():
            scores = self.report[name]
            if scores is not None:
                values = "".join(f"{scores[measure]:>10.3f}" for measure in measures)
                rows.append(f"{name:10}{values}  {heads}".rstrip())
        return "\n".join(rows)


def _choose(
    points: Pointing,
    measure: Callable[[Heads], dict[str, float]],
    candidates: int,
    most: int,
    recall_loss: float,
) -> tuple[Heads, list[dict[str, Any]]]:
    """Heads that point, lower invention by themselves, and go on doing so together."""
    best = baseline = measure({})
    trials: list[dict[str, Any]] = [{"heads": {}, **baseline}]

    def attempt(heads: Heads) -> dict[str, float]:
        scores = measure(heads)
        trials.append({"heads": _plain(heads), **scores})
        return scores

    def better(scores: Mapping[str, float], than: Mapping[str, float]) -> bool:
        enough = scores["recall"] >= baseline["recall"] - recall_loss
        return enough and scores["chair_i"] < than["chair_i"]

    alone = [(attempt(_together([head])), head) for head in points.best(candidates)]
    helpful = [(scores["chair_i"], head) for scores, head in alone if better(scores, baseline)]
    chosen: list[tuple[int, int]] = []
    for value, head in sorted(helpful):
        if len(chosen) == most:
            break
        scores = attempt(_together([*chosen, head])) if chosen else {"chair_i": value}
        if not chosen or better(scores, best):
            chosen, best = [*chosen, head], scores
    if not chosen:
        raise ValueError(
            f"none of {len(alone)} heads that point lowers chair_i below {baseline['chair_i']:.3f} without "
            f"lowering recall by more than {recall_loss}; leave the model as it is, or try another strength"
        )
    return _together(chosen), trials


def _together(heads: Sequence[tuple[int, int]]) -> Heads:
    found: Heads = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return found


def _plain(heads: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    """As JSON has it."""
    return {str(layer): list(chosen) for layer, chosen in heads.items()}


def _others(heads: Heads, points: Pointing, seed: int) -> Heads:
    """As many other heads, of the same layers where there are enough, drawn; fewer if there are no more."""
    layers, number = points.hits.shape
    generator = torch.Generator().manual_seed(seed)
    order = [divmod(place, number) for place in torch.randperm(layers * number, generator=generator).tolist()]
    free = [(layer, head) for layer, head in order if head not in heads.get(layer, ())]
    drawn: list[tuple[int, int]] = []
    missing = 0
    for layer, chosen in heads.items():
        here = [one for one in free if one[0] == layer][: len(chosen)]
        drawn += here
        missing += len(chosen) - len(here)
    return _together(drawn + [one for one in free if one not in drawn][:missing])


def invention(
    captions: Sequence[str], samples: Sequence[Any], names: Sequence[str] | set[str]
) -> dict[str, float]:
    """Captions against what is there, by the names of objects, each counted once a caption.

    Args:
        captions: one for each sample.
        samples: with `objects`.
        names: single words that count as objects.

    Returns:
        `chair_i`, the share of mentioned objects that are not there; `chair_s`, the share of captions with
        such a mention; `recall`, the share of objects that are mentioned; `mentions`, objects a caption.
    """
    there = said = right = wrong = bad = 0
    for caption, sample in zip(captions, samples, strict=True):
        words = set(re.findall(r"\w+", caption.lower())) & set(names)
        present = {object_name(item) for item in sample.objects}
        there, said = there + len(present), said + len(words)
        right, wrong = right + len(words & present), wrong + len(words - present)
        bad += bool(words - present)
    return {
        "chair_i": wrong / max(1, said),
        "chair_s": bad / max(1, len(captions)),
        "recall": right / max(1, there),
        "mentions": said / max(1, len(captions)),
    }
