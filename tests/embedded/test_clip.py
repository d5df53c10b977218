"""The small CLIP as open_clip's users expect one; what does not fit is said."""

import json
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from visionsel.data.shapes import COLORS, ShapesWorld
from visionsel.embedded.clip import (
    CLIP_NAME,
    ClipTokenizer,
    build_clip,
    clip_config,
    load_clip,
    register_open_clip_configs,
    save_clip,
)
from visionsel.embedded.clip_quality import choose_phrase, measure_clip, retrieval, wrong_caption

TEXTS = ["a red star", "a small red star and a large blue ring on a plain background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with random weights that half precision holds exactly, to read only."""
    torch.manual_seed(0)
    model = build_clip(clip_config())
    model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
    path = tmp_path_factory.mktemp("clip") / "saved"
    assert save_clip(model, clip_config(), path) == path
    return path


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_saved_model_is_the_model_and_leaves_no_other_files(folder) -> None:
    torch.manual_seed(0)
    original = build_clip(clip_config()).eval()
    original.load_state_dict({key: value.half().float() for key, value in original.state_dict().items()})
    model, _, tokenizer = load_clip(folder)
    assert not model.training
    with torch.no_grad():
        for name, inputs in (("encode_image", pixels(3)), ("encode_text", tokenizer(TEXTS))):
            features = getattr(model, name)(inputs)
            assert features.shape == (len(inputs), 128)
            torch.testing.assert_close(features, getattr(original, name)(inputs), rtol=0, atol=0)
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "model.safetensors",
        "open_clip_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_open_clip_reads_the_folder_by_itself(folder) -> None:
    model, preprocess, tokenizer = load_clip(folder)
    theirs, _, their_preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    torch.testing.assert_close(preprocess(image), their_preprocess(image), rtol=0, atol=0)
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert ids.tolist() == tokenizer(TEXTS).tolist()
    with torch.no_grad():
        batch = preprocess(image)[None]
        torch.testing.assert_close(theirs.eval().encode_image(batch), model.encode_image(batch))
        torch.testing.assert_close(theirs.encode_text(ids), model.encode_text(ids))


def test_the_registered_name_builds_the_model() -> None:
    register_open_clip_configs()
    names = open_clip.list_models()
    register_open_clip_configs()
    assert open_clip.list_models() == names
    model = open_clip.create_model(CLIP_NAME)
    assert model.state_dict().keys() == build_clip(clip_config()).state_dict().keys()


def test_the_preprocessing_is_that_of_training(folder) -> None:
    sample = ShapesWorld("balanced", seed=1)[0]
    expected = torch.from_numpy(sample.pixels).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(load_clip(folder)[1](sample.image), expected)


def test_texts_become_marked_and_padded_ids() -> None:
    tokenizer = ClipTokenizer(12)
    ids = tokenizer(["A red star", "a ring"])
    assert ids.dtype == torch.int64
    assert ids.shape == (2, 12)
    words = tokenizer.tokenizer.convert_ids_to_tokens(ids[0])
    assert words == ["<s>", "a", "red", "star", "</s>"] + ["<pad>"] * 7
    assert tokenizer("a ring").tolist() == ids[1:].tolist()
    assert tokenizer("a ring", context_length=5).shape == (1, 5)
    assert tokenizer([]).shape == (0, 12)


def test_every_caption_fits_and_a_longer_text_is_refused() -> None:
    tokenizer = ClipTokenizer(clip_config()["text_cfg"]["context_length"])
    longest = " and ".join(["a small red star"] * 6) + " on a plain background"
    assert tokenizer(longest)[0, -1] == 0
    with pytest.raises(ValueError, match="39 words and marks, at most 38 fit"):
        tokenizer(" ".join(["star"] * 39))


def test_the_feature_of_a_text_is_read_at_its_end_mark() -> None:
    model, tokenizer = build_clip(clip_config()).eval(), ClipTokenizer()
    ids = tokenizer(TEXTS[:1])
    behind, at, before = ids.clone(), ids.clone(), ids.clone()
    behind[0, 6] = at[0, 4] = before[0, 2] = 90
    at[0, 6] = 2  # the end mark moves
    with torch.no_grad():
        feature = model.encode_text(ids)
        torch.testing.assert_close(model.encode_text(behind), feature)
        assert not torch.allclose(model.encode_text(before), feature, atol=1e-3)
        assert not torch.allclose(model.encode_text(at), feature, atol=1e-3)


def test_what_cannot_be_loaded_is_named(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json is missing"):
        load_clip(tmp_path)
    config = tmp_path / "open_clip_config.json"
    text = (folder / config.name).read_text()
    config.write_text(text[:50])
    with pytest.raises(ValueError, match="not a configuration of open_clip"):
        load_clip(tmp_path)
    config.write_text(text)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model\.safetensors"):
        load_clip(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="is cut off"):
        load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    written = json.loads(text)
    written["model_cfg"]["embed_dim"] = 64
    config.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="holds other weights than"):
        load_clip(tmp_path)


def test_an_unknown_configuration_and_a_wrong_one_are_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown CLIP configuration 'shapes'; choose one of visionsel_shapes"
    ):
        clip_config("shapes")
    config = clip_config()
    config["text_cfg"]["depth"] = 3
    with pytest.raises(ValueError, match="depth"):
        build_clip(config)


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'pip install "visionsel\[multimodal\]"'):
        load_clip()


def test_a_wrong_caption_differs_in_one_word_of_its_kind() -> None:
    generator = np.random.default_rng(0)
    caption = TEXTS[1]
    for _ in range(20):
        changed = wrong_caption(caption, "color", generator)
        pairs = [(a, b) for a, b in zip(caption.split(), changed.split(), strict=True) if a != b]
        assert len(pairs) == 1
        assert set(pairs[0]) <= set(COLORS)
    with pytest.raises(ValueError, match="no background"):
        wrong_caption("a red star", "background", generator)


def test_a_phrase_is_true_and_its_counterpart_is_not() -> None:
    generator = np.random.default_rng(0)
    for sample in ShapesWorld("balanced", seed=2, size=60):
        right, wrong = choose_phrase(sample.objects, generator)
        fits = [
            [
                all(w in (None, own) for w, own in zip(p, (o.size, o.color, o.shape), strict=True))
                for o in sample.objects
            ]
            for p in (right, wrong)
        ]
        assert any(fits[0])
        assert not any(fits[1])
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


def test_retrieval_counts_in_groups() -> None:
    one_hot = torch.eye(4)
    assert retrieval(one_hot, one_hot) == (1.0, 1.0)
    swapped = one_hot[[1, 0, 2, 3]]
    assert retrieval(one_hot, swapped) == (0.5, 0.5)
    assert retrieval(torch.cat([one_hot, swapped]), torch.cat([one_hot, one_hot]), among=4) == (0.75, 0.75)
    assert retrieval(torch.cat([one_hot, swapped]), torch.cat([one_hot, one_hot]), among=6)[0] < 0.9


def test_random_weights_are_measured_at_chance_and_no_samples_are_refused(folder) -> None:
    loaded = load_clip(folder)
    measured = measure_clip(*loaded, ShapesWorld("balanced", seed=3, size=100))
    assert list(measured) == ["image_to_text", "text_to_image", "color", "shape", "phrase"]
    assert measured["image_to_text"] < 0.1
    assert measured["text_to_image"] < 0.1
    assert all(0.25 < measured[name] < 0.75 for name in ("color", "shape", "phrase"))
    with pytest.raises(ValueError, match="at least one sample"):
        measure_clip(*loaded, [])
