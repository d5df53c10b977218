"""Hyperparameters of a method chosen on annotated images, as a user would before relying on it.

    grid = {"alpha": (1.5, 2.0, 3.0), "layers": ((1, 2, 3), (2, 3))}
    tuning = tune(model, processor, VHR, grid, validation)
    print(tuning.table())
    with tuning.best()(model):
        ...

CHAIR falls when less is said, and answers may suffer, so a setting counts only within limits: recall and the
F1 of the answers to yes-or-no questions not far below those of the model by itself, and captions about as
long. Of these the one with the lowest CHAIR_I is chosen. What is chosen so looks better on these images than
it is: report it on others.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.multimodal.evaluation import asking
from visionsel.multimodal.evaluation.report import Hallucination, table
from visionsel.multimodal.evaluation.synonyms import Synonyms
from visionsel.multimodal.intervention import Intervention

__all__ = ["Limits", "Trial", "Tuning", "choose", "settings_of", "tune"]

_NAMES = {"object_recall": "recall", "f1": "F1"}


@dataclass(frozen=True)
class Limits:
    """What a setting may cost.

    Attributes:
        recall: how much lower the recall of the captions may be than without the method.
        f1: the same for the F1 of the answers.
        length: how long captions may be, least and most, as a share of the length without the method.
    """

    recall: float = 0.01
    f1: float = 0.01
    length: tuple[float, float] = (0.7, 1.3)

    def __post_init__(self) -> None:
        least, most = self.length
        if min(self.recall, self.f1, least) < 0 or most < least:
            raise ValueError(
                "recall and f1 must be at least 0, length two numbers in order; got "
                f"{self.recall}, {self.f1} and {self.length}"
            )

    def broken(self, scores: Hallucination, baseline: Hallucination) -> str:
        """Which limit scores do not keep, in words; nothing where they keep all that were measured."""
        for name, label in _NAMES.items():
            value, before = getattr(scores, name), getattr(baseline, name)
            allowed: float = self.recall if name == "object_recall" else self.f1
            # shares of counts: what is exactly at the limit must not fall to rounding
            if value is not None and before is not None and value < before - allowed - 1e-9:
                return f"{label} {value:.3f} is below {before - allowed:.3f}"
        least, most = (share * (baseline.length or 0.0) for share in self.length)
        if scores.length is not None and not least - 1e-9 <= scores.length <= most + 1e-9:
            return f"{scores.length:.1f} words a caption are not from {least:.1f} to {most:.1f}"
        return ""


@dataclass(frozen=True)
class Trial:
    """One setting, and what it gave.

    Attributes:
        setting: hyperparameters.
        scores: of captions, and of answers where questions were asked.
        broken: which limit it does not keep, in words.
    """

    setting: Mapping[str, Any]
    scores: Hallucination
    broken: str = ""

    @property
    def name(self) -> str:
        """The setting for reading."""
        return ", ".join(f"{name}={value!r}" for name, value in self.setting.items())


@dataclass(frozen=True)
class Tuning:
    """What was tried, and what is best.

    Attributes:
        method: the class.
        fixed: hyperparameters that all settings share.
        baseline: scores of the model without the method.
        trials: all settings in the order of the grid.
        chosen: the best one within the limits; None where there is none.
    """

    method: Callable[..., Intervention]
    fixed: Mapping[str, Any]
    baseline: Hallucination
    trials: tuple[Trial, ...]
    chosen: Trial | None

    def best(self) -> Intervention:
        """The method with the setting that was chosen.

        Raises:
            ValueError: where no setting keeps the limits.
        """
        if self.chosen is None:
            raise ValueError(
                f"none of {len(self.trials)} settings keeps recall, length and answers near those without "
                "the method; try weaker ones, or wider limits"
            )
        return self.method(**{**self.fixed, **self.chosen.setting})

    def table(self) -> str:
        """The model by itself and all settings, a line each; the chosen one has a star.

        The F1 of answers is told where questions were asked, see `choose`.
        """
        rows = {"without": self.baseline}
        ends = [""]
        for trial in self.trials:
            star = "* " if trial is self.chosen else "  "
            rows[star + trial.name] = trial.scores
            ends.append(f"  {trial.broken}" if trial.broken else "")
        head, *lines = table(rows).splitlines()
        return "\n".join([head, *(line + end for line, end in zip(lines, ends, strict=True))])


def tune(
    model: Any,
    processor: Any,
    method: Callable[..., Intervention],
    grid: Mapping[str, Sequence[Any]],
    samples: Sequence[Any],
    *,
    fixed: Mapping[str, Any] | None = None,
    baseline: Hallucination | None = None,
    limits: Limits | None = None,
    synonyms: Synonyms | None = None,
    prompt: str = CAPTION_PROMPT,
    batch_size: int = 50,
    max_new_tokens: int = 64,
    progress: Callable[[str], None] | None = None,
) -> Tuning:
    """Try all settings of a method on annotated images.

    Args:
        model: a vision-language model.
        processor: its own, with a chat template.
        method: its class.
        grid: values to try for each hyperparameter, each with each; those that come first win ties.
        samples: for choosing, see `visionsel.multimodal.evaluation.asking`; not those of a report.
        fixed: hyperparameters that are the same in all settings.
        baseline: scores of the model without the method on these samples; None: they are measured.
        limits: what a setting may cost; None: those of `Limits`.
        synonyms: what the objects are called; None: the 80 classes of COCO.
        prompt: that asks for a description.
        batch_size: captions at a time; twice as many questions.
        max_new_tokens: of a caption.
        progress: told which setting is tried next.

    Raises:
        ValueError: for a grid with nothing to try, no samples, or a setting that does not fit the model.
    """
    shared = dict(fixed or {})
    settings = settings_of(grid)
    methods = [method(**{**shared, **setting}) for setting in settings]  # bad values are found first
    say = progress or (lambda text: None)

    def within(number: int | None) -> AbstractContextManager[Any]:
        return nullcontext() if number is None else methods[number](model)

    def describe(number: int | None) -> Mapping[str, Any]:
        say(f"{'without' if number is None else f'{number + 1}/{len(methods)} {methods[number]!r}'}")
        with within(number):
            return asking.describe(model, processor, samples, synonyms, prompt, batch_size, max_new_tokens)

    def ask(number: int | None) -> Mapping[str, Any] | None:
        with within(number):
            return asking.ask(model, processor, samples, 2 * batch_size)

    if baseline is None:
        baseline = Hallucination.of(describe(None), ask(None))
    trials, chosen = choose(settings, describe, ask, baseline, limits or Limits())
    return Tuning(method, shared, baseline, trials, None if chosen is None else trials[chosen])


def settings_of(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All settings of a grid; the last hyperparameter changes fastest.

    Raises:
        ValueError: for a grid with nothing to try.
    """
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError(f"each hyperparameter of a grid needs values to try, got {dict(grid)}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def choose(
    settings: Sequence[Mapping[str, Any]],
    describe: Callable[[int], Mapping[str, Any]],
    ask: Callable[[int], Mapping[str, Any] | None],
    baseline: Hallucination,
    limits: Limits,
) -> tuple[tuple[Trial, ...], int | None]:
    """The setting with the lowest CHAIR_I of those within the limits.

    Captions tell CHAIR_I, recall and length of all settings. Questions cost the most and can only rule out;
    they are asked from the lowest CHAIR_I on, until a setting keeps its F1.

    Args:
        settings: to choose from.
        describe: from the number of a setting to scores of captions, as `chair.score` gives them.
        ask: the same for answers, as `pope.score`; None where there are no questions.
        baseline: scores without the method.
        limits: what a setting may cost.

    Returns:
        the trials, in the order of the settings, and the number of the chosen one, or None.
    """
    said = [describe(number) for number in range(len(settings))]
    trials = []
    for setting, scores in zip(settings, said, strict=True):
        captioned = Hallucination.of(scores)
        trials.append(Trial(setting, captioned, limits.broken(captioned, baseline)))
    candidates = [number for number, trial in enumerate(trials) if not trial.broken]
    for number in sorted(candidates, key=lambda number: (said[number]["chair_i"], number)):
        scored = Hallucination.of(said[number], ask(number))
        trials[number] = Trial(settings[number], scored, limits.broken(scored, baseline))
        if not trials[number].broken:
            return tuple(trials), number
    return tuple(trials), None
