"""Sentence attention: where an answer is seen, from a picture and a sentence, without a language model of it.

Khoshsirat & Kambhamettu 2023, "Sentence Attention Blocks for Answer Grounding", ICCV 2023, arXiv:2309.11593.
An ordinary backbone sees the image, at several scales; at each scale a vector of the sentence (question and
answer) says how much each channel counts. The scales are merged from the coarsest up. It is small, wants
masks to learn from, and is what maps of large models have to be compared with.

Any backbone of timm with `features_only` will do; the paper takes EfficientNet-B7, and sentence vectors of
MiniLM (`sentence_vectors.py`).
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import timm
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from visionsel.files import whole_file, write_json

__all__ = ["SentenceAttentionBlock", "SentenceAttentionNet", "mask_loss"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class SentenceAttentionBlock(nn.Module):
    """Channels of a feature map, weighted by what a sentence is about.

    `x * softmax(Linear(ReLU(LayerNorm(Linear(sentence)))))`, the softmax over channels: a squeeze-and-excite
    block (Hu et al. 2018) that looks at the sentence, and whose channels compete.

    Args:
        channels: of the feature map.
        sentence_dim: of the sentence vector.
        hidden: between the two linear layers; 1536 in the paper, four times the 384 of MiniLM.
    """

    def __init__(self, channels: int, sentence_dim: int, hidden: int = 1536) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(sentence_dim, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
            nn.Softmax(dim=-1),
        )

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        """Weigh the channels of `x` `[B, C, h, w]` by `sentence` `[B, D]`."""
        return x * self.gate(sentence)[:, :, None, None]


class SentenceAttentionNet(nn.Module):
    """A backbone, a block for each of its scales, and a merge to one map.

    The image is normalised by itself (instance norm), so that no mean and deviation of a data set are needed.
    A coarser scale gets a 1 x 1 convolution and a batch norm, is enlarged bilinearly and added to the next
    finer one; then ReLU. The finest gets dropout and a 1 x 1 convolution, and is enlarged to the image.

    Args:
        backbone: a name of timm with `features_only`, ours among them; the paper takes `"efficientnet_b7"`.
        sentence_dim: of the sentence vectors; 384 for MiniLM.
        hidden: see `SentenceAttentionBlock`.
        dropout: of the merged map; 0.5 in the paper.
        pretrained: download the weights of the backbone, if timm has them.
        out_indices: which scales of the backbone; None: all that it gives.
        backbone_args: others of the backbone.

    Raises:
        ValueError: for numbers that cannot be, or a backbone that timm does not have.
    """

    def __init__(
        self,
        backbone: str = "efficientnet_b7",
        sentence_dim: int = 384,
        hidden: int = 1536,
        dropout: float = 0.5,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        super().__init__()
        for name, value in (("sentence_dim", sentence_dim), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if not timm.is_model(backbone):
            raise ValueError(f"timm has no backbone {backbone!r}; timm.list_models() names those it has")
        if out_indices is not None:
            backbone_args["out_indices"] = tuple(out_indices)
        self.config: dict[str, Any] = {
            "backbone": backbone,
            "sentence_dim": sentence_dim,
            "hidden": hidden,
            "dropout": dropout,
            **backbone_args,
        }
        self.norm = nn.InstanceNorm2d(3)
        pyramid: Any = timm.create_model(backbone, features_only=True, pretrained=pretrained, **backbone_args)
        self.backbone: nn.Module = pyramid
        self.channels_last = str(getattr(pyramid, "output_fmt", "NCHW")).endswith("NHWC")
        channels: list[int] = pyramid.feature_info.channels()
        self.sentence_dim = sentence_dim
        self.blocks = nn.ModuleList(
            SentenceAttentionBlock(number, sentence_dim, hidden) for number in channels
        )
        self.merges = nn.ModuleList(
            nn.Sequential(nn.Conv2d(coarse, fine, 1, bias=False), nn.BatchNorm2d(fine))
            for fine, coarse in pairwise(channels)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """Logits of the mask.

        Args:
            image: `[B, 3, H, W]`, of any scale: it is normalised here.
            sentence: `[B, D]`.

        Returns:
            `[B, H, W]`.

        Raises:
            ValueError: for another number of sentences, or vectors of another length.
        """
        if sentence.shape != (len(image), self.sentence_dim):
            raise ValueError(
                f"{len(image)} images need sentences [{len(image)}, {self.sentence_dim}], got "
                f"{list(sentence.shape)}"
            )
        scales = self.backbone(self.norm(image))
        if self.channels_last:
            scales = [scale.movedim(-1, 1) for scale in scales]
        gated = [block(scale, sentence) for block, scale in zip(self.blocks, scales, strict=True)]
        merged = gated[-1]
        for fine, merge in zip(reversed(gated[:-1]), reversed(self.merges), strict=True):
            coarse = interpolate(merge(merged), fine.shape[2:], mode="bilinear", align_corners=False)
            merged = relu(fine + coarse)
        logits = self.head(self.dropout(merged))
        return interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    def save(self, folder: str | Path, sentences: str | None = None) -> Path:
        """Write weights and configuration into a folder that `load` reads; returns the folder.

        Args:
            folder: is made where there is none.
            sentences: the encoder that it was trained with (`load_sentence_encoder`), for whoever reads it.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with whole_file(folder / WEIGHTS) as partial:
            save_file(state, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # safetensors makes it private
        write_json({"net": self.config, "sentences": sentences}, folder / CONFIG)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The net that `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: when a file is missing.
            ValueError: for a file that is broken, or a configuration that does not fit the weights.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no {name} in {folder}: not a folder of SentenceAttentionNet; train one with "
                    "train.grounding_sentence"
                )
        try:
            net = cls(**json.loads((folder / CONFIG).read_text())["net"])
            net.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} holds no net, or its files do not fit: {error}") from error
        return net.eval()


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy and soft Dice, with equal weights; the paper's loss is not known to us.

    Args:
        logits: `[B, H, W]`.
        masks: bool, likewise.
    """
    target = masks.to(logits)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, target)
    likely = logits.sigmoid()
    shared, total = (likely * target).sum((1, 2)), (likely + target).sum((1, 2))
    return entropy + (1 - (2 * shared + 1) / (total + 1)).mean()
