"""Sentence attention: the block and the merge are the paper's, and sentences become vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import BertConfig, BertModel

from visionsel.data.shapes import split_words
from visionsel.embedded import load_lvlm
from visionsel.multimodal.grounding.sentence_attention import (
    SentenceAttentionBlock,
    SentenceAttentionNet,
    mask_loss,
)
from visionsel.multimodal.grounding.sentence_vectors import (
    bag_of_words,
    embedding_means,
    load_sentence_encoder,
    pooled_sentences,
)

SMALL: dict[str, Any] = {"backbone": "test_efficientnet", "sentence_dim": 7, "hidden": 12}


def test_a_block_is_a_softmax_over_channels_of_the_sentence() -> None:
    block = SentenceAttentionBlock(5, 7, hidden=12)
    x, sentence = torch.randn(2, 5, 3, 4), torch.randn(2, 7)
    first, norm, _, second, _ = block.gate
    inner = sentence @ first.weight.T + first.bias
    inner = (inner - inner.mean(1, keepdim=True)) / (
        inner.var(1, keepdim=True, correction=0) + norm.eps
    ).sqrt()
    inner = (inner * norm.weight + norm.bias).clamp(min=0)
    logits = inner @ second.weight.T + second.bias
    weights = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = torch.stack([x[b] * weights[b, :, None, None] for b in range(2)])
    torch.testing.assert_close(block(x, sentence), expected, rtol=1e-5, atol=1e-6)
    assert block.gate[0].out_features == 12
    assert SentenceAttentionBlock(5, 384).gate[0].out_features == 1536


def plain(net: SentenceAttentionNet, image: Tensor, sentence: Tensor) -> Tensor:
    """The net in evaluation mode, scale by scale."""
    spread = image.var((2, 3), keepdim=True, correction=0)
    normal = (image - image.mean((2, 3), keepdim=True)) / (spread + 1e-5).sqrt()
    scales = [block(scale, sentence) for block, scale in zip(net.blocks, net.backbone(normal), strict=True)]
    merged = scales[-1]
    for level in reversed(range(len(scales) - 1)):
        convolution, norm = net.merges[level]
        coarse = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], merged)
        coarse = (coarse - norm.running_mean[:, None, None]) / (
            norm.running_var[:, None, None] + norm.eps
        ).sqrt()
        coarse = coarse * norm.weight[:, None, None] + norm.bias[:, None, None]
        coarse = interpolate(coarse, scales[level].shape[2:], mode="bilinear", align_corners=False)
        merged = (scales[level] + coarse).clamp(min=0)
    logits = torch.einsum("i,bihw->bhw", net.head.weight[0, :, 0, 0], merged) + net.head.bias
    return interpolate(logits[:, None], image.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def test_a_net_is_its_plain_restatement_and_learns_everywhere() -> None:
    net = SentenceAttentionNet(**SMALL)
    image, sentence = 3 + 5 * torch.rand(2, 3, 48, 64), torch.randn(2, 7)
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[:, 10:20, 10:30] = True
    mask_loss(net(image, sentence), masks).backward()  # moves the averages of the batch norms, too
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())
    net.eval()
    with torch.no_grad():
        logits = net(image, sentence)
        torch.testing.assert_close(logits, plain(net, image, sentence), rtol=1e-4, atol=1e-5)
        assert logits.shape == (2, 48, 64)
        # the scale of the pixels does not matter, the sentence does
        torch.testing.assert_close(net(image * 20 - 9, sentence), logits, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(net(image, sentence.flip(0)), logits, atol=1e-4)


def test_a_backbone_with_channels_last_and_chosen_scales_are_taken() -> None:
    net = SentenceAttentionNet(
        "swin_tiny_patch4_window7_224",
        sentence_dim=3,
        hidden=4,
        out_indices=(1, 2),
        img_size=32,
        embed_dim=8,
        depths=(1, 1, 1),
        num_heads=(1, 1, 1),
        window_size=4,
    )
    assert net.channels_last
    assert [block.gate[3].out_features for block in net.blocks] == [16, 32]
    assert net(torch.rand(2, 3, 32, 32), torch.rand(2, 3)).shape == (2, 32, 32)


def test_a_net_is_read_back_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    net = SentenceAttentionNet(**SMALL).eval()
    image, sentence = torch.rand(1, 3, 32, 32), torch.rand(1, 7)
    net.save(tmp_path / "net", "words")
    again = SentenceAttentionNet.load(tmp_path / "net")
    assert torch.equal(again(image, sentence), net(image, sentence))
    assert json.loads((tmp_path / "net" / "config.json").read_text())["sentences"] == "words"
    (tmp_path / "net" / "config.json").write_text(json.dumps({"net": SMALL | {"hidden": 13}}))
    with pytest.raises(ValueError, match="do not fit"):
        SentenceAttentionNet.load(tmp_path / "net")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        SentenceAttentionNet.load(tmp_path)
    with pytest.raises(ValueError, match=r"1 images need sentences \[1, 7\], got \[2, 7\]"):
        net(image, torch.rand(2, 7))
    for wrong, message in (
        ({"backbone": "resnet"}, "timm has no backbone 'resnet'"),
        ({"dropout": 1.0}, "dropout"),
        ({"hidden": 0}, "hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            SentenceAttentionNet(**SMALL | wrong)


def test_the_loss_is_cross_entropy_and_dice() -> None:
    logits = torch.tensor([[[2.0, -1.0]], [[0.5, -3.0]]])
    masks = torch.tensor([[[True, False]], [[False, False]]])
    p = logits.sigmoid()
    entropy = -(p[0, 0, 0].log() + sum((1 - one).log() for one in (p[0, 0, 1], p[1, 0, 0], p[1, 0, 1]))) / 4
    dice = 1 - (2 * p[0, 0, 0] + 1) / (p[0].sum() + 1 + 1), 1 - 1 / (p[1].sum() + 1)
    torch.testing.assert_close(mask_loss(logits, masks), entropy + sum(dice) / 2)


class _Tokenizer:
    """Letters, padded on the right with 0."""

    def __call__(self, texts: list[str], **options: Any) -> Any:
        from transformers import BatchEncoding

        assert options["padding"]
        length = max(map(len, texts))
        ids = torch.tensor([[ord(one) - 96 for one in text] + [0] * (length - len(text)) for text in texts])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def test_sentences_are_means_over_their_own_tokens() -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False).eval()
    vectors = pooled_sentences(model, _Tokenizer(), ["abc", "defgh"])
    for row, text in enumerate(("abc", "defgh")):
        with torch.no_grad():
            hidden = model(**_Tokenizer()([text], padding=True)).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vectors[row], hidden / hidden.norm(), rtol=1e-4, atol=1e-5)


def test_words_and_embeddings_stand_in_for_an_encoder() -> None:
    found = bag_of_words(["the red star? red", "blue"], ["red", "star"], split_words)
    expected = torch.tensor([[2.0, 1.0, 2.0], [0.0, 0.0, 1.0]])  # `the` and `?` are in no list
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    encode, length = load_sentence_encoder("words")
    assert encode(["where is the red star? top left"], torch.device("cpu")).shape == (1, length)
    model, processor = load_lvlm()
    vectors = embedding_means(model, processor.tokenizer, ["red star", "the red"])
    table, ids = (
        model.get_input_embeddings().weight,
        processor.tokenizer.convert_tokens_to_ids(["red", "star"]),
    )
    mean = table[ids].mean(0).detach()
    torch.testing.assert_close(vectors[0], mean / mean.norm(), rtol=1e-5, atol=1e-6)
