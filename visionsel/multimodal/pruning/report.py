"""What a pruner did to the last prompt."""

from torch import Tensor

from visionsel.multimodal.dropping import Dropper, Record
from visionsel.multimodal.session import Session

__all__ = ["Pruned"]


class Pruned:
    """What the context of a pruner yields: what was dropped from the last prompt, of all pruners on the model."""

    def __init__(self, session: Session, dropper: Dropper) -> None:
        self._session, self._dropper = session, dropper
        self._record: Record | None = None

    def finish(self) -> None:
        """The context ends: hold on to the last record."""
        self._record = self._dropper.record

    @property
    def record(self) -> Record:
        """Of the last prompt.

        Raises:
            RuntimeError: before the model has read one.
        """
        record = self._record or self._dropper.record
        if record is None:
            raise RuntimeError("no prompt yet: call the model or generate() inside the context")
        return record

    @property
    def kept(self) -> list[tuple[int, Tensor]]:
        """For each stage its layer and bool `[B, L]`: the tokens of the prompt that entered the layer."""
        return self.record.kept
