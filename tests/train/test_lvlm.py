"""The trainer of the vision-language model: packing, curriculum, a short run, exact resume, early errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.train.conftest import record_losses, rows, run_writer
from train.lvlm import LVLM, LVLMCLI, blind_mask, main, turn_mask
from train.lvlm_data import KINDS, LVLMData, Stage, dense_targets
from train.shapes_data import training_seed
from visionsel.data.shapes import COLORS, SHAPES, ShapesWorld, split_words
from visionsel.embedded.lvlm_quality import caption_scores, generate_answers, question_scores

CONFIGS = Path(__file__).parents[2] / "configs" / "shapes"
SMALL = {"vision_dim": 32, "vision_layers": 3, "vision_heads": 2, "dim": 32, "layers": 2, "heads": 2}
STAGES = [Stage(1, text=False), Stage(1, questions=3)]


def data(**arguments: Any) -> LVLMData:
    return LVLMData(**{"stages": STAGES, "batch_size": 4, "epoch_size": 8, "val_size": 4} | arguments)


def item(source: LVLMData, index: int, epoch: int = 1) -> dict[str, Any]:
    return source.make(source.scene(epoch, index), np.random.default_rng(index), epoch)


def test_a_packed_sequence_is_the_image_and_turns_that_start_at_the_same_position() -> None:
    source = data(dialogue=0.0)
    sample = ShapesWorld("balanced", 5, 1)[0]
    question = sample.questions[0]
    rows = source.pack([("describe the image.", sample.captions[0], -1), (question.text, question.answer, 0)])
    names = {index: word for word, index in source.words.items()}
    words = [names[token] for token in rows[0]]
    caption = [
        "<user>",
        "describe",
        "the",
        "image",
        ".",
        "<assistant>",
        *split_words(sample.captions[0]),
        "</s>",
    ]
    asked = ["<user>", *split_words(question.text), "<assistant>", *split_words(question.answer), "</s>"]
    assert words == ["<s>", *["<image>"] * 64, *caption, *asked]
    labels = [names.get(label, "") for label in rows[1]]
    said = [*split_words(sample.captions[0]), "</s>"]
    answer = [*split_words(question.answer), "</s>"]
    assert labels == [""] * 65 + [""] * 6 + said + [""] * (len(asked) - len(answer)) + answer
    assert rows[2].tolist() == [*range(65), *range(65, 65 + len(caption)), *range(65, 65 + len(asked))]
    assert rows[3].tolist() == [0] * 65 + [1] * len(caption) + [2] * len(asked)
    assert rows[4].tolist() == [-1] * (65 + len(caption)) + [0] * len(asked)


def test_every_packed_turn_has_the_logits_that_the_saved_model_gives_it_alone(tmp_path) -> None:
    source = data(dialogue=0.0)
    model = LVLM(source.words, STAGES, architecture=SMALL).eval()
    model.save(tmp_path / "model")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    model.net.load_state_dict(plain.state_dict())  # rounded to half precision
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    batch = source.collate([item(source, index) for index in range(3)])
    with torch.no_grad():
        tokens, _ = model.see(batch["pixels"])
        packed = model(batch, tokens)
    predicted = batch["labels"][:, 1:] >= 0
    logits = torch.zeros(*predicted.shape, packed.shape[-1])
    logits[predicted] = packed
    compared = 0
    for b in range(3):
        image = source.scene(1, b).image
        for turn in range(1, int(batch["turns"][b].max()) + 1):
            own = (batch["turns"][b] == turn).nonzero()[:, 0]
            text = "<s><image>" + processor.tokenizer.decode(batch["tokens"][b, own])
            alone = processor(images=[image], text=[text], return_tensors="pt")
            assert alone["input_ids"].shape[1] == 65 + len(own)
            with torch.no_grad():
                expected = plain(**alone).logits[0, 65:-1]
            where = predicted[b, own[:-1]]
            torch.testing.assert_close(logits[b, own[:-1]][where], expected[where], rtol=1e-4, atol=1e-4)
            compared += int(where.sum())
    assert compared == len(packed) > 50


def test_a_dialogue_sees_what_came_before_and_runs_on() -> None:
    source = data()
    rows = source.pack(
        [("describe the image.", "a red star", -1), ("is there a star?", "yes", 0)], joined=True
    )
    assert rows[2].tolist() == list(range(rows.shape[1]))
    assert not rows[3].any()
    mask = turn_mask(torch.from_numpy(rows[3])[None], torch.float32)
    assert torch.equal(mask[0, 0] == 0, torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril())


def test_the_mask_shows_the_prefix_and_the_own_turn() -> None:
    turns = torch.tensor([[0, 0, 1, 1, 2, -1]])
    seen = turn_mask(turns, torch.float32)[0, 0] == 0
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert torch.equal(seen, torch.tensor(expected, dtype=torch.bool))


@pytest.mark.parametrize(("layers", "share", "sees"), [(1, 1.0, False), (1, 0.0, True), (2, 1.0, True)])
def test_the_blind_see_the_image_in_later_layers_only(layers, share, sees) -> None:
    source = data(dialogue=0.0)
    model = LVLM(source.words, STAGES, architecture=SMALL | {"layers": layers}).eval()
    batch = source.collate([item(source, index) for index in range(2)])
    with torch.no_grad():
        tokens, _ = model.see(batch["pixels"])
        logits = [model(batch, seen, blind=share) for seen in (tokens, tokens + 1)]
        plain = model(batch, tokens)
    assert torch.equal(*logits) != sees
    assert torch.equal(plain, logits[0]) == (share == 0)
    assert not model.net.model.language_model.layers[0]._forward_pre_hooks


def test_the_blind_are_a_share_of_the_samples() -> None:
    mask = turn_mask(torch.tensor([[0] * 5 + [1] * 3]).expand(400, -1), torch.float32)
    blind = blind_mask(mask, 4, 0.3)
    changed = (blind != mask).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.4
    (example,) = blind[changed][:1, 0]
    expected = mask[0, 0].clone()
    expected[5:, 1:5] = -1e9
    assert torch.equal(example, expected)


def test_dense_targets_are_what_the_masks_say() -> None:
    for sample in ShapesWorld("balanced", 1, 30):
        target = dense_targets(sample, 8, least=0.4)
        covers = np.stack([o.mask.reshape(8, 8, 8, 8).mean((1, 3)) for o in sample.objects])
        for row in range(8):
            for column in range(8):
                cover = covers[:, row, column]
                shape, box = target["shape"][row, column], target["box"][row, column]
                color = target["color"][row, column]
                fitting = [
                    o
                    for o, share, best in zip(sample.objects, cover, covers.max((1, 2)), strict=True)
                    if share > 0.4 or share == best
                ]
                if shape == 0:
                    assert cover.max() <= 0.4
                    assert color == 0
                    assert not box.any()
                else:
                    assert any(
                        SHAPES[shape - 1] == o.shape
                        and COLORS[color - 1] == o.color
                        and np.allclose(box * 64, o.box)
                        for o in fitting
                    )
        shown = {SHAPES[s - 1] for s in target["shape"].ravel() if s}
        assert shown == {o.shape for o in sample.objects}
        there = [*(s in shown for s in SHAPES), *(c in {o.color for o in sample.objects} for c in COLORS)]
        assert target["presence"].tolist() == [float(t) for t in there]


def test_a_stage_has_its_scenes_and_its_questions() -> None:
    stages = [
        Stage(2, text=False, train_share=0.0),
        Stage(
            1,
            train_share=1.0,
            caption_noise=1.0,
            co_occurrence=0.0,
            questions=4,
            kinds={"count": 0, "exist": 50},
        ),
    ]
    source = data(stages=stages, epoch_size=40)
    assert [source.stage(epoch) for epoch in (0, 1, 2, 3, -1)] == [stages[0]] * 2 + [stages[1]] * 3
    world = ShapesWorld("balanced", training_seed(0), 80)
    assert np.array_equal(source.scene(1, 7).pixels, world[47].pixels)
    assert "text" not in item(source, 0, epoch=0)
    assert any(source.scene(2, index).phantoms for index in range(40))
    asked = np.concatenate(
        [np.unique(item(source, i, epoch=2)["text"][4], return_counts=False) for i in range(40)]
    )
    assert KINDS.index("count") not in asked
    assert (asked == KINDS.index("exist")).sum() >= 38


@pytest.fixture
def write_config(tmp_path):
    stages = [{"epochs": 1, "text": False}, {"epochs": 1, "questions": 3}]
    data = {"batch_size": 4, "epoch_size": 12, "val_size": 4, "stages": stages}
    return run_writer(tmp_path, model={"architecture": SMALL}, data=data)


@pytest.mark.slow
def test_a_short_run_learns_and_writes_an_ordinary_model(tmp_path, write_config, capsys) -> None:
    # larger steps than the recipe: a model this small has little time
    stages = [
        {"epochs": 1, "text": False, "lr": 8e-3, "final": 0.2},
        {"epochs": 5, "lr": 8e-3, "questions": 4, "train_share": 0.0},
    ]
    config = write_config(
        trainer={"max_epochs": 6, "check_val_every_n_epoch": 6},
        data={"batch_size": 16, "epoch_size": 448, "val_size": 16, "stages": stages},
        model={"architecture": {**SMALL, "vision_dim": 64, "dim": 64}, "question_weight": 1.0},
    )
    assert main(["fit", "--config", str(config)]) == 0
    folder = tmp_path / "run" / "export"
    assert str(folder) in capsys.readouterr().out
    losses = rows(tmp_path / "run", "train/caption")
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    samples = list(ShapesWorld("balanced", 9, 40))
    images = [s.image for s in samples]
    captions = generate_answers(model.eval(), processor, images, ["describe the image."] * 40)
    scores = caption_scores(captions, samples)
    shuffled = caption_scores(captions, samples[1:] + samples[:1])
    assert scores["recall"] > 0
    assert scores["f1"] > shuffled["f1"]  # it looks: captions fit their own image better than the next one
    questions = [q for s in samples for q in s.questions if q.kind == "absent"]
    pictures = [s.image for s in samples for q in s.questions if q.kind == "absent"]
    answers = generate_answers(model, processor, pictures, [q.text for q in questions], max_new_tokens=8)
    assert question_scores(answers, questions)["absent"] > 0.2  # of ten words one is "no" at the start


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, write_config, monkeypatch) -> None:
    path = "lightning.pytorch.callbacks.ModelCheckpoint"
    every = {
        "dirpath": str(tmp_path / "all"),
        "filename": "{step}",
        "save_top_k": -1,
        "every_n_train_steps": 1,
    }
    callbacks = [{"class_path": path, "init_args": every}]
    config = write_config(trainer={"callbacks": callbacks})
    losses = record_losses(monkeypatch, LVLM)
    assert main(["fit", "--config", str(config)]) == 0
    whole = list(losses.values())
    assert len(whole) == 6
    checkpoints = {int(p.stem.split("=")[1]): p for p in (tmp_path / "all").glob("*.ckpt")}
    for done in (4, 3, 2):  # no resumed run has written a checkpoint that a later one starts from
        losses.clear()
        arguments = ["--output", str(tmp_path / f"again{done}"), "--ckpt_path", str(checkpoints[done])]
        assert main(["fit", "--config", str(config), *arguments]) == 0
        assert list(losses.values()) == pytest.approx(whole[done:], abs=1e-6)


@pytest.mark.slow
def test_a_backbone_of_ours_is_a_tower(tmp_path, write_config) -> None:
    small = {"embed_dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "dilations": [1, 1, 1, 1]}
    backbone = {"backbone": "selectformer_nano", "backbone_args": small, "vision_dim": 32}
    config = write_config(model={"architecture": {**SMALL, **backbone}})
    assert main(["fit", "--config", str(config)]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "export").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "export")
    assert model.config.vision_config.architecture == "selectformer_nano"
    (answer,) = generate_answers(
        model, processor, [ShapesWorld("anti", 0, 1)[0].image], ["describe the image."]
    )
    assert isinstance(answer, str)


@pytest.mark.parametrize("name", ["lvlm", "lvlm_selectformer"])
def test_the_shipped_configurations_build_and_their_stages_fill_the_run(name, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        LVLMCLI(["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == f"runs/shapes/{name}"
    assert sum(stage["epochs"] for stage in config["data"]["stages"]) == config["trainer"]["max_epochs"]
    source = LVLMData(**config["data"] | {"stages": [Stage(**stage) for stage in config["data"]["stages"]]})
    model = LVLM(
        source.words, source.stages, source.image_size, source.patch_size, config["model"]["architecture"]
    )
    assert sum(p.numel() for p in model.net.parameters()) < 2.5e6
    # the tower and the language are learnt from the truth
    assert [bool(stage.caption_noise) for stage in source.stages[:3]] == [False, False, True]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": {"stages": []}}, "give at least one stage"),
        ({"data": {"stages": [{"epochs": 0}]}}, "a stage has at least one epoch"),
        ({"data": {"stages": [{"epochs": 1, "kinds": {"exists": 1}}]}}, "unknown kinds of questions"),
        ({"data": {"stages": [{"epochs": 1, "blind": 2.0}]}}, "blind is a share from 0 to 1"),
        ({"data": {"image_size": 60}}, "image_size 60 is not a multiple of patch_size 8"),
        (
            {"model": {"architecture": {"backbone": "selectformer_nano", "backbone_stage": 0}}},
            "one position for",
        ),
        ({"model": {"architecture": {"depth": 3}}}, "depth"),
    ],
)
def test_what_is_wrong_is_said_before_a_folder_is_made(
    tmp_path, write_config, capsys, parts, message
) -> None:
    config = write_config(**parts)
    try:
        status = main(["fit", "--config", str(config)])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
