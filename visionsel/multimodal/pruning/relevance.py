"""Which image tokens an answer rests on: attention rollout weighted by gradients.

After Chefer et al. 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers" (ICCV; arXiv:2103.15679), the rule for self-attention: from the first layer up

    A' = mean over heads of (dy/dA * A)^+        R <- R + A' R        R = identity at first

with attention A, and y the log-likelihood of the answer. Asked for are the rows of R that predict the answer,
so the product is taken from the last layer down, a vector a sample: it meets the layers in the order of the
backward pass, and only one layer's attention is in memory at a time. Attention is made differentiable by an
explicit softmax in place of the kernel; the model stays as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, Output, explicit_attention
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session, open_session

__all__ = ["relevance"]

Captured = tuple[Tensor, dict[str, Any]]


@torch.inference_mode(False)  # it takes gradients, whatever the caller does
def relevance(model: nn.Module, inputs: Mapping[str, Any], answer_start: int | Tensor) -> Tensor:
    """How much each image token contributes to the log-likelihood of given answers.

    Args:
        model: a supported vision-language model in evaluation mode.
        inputs: what its processor makes of prompts with their answers; padding may be on either side.
        answer_start: the place in `input_ids`, padding counted, of the first token of the answer: one for all
            rows, or int64 `[B]`. The answer goes on to the end of the row.

    Returns:
        `[B, N]`, 0 or more: the image tokens of each sample in the order of the prompt, 0 behind the last.
        float32 (float64 where the model is).

    Raises:
        ValueError: for a model in training mode, or an answer that does not lie behind the first token.
        RuntimeError: inside the context of an intervention on the same model.
    """
    if model.training:
        raise ValueError("relevance is that of a model in evaluation mode; call model.eval()")
    with open_session(model) as session:
        if session.users > 1:
            raise RuntimeError("an intervention is open on this model; leave its context first")
        with torch.no_grad():
            captured, last = _read(session, inputs)
        assert session.scope is not None
        scope = session.scope
        device = last.device
        answer = _answer(scope, answer_start).to(device)
        gradient = _likelihood_gradient(session, scope, last, answer)
        # R's rows of the tokens that predict the answer, summed
        rows = answer.roll(-1, 1).to(torch.promote_types(last.dtype, torch.float32))
        for layer in reversed(range(len(captured))):
            gradient, weighted = _backward(session, layer, captured.pop(), gradient)
            rows = rows + (rows[:, None] @ weighted)[:, 0]
    visual = scope.visual.to(device)
    number = visual.sum(1)
    order = (~visual).to(torch.int8).argsort(dim=1, stable=True)[:, : int(number.amax())]
    there = torch.arange(order.shape[1], device=device) < number[:, None]
    return rows.gather(1, order) * there


def _read(session: Session, inputs: Mapping[str, Any]) -> tuple[list[Captured], Tensor]:
    """What enters each decoder layer, `[B, L, C]` and the other arguments, and what the last one gives."""
    captured: list[Captured] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        captured.append((hidden, rest))

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in session.layers]
    hooks.append(
        session.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    )
    try:
        base: Any = session.model.model
        base(**{**inputs, "use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
    return captured, outputs[0]


def _answer(scope: PromptScope, start: int | Tensor) -> Tensor:
    """bool `[B, L]`: tokens of the answers."""
    real = scope.real
    place = torch.arange(scope.length, device=real.device).expand_as(real)
    first = torch.as_tensor(start, device=real.device).expand(len(real))[:, None]
    answer = real & (place >= first)
    before = real & (place < first)
    if not bool((answer.any(1) & before.any(1)).all()):
        raise ValueError(
            f"answer_start {torch.as_tensor(start).tolist()}: each row of {scope.length} tokens needs a "
            "prompt before it and an answer from it on; padding counts"
        )
    return answer


def _likelihood_gradient(session: Session, scope: PromptScope, last: Tensor, answer: Tensor) -> Tensor:
    """Gradient of the log-likelihood of the answers with respect to the output of the last layer."""
    row, place = answer.nonzero(as_tuple=True)
    with torch.enable_grad():
        leaf = last.detach().requires_grad_()
        states = session.decoder.norm(leaf[row, place - 1])
        head: Any = session.model.get_output_embeddings()  # type: ignore[operator]
        logits = head(states)
        config: Any = session.decoder.config
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        tokens = scope.input_ids.to(wide.device)[row.to(wide.device), place.to(wide.device)]
        [gradient] = torch.autograd.grad(wide.gather(1, tokens[:, None]).sum(), leaf)
    return gradient


def _backward(session: Session, layer: int, captured: Captured, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Through one layer, run again.

    Returns:
        the gradient with respect to what enters the layer, and `[B, L, L]`, the mean over heads of the
        positive part of attention times its gradient.
    """
    hidden, arguments = captured
    found: list[Tensor] = []
    with session.tap(layer, _explicit(found)), torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        output = session.layers[layer](leaf, **arguments)
        before, slope = torch.autograd.grad(output, (leaf, found[0]), gradient)
    return before, (slope * found[0].detach()).clamp(min=0).mean(1)


def _explicit(found: list[Tensor]) -> Callable[[AttentionCall, Any], Output]:
    """Attention by an explicit softmax, whose weights are left in a list."""

    def attend(call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        output, weights = explicit_attention(call)
        found.append(weights)
        return output, None

    return attend
