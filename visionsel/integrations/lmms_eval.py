"""Any vision-language model of transformers with interventions in lmms-eval, under the name `visionsel`.

    python -m lmms_eval --model visionsel --tasks pope --batch_size 8 \\
        --model_args 'pretrained=llava-hf/llava-1.5-7b-hf,dtype=bfloat16,modulate=vhr:alpha=2'

Methods are written as for `visionsel generate`. lmms-eval splits `--model_args` at commas, so those with
several settings go in quotes, and several methods are told apart by semicolons:

    'pretrained=...,prune="fastv:keep=0.25,layer=2; divprune:keep=0.5",decode="vcd:alpha=1,beta=0.1"'

Installing visionsel registers the name by the entry point group `lmms_eval.models`. Read from and tested
with lmms-eval 0.7.3.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(
        f"visionsel.integrations.lmms_eval needs lmms-eval: pip install lmms_eval ({error})"
    ) from error

from visionsel.generation import load_lvlm, open_image, parse_methods
from visionsel.integrations.conversations import Conversation, answer_conversations, sampling_options, specs

__all__ = ["VisionSel", "manifest"]

LOG = logging.getLogger(__name__)
_OF_LLAVA = {"image_aspect_ratio"}
"""Given by tasks to LLaVA's own code; transformers' processors have their settings with the model."""
_SAMPLING = {"do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty"}


def manifest() -> Any:
    """What the entry point gives lmms-eval: where the model is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="visionsel", chat_class_path="visionsel.integrations.lmms_eval.VisionSel")


class VisionSel(lmms):
    """A chat model of lmms-eval.

    Args:
        pretrained: a folder or a name of transformers, or `"embedded"`.
        prune, modulate, decode: methods as text, see the head of this file; lists of them from Python.
        dtype: of the weights, such as `"bfloat16"`; default what they are stored in.
        device: default cuda if there is one, else cpu; under a launcher of several processes, each has the
            device of its rank.
        batch_size: requests at a time.
        max_new_tokens: of answers to tasks that do not say, as in most adapters of lmms-eval.
        obey_until: whether answers end at the texts that a task names. Where a task names none, lmms-eval
            says two line breaks, and most of its own adapters pass over it: to compare long captions with
            their numbers, pass False.
        max_batch_size: of automatic batch sizes, which are not known here.
        others: none; text that a comma has cut off lands here.

    Raises:
        ValueError: for an unknown method or argument, or a batch size that is no number above 0.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "embedded",
        prune: str | Sequence[str] = (),
        modulate: str | Sequence[str] = (),
        decode: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        obey_until: bool = True,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise ValueError(
                f"unknown model_args {', '.join(others)}; there are pretrained, prune, modulate, decode, "
                "dtype, device, batch_size, max_new_tokens and obey_until. A method with several settings "
                'goes in quotes: prune="fastv:keep=0.25,layer=2"'
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number above 0, got {batch_size!r}")
        decoders = specs(decode)
        if len(decoders) > 1:
            raise ValueError(f"one method decodes at a time, got {', '.join(decoders)}")
        if device in (None, "cuda") and "LOCAL_RANK" in os.environ:
            import torch

            device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
        self.batch_size = int(batch_size)
        self.max_new_tokens, self.obey_until = int(max_new_tokens), obey_until
        self.model, self.processor = load_lvlm(pretrained, device, dtype)
        self.methods = parse_methods(
            self.model, self.processor, specs(prune), specs(modulate), decoders[0] if decoders else None
        )
        self.device = self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests of chat tasks, in their order."""
        conversations = []
        for request in requests:
            _, messages_of, options, document, task, split = request.args
            messages = messages_of(self.task_dict[task][split][document])
            turns, images = _turns(messages)
            conversations.append(Conversation(turns, images, *self._options(options)))
        return answer_conversations(self.model, self.processor, self.methods, conversations, self.batch_size)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not for tasks of several rounds."""
        raise NotImplementedError("visionsel answers tasks of one round (generate_until) only")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not for tasks that score given answers: what decoding methods change is the choice of tokens."""
        raise NotImplementedError(
            "visionsel answers tasks that generate (generate_until) only; choose a variant that does"
        )

    def _options(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Options of `generate()`, and the texts at which an answer ends."""
        options = dict(given)
        until = options.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        for name in _OF_LLAVA & set(options):
            LOG.info("%s=%r is of LLaVA's own code and has no meaning here", name, options.pop(name))
        if unknown := set(options) - _SAMPLING - {"max_new_tokens"}:
            raise ValueError(
                f"unknown generation settings {', '.join(sorted(unknown))}; there are until, max_new_tokens, "
                f"{', '.join(sorted(_SAMPLING))}"
            )
        new = options.pop("max_new_tokens", None)
        found = sampling_options(self.max_new_tokens if new is None else new, **options)
        return found, until if self.obey_until else ()


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages of lmms-eval as turns of transformers, and their images."""
    turns, images = [], []
    for message in messages:
        content = message["content"]
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                images.append(open_image(part["url"]))
                parts.append({"type": "image"})
            else:
                raise NotImplementedError(f"visionsel answers about images and text, got {part['type']}")
        turns.append({"role": message["role"], "content": parts})
    return turns, images
