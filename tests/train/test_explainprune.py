"""Training of ExplainPrune's net: it learns, it resumes, it refuses what is wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.train.conftest import record_losses, run_writer
from train.explainprune import AnswerData, ExplainPruneTraining, main
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import caption_scores, generate_answers
from visionsel.multimodal.pruning.explainprune import ExplainPrune
from visionsel.multimodal.pruning.explainprune_net import RelevancePredictor, relevance_loss
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.relevance import relevance

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "explainprune.yaml"


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration of a short run; keyword arguments are merged into its parts."""
    return run_writer(
        tmp_path,
        model={"width": 4, "depth": 2, "warmup_steps": 0},
        data={"batch_size": 2, "epoch_size": 6, "val_size": 2},
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    return record_losses(monkeypatch, ExplainPruneTraining)


@pytest.mark.slow
def test_a_short_run_lowers_the_loss_and_its_export_keeps_more_captions_right_than_chance(
    tmp_path, write_run, losses
) -> None:
    config = write_run(
        trainer={"max_epochs": 1, "gradient_clip_val": 1.0},
        model={"width": 16, "depth": 4, "lr": 5e-3},
        data={"batch_size": 8, "epoch_size": 640},
    )
    assert main(["fit", "--config", str(config)]) == 0
    values = list(losses.values())
    assert sum(values[-20:]) < 0.75 * sum(values[:20])

    samples = list(ShapesWorld("balanced", seed=11, size=40))
    model, processor = load_lvlm()
    f1 = []
    for pruner in (RandomPrune(keep=0.25), ExplainPrune.load(tmp_path / "run" / "export", keep=0.25)):
        with pruner(model):
            captions = generate_answers(
                model, processor, [s.image for s in samples], [CAPTION_PROMPT] * len(samples)
            )
        f1.append(caption_scores(captions, samples)["f1"])
    assert f1[1] > f1[0] + 0.1, f1


def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    tmp_path, write_run, losses
) -> None:
    every = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path / "checkpoints"),
            "filename": "step{step}",
            "auto_insert_metric_name": False,
            "enable_version_counter": False,
            "every_n_train_steps": 1,
            "save_top_k": -1,
        },
    }
    whole = write_run("whole", trainer={"callbacks": [every]})
    assert main(["fit", "--config", str(whole)]) == 0
    expected = dict(losses)
    assert list(expected) == [(epoch, batch) for epoch in range(2) for batch in range(3)]
    for step in (4, 3):  # in this order: a resumed run writes the later checkpoints again
        losses.clear()
        resumed = write_run(f"from{step}", trainer={"callbacks": [every]})
        checkpoint = tmp_path / "checkpoints" / f"step{step}.ckpt"
        assert main(["fit", "--config", str(resumed), "--ckpt_path", str(checkpoint)]) == 0
        assert losses == {key: expected[key] for key in list(expected)[step:]}
        nets = (RelevancePredictor.load(tmp_path / run / "export") for run in ("whole", f"from{step}"))
        for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
            assert torch.equal(one, other)


def test_a_checkpoint_holds_the_net_alone_is_validated_and_that_of_another_net_refused(
    tmp_path, write_run, capsys
) -> None:
    config = write_run(trainer={"max_epochs": 1}, data={"epoch_size": 2})
    assert main(["fit", "--config", str(config)]) == 0
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert sum(value.numel() for value in state.values()) < 1000
    capsys.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", checkpoint]) == 0
    assert "val/kept_relevance" in capsys.readouterr().out
    other = write_run("other", model={"depth": 3})
    assert main(["validate", "--config", str(other), "--ckpt_path", checkpoint]) == 1
    assert "was trained with depth 2, not 3" in capsys.readouterr().err
    assert main(["validate", "--config", str(config)]) == 1
    assert "give --ckpt_path" in capsys.readouterr().err
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    assert main(["validate", "--config", str(config), "--ckpt_path", str(foreign)]) == 1
    assert "is not a checkpoint of train.explainprune" in capsys.readouterr().err


def test_the_loss_is_that_of_relevance_to_the_answer_behind_the_prompt() -> None:
    training = ExplainPruneTraining()
    model, processor = load_lvlm()
    data = AnswerData(caption_share=0.5)
    items = [data.make(data.scene(0, i), np.random.default_rng(i), 0) for i in range(3)]
    assert len({question for _, question, _ in items}) > 1
    logits, target, valid = training._look(data.collate(items))
    assert valid.all()
    for b, (pixels, question, answer) in enumerate(items):
        text = f"<s><image><user>{question} <assistant>{answer} </s>"
        inputs = processor(images=pixels, text=text, return_tensors="pt")
        start = (
            inputs["input_ids"][0].tolist().index(processor.tokenizer.convert_tokens_to_ids("<assistant>"))
            + 1
        )
        expected = relevance(model, inputs, start)
        torch.testing.assert_close(target[b : b + 1], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    loss = relevance_loss(logits, target, valid)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in training.parameters())
    assert not any(parameter.requires_grad for parameter in training._lvlm[0].parameters())


def test_captions_and_each_kind_of_question_are_asked_for() -> None:
    data = AnswerData(caption_share=0.5)
    items = [data.make(data.scene(0, i), np.random.default_rng(i), 0) for i in range(60)]
    captions = [answer for _, question, answer in items if question == CAPTION_PROMPT]
    assert 15 < len(captions) < 45
    assert len({question.split()[0] for _, question, _ in items}) > 3
    batch = data.collate(items[:3])
    assert [len(batch[name]) for name in ("image", "question", "answer")] == [3, 3, 3]
    [validation] = data.val_dataloader()
    assert len(next(iter(validation))["image"]) == 16


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "lr", 0.0),
        ("model", "depth", 1),
        ("model", "kernel", 2),
        ("model", "warmup_steps", 6),
        ("model", "weight_decay", -1.0),
        ("model", "lvlm", "nowhere"),
        ("data", "caption_share", 1.5),
        ("data", "batch_size", 0),
    ],
)
def test_a_value_that_is_wrong_is_named_and_leaves_no_folder(
    tmp_path, write_run, capsys, part, name, value
) -> None:
    config = write_run(**{part: {name: value}})
    assert main(["fit", "--config", str(config)]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.explainprune: ")
    assert (name if name != "lvlm" else value) in line
    assert not (tmp_path / "run").exists()


def test_the_shipped_configuration_parses_and_names_no_class_of_ours(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIG), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == "runs/shapes/explainprune"
    net = ExplainPruneTraining(**config["model"]).predictor
    assert 4 * sum(parameter.numel() for parameter in net.parameters()) < 200_000
    text = CONFIG.read_text()
    assert "class_path" not in text
    assert text.startswith("# ")
    assert "train.explainprune fit --config configs/shapes/explainprune.yaml" in text
