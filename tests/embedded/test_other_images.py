"""What the cards say that the models take: images of other sizes and modes, and what is refused."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from segment_anything import SamPredictor

from visionsel.data.shapes import ShapesWorld
from visionsel.embedded import load_classifier, load_clip, load_segmenter
from visionsel.embedded.classifier import CLASSIFIERS

SCENES = list(ShapesWorld("balanced", seed=31, size=12, max_objects=1))


def enlarged(image: Image.Image) -> Image.Image:
    """Three times as large."""
    return image.resize((3 * image.width, 3 * image.height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_names_the_shape_of_a_larger_image_and_of_another_mode(name: str) -> None:
    model = load_classifier(name)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    names = model.pretrained_cfg["label_names"]
    with torch.inference_mode():
        batch = torch.stack([transform(enlarged(s.image.convert("RGBA")).convert("RGB")) for s in SCENES])
        found = [names[number] for number in model(batch).argmax(1)]
    right = [one == scene.objects[0].shape for one, scene in zip(found, SCENES, strict=True)]
    assert sum(right) >= 11


def test_clip_takes_images_of_any_size_and_mode_and_refuses_a_long_text() -> None:
    model, preprocess, tokenizer = load_clip()
    with torch.inference_mode():
        plain, coloured, large = (
            model.encode_image(torch.stack([preprocess(change(s.image)) for s in SCENES]), normalize=True)
            for change in (lambda image: image, lambda image: image.convert("RGBA"), enlarged)
        )
    torch.testing.assert_close(coloured, plain)
    assert (large * plain).sum(1).min() > 0.9
    unknown = tokenizer.tokenizer.unk_token_id
    assert tokenizer(["a zebra"])[0].tolist().count(unknown) == 1
    tokenizer(["a " * 38])
    with pytest.raises(ValueError, match="at most 38 fit"):
        tokenizer(["a " * 39])


def test_the_segmenter_takes_images_of_any_size_with_prompts_in_their_pixels() -> None:
    predictor = SamPredictor(load_segmenter())
    ious = []
    for scene in SCENES:
        wide = Image.new("RGB", (256, 192), (128, 128, 128))
        wide.paste(enlarged(scene.image), (0, 0))
        truth = np.zeros((192, 256), dtype=bool)
        truth[:, :192] = np.kron(scene.objects[0].mask, np.ones((3, 3), dtype=bool))
        predictor.set_image(np.asarray(wide)[..., ::-1], image_format="BGR")
        rows, columns = truth.nonzero()
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks, _, _ = predictor.predict(box=box, multimask_output=False)
        assert masks.shape == (1, 192, 256)
        ious.append((masks[0] & truth).sum() / (masks[0] | truth).sum())
    assert np.mean(ious) > 0.7
