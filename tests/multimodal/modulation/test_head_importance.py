"""The table of heads is the mean of what plain runs with and without the image say."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.multimodal.modulation.plainly import forward, matrices, without_images
from tests.multimodal.oracle import visual_tokens
from tests.multimodal.runs import ByScore, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import alone, make_inputs
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.multimodal.modulation.head_importance import (
    HeadImportance,
    head_importance,
    visual_sensitivity,
)
from visionsel.multimodal.modulation.vhr import VHR, t_vhd


@lru_cache
def shapes() -> tuple[Any, Any, list[Any]]:
    world = ShapesWorld("anti", seed=2, size=6)
    return *load_lvlm(), [world[number] for number in range(6)]


def until(sample: dict[str, Any], length: int) -> dict[str, Any]:
    """The sample with the first tokens only."""
    shape = sample["input_ids"].shape
    return {key: value[:, :length] if value.shape == shape else value for key, value in sample.items()}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "qwen3_vl"])
def test_every_token_has_the_divergence_that_prompts_ending_there_have(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    before = everything_on(model)
    found = visual_sensitivity(model, inputs)
    assert everything_on(model) == before
    assert list(found) == [0, 1, 2, 3]
    silent = visual_tokens(inputs) | (inputs["attention_mask"] == 0)
    with matrices(model):
        for row in range(2):
            sample = alone(inputs, row)
            start, length = int((inputs["attention_mask"][row] == 0).sum()), inputs["input_ids"].shape[1]
            final = int(visual_tokens(inputs)[row].nonzero()[-1])
            for layer, values in found.items():
                assert not bool(values[row][silent[row]].any())
                assert float(values[row, start:final].abs().amax()) < 1e-5, "text before is as without"
                for place in range(final + 1, length):
                    short = until(sample, place + 1 - start)
                    _, seeing = forward(model, short, {}, 1.0, layer)
                    _, blind = forward(model, without_images(short), {}, 1.0, layer)
                    assert seeing is not None
                    assert blind is not None
                    expected = (seeing - blind).norm(dim=-1)
                    assert float((values[row, place] - expected).abs().amax()) < 1e-5
    assert t_vhd(found, 2).shape == inputs["input_ids"].shape


def test_layers_can_be_chosen_and_pruned_models_are_seen_as_they_are() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    whole = visual_sensitivity(model, inputs)
    assert torch.equal(visual_sensitivity(model, inputs, [2])[2], whole[2])
    with ByScore({1: (0.3,)})(model):
        pruned = visual_sensitivity(model, inputs)
    assert torch.equal(pruned[0], whole[0])
    assert not torch.allclose(pruned[2], whole[2])
    assert torch.equal(pruned[2] == 0, whole[2] == 0)


def test_what_has_no_image_or_is_under_vhr_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1)
    with pytest.raises(ValueError, match="no image that heads could look at"):
        visual_sensitivity(model, without_images(inputs))
    with VHR()(model), pytest.raises(ValueError, match="leave its context"):
        visual_sensitivity(model, inputs)
    with pytest.raises(ValueError, match="choose among 0 to 3"):
        visual_sensitivity(model, inputs, [4])


def test_the_table_is_the_mean_over_the_tokens_of_the_captions_whatever_the_batch() -> None:
    model, processor, samples = shapes()
    table = head_importance(model, processor, samples, batch_size=4)
    total, tokens = torch.zeros(4, 4, dtype=torch.float64), 0
    for sample in samples:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        prompt = processor(images=sample.image, text=text, return_tensors="pt")
        answer = processor.tokenizer(sample.captions[0], add_special_tokens=False)["input_ids"]
        length = prompt["input_ids"].shape[1]
        ids = torch.cat([prompt["input_ids"], torch.tensor([answer])], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = visual_sensitivity(model, inputs | {"pixel_values": prompt["pixel_values"]})
        # from the last token of the prompt, which predicts the first, to the last word, before the end
        total += torch.stack([one[0, length - 1 :].double().sum(0) for one in found.values()])
        tokens += len(answer) + 1
    assert table.tokens == tokens
    assert table.samples == 6
    assert torch.allclose(torch.tensor(table.sensitivity, dtype=torch.float64), total / tokens, rtol=1e-4)


def test_the_table_is_saved_whole_or_not_at_all_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = HeadImportance([[1.0, 3.0], [2.5, 0.5]], 2, 9)
    path = table.save(tmp_path / "new" / "table.json")
    assert HeadImportance.load(path) == table
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            HeadImportance([[0.0]], 1, 1).save(path)
    assert HeadImportance.load(path) == table
    assert [one.name for one in path.parent.iterdir()] == ["table.json"]
    for content in (
        "{",
        "[]",
        '{"sensitivity": [], "samples": 1, "tokens": 1}',
        '{"sensitivity": [[1], [1, 2]]}',
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"table\.json is no table of heads"):
            HeadImportance.load(path)


def test_the_highest_heads_are_given_by_layer() -> None:
    table = HeadImportance([[1.0, 3.0], [2.5, 0.5]], 2, 9)
    assert table.top(2) == {0: [1], 1: [0]}
    assert table.top(3) == {0: [0, 1], 1: [0]}
    with pytest.raises(ValueError, match="from 1 to 4"):
        table.top(5)


def test_the_heatmap_is_a_picture(tmp_path: Path) -> None:
    table = HeadImportance([[float(layer * head) for head in range(8)] for layer in range(4)], 2, 9)
    with Image.open(table.plot(tmp_path / "heads.png")) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_no_samples_are_refused() -> None:
    model, processor, _ = shapes()
    with pytest.raises(ValueError, match="there must be samples"):
        head_importance(model, processor, [])
