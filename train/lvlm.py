"""Train a LLaVA of transformers on the shapes world, from nothing, in stages.

    python -m train.lvlm fit --config configs/shapes/lvlm.yaml            # one command to the shipped model
    python -m train.lvlm fit --config runs/shapes/lvlm/config.yaml \\
        --ckpt_path runs/shapes/lvlm/checkpoints/last.ckpt                # continue exactly

- the model is `LlavaForConditionalGeneration`: a CLIP-style vision tower, or any timm model (ours too) behind
  an adapter from maps to tokens; a projector; a small Llama. At the end of training `RUN/export` holds it and
  its processor as ordinary Hugging Face files;
- the stages (`train.lvlm_data.Stage`) are the curriculum: first the tower alone learns to see from dense
  auxiliary targets (what each patch shows), then everything learns captions and questions, then, for a model
  that hallucinates as large ones do, captions that mention what usually comes along;
- matrices are updated by Muon (Jordan et al. 2024), the rest by AdamW, both timm's.
"""

import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from timm.optim import Muon
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss
from torchmetrics import MeanMetric

from train.cli import RunCLI, brief, run_cli
from train.lvlm_data import KINDS, LVLMData, Stage
from visionsel.data.resumable import seed_generators
from visionsel.data.shapes import COLORS, SHAPES
from visionsel.embedded.files import write_weights
from visionsel.embedded.lvlm import MEAN, STD, build_processor
from visionsel.embedded.tokenizer import BEGIN, END, IMAGE, PAD
from visionsel.multimodal import TimmTowerConfig

__all__ = ["LVLM", "build_lvlm", "main"]

BACKGROUND_WEIGHT = 0.3  # most patches are background
BOX_WEIGHT = 5.0  # sides are fractions of the image: their errors are small numbers
AUXILIARY = (len(SHAPES) + 1, len(COLORS) + 1, 4)  # outputs of the dense head: shape, colour, box


def build_lvlm(
    vocabulary: dict[str, int],
    image_size: int = 64,
    patch_size: int = 8,
    vision_dim: int = 128,
    vision_layers: int = 5,
    vision_heads: int = 4,
    dim: int = 128,
    layers: int = 4,
    heads: int = 4,
    rope_theta: float = 1e5,
    backbone: str | None = None,
    backbone_args: dict[str, Any] | None = None,
    backbone_stage: int = 1,
) -> Any:
    """A `LlavaForConditionalGeneration` with random weights.

    As in LLaVA-1.5 (Liu et al. 2024) the image tokens are the last but one layer of a CLIP vision tower
    without its class token, behind a projector of two layers.

    Args:
        vocabulary: word to index, the special tokens among them.
        image_size, patch_size: pixels a side.
        vision_dim, vision_layers, vision_heads: of the tower; its MLPs are four times as wide.
        dim, layers, heads: of the Llama; its MLPs are three times as wide.
        rope_theta: base of the rotary positions.
        backbone: a timm name; its map of stage `backbone_stage`, behind an adapter, takes the place of the
            CLIP tower (`visionsel.multimodal.TimmTower`).
        backbone_args: its further arguments.

    Raises:
        ValueError: when the backbone's stage does not have one position for each patch.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    if backbone is None:
        vision: Any = CLIPVisionConfig(
            hidden_size=vision_dim,
            intermediate_size=4 * vision_dim,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_dim,
        )
    else:
        vision = TimmTowerConfig(backbone, backbone_args, backbone_stage, vision_dim, image_size, patch_size)
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2 if backbone is None else -1,
        vision_feature_select_strategy="default" if backbone is None else "full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
        max_new_tokens=64,
        do_sample=False,
    )
    return model


class LVLM(LightningModule):
    """A LLaVA with its curriculum.

    Args:
        vocabulary: of the data.
        stages: of the data.
        image_size, patch_size: of the data.
        architecture: arguments of `build_lvlm`.
        question_weight: of the questions' loss beside the captions'.
        auxiliary_weight: of the dense targets beside text; they stand alone in stages without text.
        tower_lr: the tower's learning rate beside the language model's, in stages with text.
        adamw_lr: learning rate of what is no matrix, beside that of the matrices.
        weight_decay: of the matrices.
        seed: of the initial weights and of dropout.

    Raises:
        ValueError: when the architecture cannot be built.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        stages: list[Stage],
        image_size: int = 64,
        patch_size: int = 8,
        architecture: dict[str, Any] | None = None,
        question_weight: float = 2.0,
        auxiliary_weight: float = 0.3,
        tower_lr: float = 0.5,
        adamw_lr: float = 0.5,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["stages"])
        self.stages = [stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages]
        self.hparams["stages"] = [asdict(stage) for stage in self.stages]
        seed_generators(seed)
        try:
            self.net = build_lvlm(vocabulary, image_size, patch_size, **(architecture or {}))
        except (TypeError, RuntimeError, ZeroDivisionError) as error:  # an argument that is not one
            raise ValueError(f"architecture {architecture}: {brief(error)}") from error
        width = self.net.config.vision_config.hidden_size
        self.dense_head = nn.Linear(width, sum(AUXILIARY))
        self.presence_head = nn.Linear(width, len(SHAPES) + len(COLORS))
        self.answers: Any = nn.ModuleDict({kind: MeanMetric() for kind in ("caption", "patch", *KINDS)})

    @property
    def stage(self) -> Stage:
        """Of the current epoch."""
        return self._stage(self.current_epoch)[0]

    def _stage(self, epoch: int) -> tuple[Stage, int]:
        """The stage of an epoch, and its first epoch."""
        first = 0
        for stage in self.stages:
            if epoch < first + stage.epochs:
                return stage, first
            first += stage.epochs
        return self.stages[-1], first - self.stages[-1].epochs

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, H, W, 3]` bytes -> image tokens `[B, N, C]` and the pooled image `[B, C]`."""
        images = (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN[0]) / STD[0]
        tower = self.net.model.vision_tower(images, output_hidden_states=True)
        tokens = tower.hidden_states[self.net.config.vision_feature_layer]
        if self.net.config.vision_feature_select_strategy == "default":
            tokens = tokens[:, 1:]  # without the class token
        return tokens, tower.pooler_output

    def auxiliary_loss(self, batch: dict[str, Tensor], tokens: Tensor, pooled: Tensor) -> Tensor:
        """Shape and colour of every patch, the box of its object, and what the image holds."""
        shape, color, box = self.dense_head(tokens).split(AUXILIARY, dim=-1)
        shown = batch["shape"].flatten(1) > 0
        loss = BOX_WEIGHT * l1_loss(box[shown], batch["box"].flatten(1, 2)[shown])
        loss = loss + binary_cross_entropy_with_logits(self.presence_head(pooled), batch["presence"])
        for logits, target in ((shape, batch["shape"]), (color, batch["color"])):
            weight = torch.ones(logits.shape[-1], device=logits.device)
            weight[0] = BACKGROUND_WEIGHT
            loss = loss + cross_entropy(logits.flatten(0, 1).float(), target.flatten(), weight)
        self._shape_logits = shape.detach()
        return loss

    def forward(self, batch: dict[str, Tensor], tokens: Tensor, blind: float = 0.0) -> Tensor:
        """Logits `[M, V]` at the M positions that predict a label; for `blind` see `Stage`."""
        image = self.net.model.multi_modal_projector(tokens)
        words = self.net.get_input_embeddings()(batch["tokens"])
        inputs = torch.cat([words[:, :1], image.to(words.dtype), words[:, 1 + image.shape[1] :]], dim=1)
        language, mask = self.net.model.language_model, turn_mask(batch["turns"], inputs.dtype)
        with _first_mask(language, blind_mask(mask, image.shape[1], blind)) if blind else nullcontext():
            hidden = language(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=batch["positions"],
                use_cache=False,
            ).last_hidden_state
        return self.net.lm_head(hidden[:, :-1][batch["labels"][:, 1:] >= 0])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Auxiliary loss, and in stages with text that of captions and questions."""
        tokens, pooled = self.see(batch["pixels"])
        size = len(tokens)
        loss = self.auxiliary_loss(batch, tokens, pooled)
        self.log("train/auxiliary", loss, batch_size=size)
        if "tokens" in batch:
            logits = self(batch, tokens, self.stage.blind).float()
            losses = cross_entropy(logits, _labels(batch), reduction="none")
            asked = batch["kinds"][:, 1:][batch["labels"][:, 1:] >= 0] >= 0
            caption, question = losses[~asked].mean(), losses[asked].mean()
            self.log_dict(
                {"train/caption": caption, "train/question": question}, batch_size=size, prog_bar=True
            )
            weight = self.hparams["question_weight"]
            loss = (caption + weight * question) / (1 + weight) + self.hparams["auxiliary_weight"] * loss
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Share of answers of which every word is the likeliest, so that greedy decoding gives them."""
        tokens, pooled = self.see(batch["pixels"])
        self.auxiliary_loss(batch, tokens, pooled)
        shown = batch["shape"].flatten(1) > 0
        self.answers["patch"].update((self._shape_logits.argmax(-1) == batch["shape"].flatten(1))[shown])
        if self.stage.text:
            right = self(batch, tokens).argmax(-1) == _labels(batch)
            where = batch["labels"][:, 1:] >= 0
            wrong = torch.zeros_like(where).masked_scatter(where, ~right)
            turns, kinds = batch["turns"][:, 1:], batch["kinds"][:, 1:]
            for turn in range(1, int(turns.max()) + 1):
                here = (turns == turn) & where
                exact = ~(wrong & here).any(1)
                kind = torch.where(here, kinds, -2).amax(1)
                for number, name in enumerate(("caption", *KINDS), -1):
                    if (chosen := kind == number).any():
                        self.answers[name].update(exact[chosen].float())

    def on_validation_epoch_end(self) -> None:
        """Log what was asked; `val/answers` is the mean over the kinds of questions."""
        scores = {name: metric.compute() for name, metric in self.answers.items() if metric.update_count}
        for metric in self.answers.values():
            metric.reset()
        kinds = [scores.get(kind, torch.tensor(0.0, device=self.device)) for kind in KINDS]
        self.log_dict({f"val/{name}": score for name, score in scores.items()})
        self.log("val/answers", torch.stack(kinds).mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Muon for the matrices and AdamW for the rest, in one optimizer."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            tower = ".vision_tower." in name
            matrix = parameter.ndim == 2 and ("layers." in name or "multi_modal_projector" in name)
            groups.setdefault((tower, matrix), []).append(parameter)
        optimizer = Muon(
            [
                {"params": parameters, "use_fallback": not matrix, "tower": tower}
                for (tower, matrix), parameters in groups.items()
            ],
            lr=self.stages[0].lr,
            weight_decay=self.hparams["weight_decay"],
            nesterov=True,
            betas=(0.9, 0.98),
            fallback_lr_scale=self.hparams["adamw_lr"],
        )
        return optimizer

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Set the learning rates of the update, from its number alone."""
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        stage, first = self._stage(self.current_epoch)
        done = (self.global_step - first * per_epoch + 1) / (stage.epochs * per_epoch)
        lr = stage.lr * _schedule(done, stage.warmup, stage.final)
        for group in optimizer.param_groups:
            group["lr"] = lr * (self.hparams["tower_lr"] if group["tower"] and stage.text else 1.0)
        self.log("lr", lr)

    def save(self, folder: Path) -> None:
        """Write model and processor as Hugging Face files; the folder appears when it is complete.

        The weights are stored in half precision and load as float32, which the configuration asks for.
        """
        class_token = self.net.config.vision_feature_select_strategy == "default"
        processor = build_processor(self.hparams["image_size"], self.hparams["patch_size"], class_token)
        if processor.tokenizer.get_vocab() != self.hparams["vocabulary"]:
            raise ValueError(
                "the vocabulary is not that of the processor; was this trained by another version?"
            )
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        tied = "lm_head.weight"  # the embeddings', under a second name
        try:
            write_weights(
                {name: value for name, value in self.net.state_dict().items() if name != tied},
                partial / "model.safetensors",
            )
            self.net.config.dtype = torch.float32
            self.net.config.architectures = [type(self.net).__name__]
            self.net.config.save_pretrained(partial)
            self.net.generation_config.save_pretrained(partial)
            processor.save_pretrained(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def turn_mask(turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `[B, 1, N, N]`: a token sees the prefix (turn 0) and its own turn, up to itself."""
    count = turns.shape[1]
    same = turns[:, :, None] == turns[:, None, :]
    causal = torch.ones(count, count, dtype=torch.bool, device=turns.device).tril()
    seen = (same | (turns[:, None, :] == 0)) & causal
    return torch.zeros(seen.shape, dtype=dtype, device=turns.device).masked_fill(~seen, -1e9)[:, None]


def blind_mask(mask: Tensor, image_tokens: int, share: float) -> Tensor:
    """The additive mask `[B, 1, N, N]` without the image for the words of a random share of the samples."""
    blind = torch.rand(len(mask)) < share  # drawn on the CPU: the same for every device
    mask, end = mask.clone(), 1 + image_tokens
    mask[blind.to(mask.device), :, end:, 1:end] = -1e9
    return mask


@contextmanager
def _first_mask(language: Any, mask: Tensor) -> Iterator[None]:
    """Give the first layer another mask."""

    def exchange(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": mask}

    handle = language.layers[0].register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _labels(batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"][:, 1:]
    return labels[labels >= 0]


def _schedule(done: float, warmup: float, final: float) -> float:
    """Linear warmup, then a cosine to `final`; `done` from 0 to 1."""
    if done < warmup:
        return done / warmup
    progress = (done - warmup) / max(1 - warmup, 1e-9)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class LVLMCLI(RunCLI):
    """The command line: fixed classes; model and data share the curriculum and the sizes."""

    monitor = "val/answers"
    program = "train.lvlm"
    fixed = ("image_size", "patch_size", "architecture")
    marks = ("vocabulary",)

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(LVLM, LVLMData, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the model takes from the data."""
        super().add_arguments_to_parser(parser)
        for name in ("image_size", "patch_size", "stages"):
            parser.link_arguments(f"data.{name}", f"model.{name}")
        parser.link_arguments("data.words", "model.vocabulary", apply_on="instantiate")

    def after_fit(self) -> None:
        """Write the model."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.model.save(self.output / "export")
            print(f"model and processor in {self.output / 'export'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.lvlm", LVLMCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
