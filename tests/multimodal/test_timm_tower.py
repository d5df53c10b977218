"""A timm backbone as LLaVA's tower: its map as tokens, ordinary files, early errors."""

import sys

import pytest
import torch
from transformers import AutoModel, LlavaForConditionalGeneration

from train.lvlm import build_lvlm
from visionsel.embedded.tokenizer import SPECIAL
from visionsel.multimodal import TimmTower, TimmTowerConfig

SMALL = {"embed_dims": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "dilations": [1, 1, 1, 1]}
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, "red", "star"])}


def config(**changes) -> TimmTowerConfig:
    return TimmTowerConfig(
        **{"architecture": "selectformer_nano", "model_args": SMALL, "hidden_size": 48} | changes
    )


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": "test_resnet", "model_args": None, "stage": 3, "patch_size": 16}]
)
def test_tokens_are_the_map_rows_first_behind_the_adapter(changes) -> None:
    tower = TimmTower(config(**changes)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = tower(images, output_hidden_states=True)
        (features,) = tower.backbone.forward_intermediates(
            images, indices=[tower.config.stage], intermediates_only=True
        )
    cells = 64 // tower.config.patch_size
    assert out.last_hidden_state.shape == (2, cells**2, 48)
    assert out.hidden_states[-1] is out.last_hidden_state
    for row, column in ((0, 0), (0, cells - 1), (cells - 1, 1)):
        token = tower.proj(tower.norm(features[:, :, row, column]))
        expected = token + tower.position[:, cells * row + column]
        torch.testing.assert_close(out.last_hidden_state[:, cells * row + column], expected)


def test_every_parameter_is_used() -> None:
    tower = TimmTower(config())
    tower(torch.randn(1, 3, 64, 64)).last_hidden_state.sum().backward()
    unused = [name for name, p in tower.named_parameters() if p.grad is None]
    assert not unused


def test_a_llava_with_it_is_saved_and_loaded_exactly(tmp_path) -> None:
    model = build_lvlm(
        VOCABULARY,
        backbone="selectformer_nano",
        backbone_args=SMALL,
        vision_dim=48,
        dim=32,
        layers=2,
        heads=2,
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.model.vision_tower, TimmTower)
    ids = torch.tensor([[1] + [VOCABULARY["<image>"]] * 64 + [7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 64, 64)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_auto_model_knows_it(tmp_path) -> None:
    tower = TimmTower(config()).eval()
    tower.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_a_stage_of_another_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="one position for 4 x 4 pixels, not for a patch of 8"):
        TimmTower(config(stage=0))


def test_without_transformers_the_error_names_the_extra(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("visionsel.multimodal")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "visionsel\[multimodal\]"'):
        import visionsel.multimodal  # noqa: F401
