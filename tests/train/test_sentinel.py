"""SENTINEL: pairs as computed by hand, the loss as written down, a run that learns, resumes and is usable."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from train.sentinel import PairCollator, PairOptions, TuneOptions, build_trainer, main, make_pairs, tune
from train.sentinel_detectors import Answers, OpenVocabulary, annotations
from train.sentinel_pairs import (
    Candidate,
    Pair,
    Picture,
    bootstrap,
    build_pairs,
    read_pairs,
    sample_sentences,
    split_phrases,
    split_sentences,
)
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import encode_prompts
from visionsel.multimodal.evaluation import Synonyms
from visionsel.multimodal.modulation import VHR
from visionsel.multimodal.pruning import FastV

# peft 0.21 and trl 1.16 read a property that transformers 5.24 deprecates
OLD_NAMES = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sentinel.yaml"
TABLE = Synonyms.of([["dog", "puppy"], ["cat"], ["ball"], ["tree"], ["car"]])
BLANK = Picture("blank.png", Image.new("RGB", (8, 8)))


def shows(*names: str):
    return lambda picture, asked: {name: name in names for name in asked}


def scripted(script: dict[str, list[str]]):
    """A sampler that goes on as written; a sentence that ends with # ends the text."""
    return lambda picture, context: [Candidate(s.rstrip("#"), s.endswith("#")) for s in script[context]]


def pair(context: str, chosen: str, rejected: str, invented: list[str], last: bool = False) -> Pair:
    return Pair("blank.png", "what?", context, chosen, rejected, last, False, invented)


def test_pairs_of_sentences_are_those_computed_by_hand_and_each_winner_is_gone_on_with() -> None:
    # both see dog and ball, only one sees the tree, none a cat or a car
    detectors = [shows("dog", "ball", "tree"), shows("dog", "ball")]
    script = {
        "": ["A dog.", "A cat.", "A tree.", "A dog."],  # nothing is named before: no pair
        "A dog.": [
            " The dog is near a tree.",
            " The puppy has a ball.",
            " A car is there.",
            " A dog and a cat.",
        ],
        # the winner was appended; what is repeated does not win, and the second pair takes the second loser
        "A dog. The puppy has a ball.": [
            *(" A car.", " A ball and a car.", " The puppy has a ball.", " The ball is red.#"),
            *(" All is still.", " A dog runs."),
        ],
    }
    text, pairs = bootstrap(BLANK, "what?", scripted(script), detectors, TABLE)
    assert text == ["A dog.", " The puppy has a ball.", " The ball is red."]
    both = "A dog. The puppy has a ball."
    assert pairs == [
        pair("A dog.", " The puppy has a ball.", " A car is there.", ["car"]),
        pair(both, " The ball is red.", " A car.", ["car"], True),
        pair(both, " A dog runs.", " A ball and a car.", ["car"]),
    ]


def test_pairs_of_phrases_prefer_naming_to_silence_and_end_where_nothing_is_true() -> None:
    script = {
        "a dog": [" and a cat", " on grass#", " and a ball"],
        "": ["a dog", "a car"],
        "a dog and a ball": [" and a cat", " and a dog", " on grass#"],
    }
    find = shows("dog", "ball")
    text, pairs = bootstrap(BLANK, "what?", scripted(script), [find, find], TABLE, "new")
    assert text == ["a dog", " and a ball", " on grass"]
    assert pairs == [
        pair("", "a dog", "a car", ["car"]),
        pair("a dog", " and a ball", " and a cat", ["cat"]),
        pair("a dog and a ball", " on grass", " and a cat", ["cat"], True),
    ]
    lost = scripted({"": ["a cat", "a tree"]})
    assert bootstrap(BLANK, "what?", lost, [find, shows("tree")], TABLE, "new") == ([], [])
    with pytest.raises(ValueError, match="coherence must be one of named, new"):
        bootstrap(BLANK, "what?", lost, [find], TABLE, "old")
    with pytest.raises(ValueError, match="at least one detector"):
        bootstrap(BLANK, "what?", lost, [], TABLE)


def test_sentences_and_phrases_joined_are_the_text() -> None:
    prose = 'A man stands. "Two dogs!" he says? 3 cats, 2.5 m.'
    assert split_sentences(prose) == ["A man stands.", ' "Two dogs!" he says?', " 3 cats, 2.5 m."]
    caption = " a large red star and a small band on a plain background"
    assert split_phrases(caption) == [" a large red star", " and a small band", " on a plain background"]


def test_candidates_are_the_first_phrases_of_captions_sampled_whole() -> None:
    model, processor = load_lvlm()
    image = ShapesWorld("anti", 3, 1)[0].image
    context = " a small blue cross"
    torch.manual_seed(5)
    found = sample_sentences(model, processor, image, CAPTION_PROMPT, context, 12, 1.0, "phrases", 24)
    inputs = encode_prompts(processor, [image], [CAPTION_PROMPT])
    more = processor.tokenizer(context, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.manual_seed(5)
    out = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        num_return_sequences=12,
        max_new_tokens=24,
    )
    whole = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = [split_phrases(f" {text}") for text in whole]
    assert [one.text for one in found] == [phrases[0] for phrases in expected]
    assert [one.last for one in found] == [len(phrases) == 1 for phrases in expected]
    assert len({one.text for one in found}) > 1
    assert {one.last for one in found} == {True, False}
    cut = sample_sentences(model, processor, image, CAPTION_PROMPT, context, 3, 1.0, "phrases", 1)
    assert cut == []  # a sentence that does not end is none


def test_detectors_say_what_a_scene_shows_and_refuse_to_guess() -> None:
    scene = ShapesWorld("balanced", 8, 1)[0]
    there = frozenset(thing.shape for thing in scene.objects)
    names = sorted(there) + [name for name in ("arrow", "moon", "ring") if name not in there]
    truth = {name: name in there for name in names}
    picture = Picture("scene.png", scene.image, there)
    assert annotations(picture, names) == truth
    # the model answers one of them wrongly
    answers = Answers(*load_lvlm())(picture, names)
    assert {name: answers[name] for name in names if answers[name] != truth[name]} == {"triangle": False}
    with pytest.raises(ValueError, match=r"blank\.png has no annotations"):
        annotations(BLANK, names)


def _owl() -> tuple[Any, Any]:
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    words = ["!", "<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    text = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 32, "patch_size": 16}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    images = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    model = Owlv2ForObjectDetection(config).eval()
    with torch.no_grad():  # the scores are those of cosines, far from 0 and 1
        for head in (model.class_head.logit_shift, model.class_head.logit_scale):
            head.weight.zero_()
            head.bias.zero_()
    return model, Owlv2Processor(image_processor=images, tokenizer=tokenizer)


def _grounding_dino() -> tuple[Any, Any]:
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    # the model knows what parts its phrases by the numbers that BERT has for them
    words = [f"word{i}" for i in range(1035)]
    known = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    for place, word in (known | {1030: "dog", 1031: "red", 1032: "car"}).items():
        words[place] = word
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    sizes = {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "window_size": 2}
    text = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GroundingDinoConfig(
        backbone_config={"model_type": "swin", "out_features": ["stage2", "stage3"], **sizes},
        text_config={"model_type": "bert", "intermediate_size": 16, **text},
        d_model=32,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        num_queries=5,
        num_feature_levels=2,
        disable_custom_kernels=True,
    )
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 32})
    processor = GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer)
    return GroundingDinoForObjectDetection(config).eval(), processor


@pytest.mark.parametrize("build", [_owl, _grounding_dino])
def test_an_open_vocabulary_detector_says_yes_from_the_score_of_its_best_box(build) -> None:
    torch.manual_seed(0)
    model, processor = build()
    picture = Picture("noise.png", ShapesWorld("balanced", 8, 1)[0].image)
    scores = {}
    for name in ("dog", "red car"):
        inputs = processor(images=picture.image, text=[[name]], return_tensors="pt")
        with torch.no_grad():
            scores[name] = model(**inputs).logits.sigmoid().max().item()
    low, high = sorted(scores.values())
    assert 0 < low < high < 1
    for threshold in (0.99 * low, (low + high) / 2, high + 0.01 * (1 - high)):
        found = OpenVocabulary(model, processor, threshold)(picture, list(scores))
        assert found == {name: score > threshold for name, score in scores.items()}


def test_pairs_are_begun_again_where_they_were_left(tmp_path) -> None:
    pictures = [Picture(f"{i}.png", BLANK.image) for i in range(5)]
    asked: list[str] = []

    def write(picture: Picture) -> tuple[list[str], list[Pair]]:
        asked.append(picture.path)
        drawn = str(torch.randint(10**9, ()).item())
        one = Pair(picture.path, "what?", "", drawn, "a car", False, False, ["car"])
        return [drawn], [one] * (picture.path != "1.png")

    whole = build_pairs(pictures, write, tmp_path / "whole", seed=3)
    assert [one.image for one in whole] == ["0.png", "2.png", "3.png", "4.png"]
    assert len({one.chosen for one in whole}) == 4
    assert read_pairs(tmp_path / "whole" / "pairs.jsonl") == whole

    def stopped(picture: Picture) -> tuple[list[str], list[Pair]]:
        if picture.path == "3.png":
            raise KeyboardInterrupt
        return write(picture)

    with pytest.raises(KeyboardInterrupt):
        build_pairs(pictures, stopped, tmp_path / "parts", seed=3, save_every=1)
    assert not (tmp_path / "parts" / "pairs.jsonl").exists()
    asked.clear()
    assert build_pairs(pictures, write, tmp_path / "parts", seed=3) == whole
    assert asked == ["3.png", "4.png"]
    with pytest.raises(ValueError, match=r"has 0\.png where image 0 is blank\.png"):
        build_pairs([BLANK], write, tmp_path / "parts")
    with pytest.raises(ValueError, match="there are no images"):
        build_pairs([], write, tmp_path / "none")
    with pytest.raises(ValueError, match="no pairs from 5 images"):
        build_pairs(pictures, lambda picture: (["A dog."], []), tmp_path / "true")
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is no pair"):
        read_pairs(tmp_path / "bad.jsonl")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Eight pairs by hand: the caption ends, or goes on with the companion that is not there."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number, scene in enumerate(ShapesWorld("anti", 900, 8)):
        scene.image.save(folder / f"{number}.png")
        *said, end = split_phrases(f" {scene.captions[0]}")
        invented = " and a small white ring"
        path = str(folder / f"{number}.png")
        found.append(Pair(path, CAPTION_PROMPT, "".join(said), end, invented, True, False, ["ring"]))
    return found


@pytest.mark.slow
@OLD_NAMES
def test_the_loss_is_c_dpo_on_the_tokens_of_the_sentence_alone(tmp_path, pairs) -> None:
    model, processor = load_lvlm()
    pairs = [pairs[0], next(p for p in pairs if len(p.context) != len(pairs[0].context))]
    options = TuneOptions(rank=4, alpha=8, beta=0.3)
    trainer = build_trainer(options, model, processor, pairs, tmp_path)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    collator = PairCollator(processor)
    batch = collator([collator.row(one) for one in pairs])
    kept = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    decoded = processor.batch_decode(kept)
    assert decoded[:2] == [f"{one.chosen.strip()} </s>" for one in pairs]
    assert decoded[2:] == [one.rejected.strip() for one in pairs]
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)

    def log_probability(one: Pair, sentence: str) -> torch.Tensor:
        before = f"<s><image><user>{one.question} <assistant>{one.context}"
        inputs = processor(images=[Image.open(one.image)], text=[before + sentence], return_tensors="pt")
        start = processor(images=[Image.open(one.image)], text=[before], return_tensors="pt")[
            "input_ids"
        ].shape[1]
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            scores = trainer.model(**inputs).logits[0].log_softmax(-1)
        return sum(scores[place - 1, ids[place]] for place in range(start, len(ids)))

    expected = []
    for one in pairs:
        sentences = (one.chosen + " </s>", one.rejected)
        new = [log_probability(one, sentence) for sentence in sentences]
        with trainer.model.disable_adapter():
            old = [log_probability(one, sentence) for sentence in sentences]
        margin = options.beta * (new[0] - old[0]) - options.beta * (new[1] - old[1])
        expected.append(math.log1p(math.exp(-margin)))
    assert abs(expected[0] - math.log(2)) > 1e-3  # the updates do something
    assert loss.item() == pytest.approx(sum(expected) / 2, abs=2e-5)


@pytest.mark.slow
@OLD_NAMES
def test_a_run_lowers_the_loss_resumes_exactly_and_its_adapter_goes_with_interventions(
    tmp_path, pairs
) -> None:
    import peft
    from safetensors.torch import load_file

    options = TuneOptions(rank=4, alpha=8, lr=1e-2, epochs=2, batch_size=4, accumulate=1)
    history = tune(options, *load_lvlm(), pairs, tmp_path / "whole")
    assert len(history) == 4
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert history[-1]["loss"] < 0.5

    # as if it had been stopped after the first epoch
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoints" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    (tmp_path / "parts").rename(tmp_path / "checkpoints")
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(asdict(one))}\n" for one in pairs))
    told = [f"--tune.{name}={value}" for name, value in asdict(options).items()]
    assert main(["fit", "--output", str(tmp_path), "--resume", "true", "--merge", "true", *told]) == 0
    whole, parts = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("whole/adapter", "adapter")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert all("language_model" in name for name in whole)

    scenes = list(ShapesWorld("anti", 901, 3))
    (plain, processor), (loaded, _), (base, _) = load_lvlm(), load_lvlm(), load_lvlm()
    loaded.load_adapter(str(tmp_path / "adapter"))
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    inputs = encode_prompts(processor, [s.image for s in scenes], [CAPTION_PROMPT] * 3)
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (plain, loaded, wrapped)]
        torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=1e-6)
        assert (logits[0] - logits[1]).abs().max() > 0.1
        merged, _ = load_lvlm(tmp_path / "export")
        for method in (VHR(layers=(1, 2, 3)), FastV(keep=16, layer=1)):
            found = []
            for model in (loaded, wrapped.get_base_model(), merged):
                with method(model):
                    found.append(model.generate(**inputs, max_new_tokens=24, do_sample=False))
            assert torch.equal(found[0], found[1]), method
            assert torch.equal(found[0], found[2]), method
    with pytest.raises(ValueError, match="get_base_model"), VHR(layers=(1, 2, 3))(wrapped):
        pass
    with pytest.raises(FileNotFoundError, match="to resume from"):
        tune(options, *load_lvlm(), pairs, tmp_path / "nowhere", resume=True)


def test_pairs_of_scenes_are_made_and_the_model_that_never_invents_is_told(tmp_path) -> None:
    model, processor = load_lvlm()
    options = PairOptions(
        **{**yaml.safe_load(CONFIG.read_text())["pairs"], "distribution": "anti", "co_occurrence": 0.8},
    )
    options = PairOptions(**{**options.__dict__, "size": 3, "candidates": 6, "seed": 77})
    found = make_pairs(options, model, processor, tmp_path / "run")
    assert found
    scenes = {f"anti_77_{i:05d}.png": scene for i, scene in enumerate(ShapesWorld("anti", 77, 3))}
    for one in found:
        scene = scenes[Path(one.image).name]
        there = {thing.shape for thing in scene.objects}
        assert Image.open(one.image).tobytes() == scene.image.tobytes()
        assert one.invented
        assert not set(one.invented) & there
        assert any(f" {name}" in one.rejected for name in one.invented)
        words = set(f"{one.context}{one.chosen}".split())
        assert not words & ({"ring", "moon", "arrow", "star", "heart", "cross"} - there)
    texts = [json.loads(line) for line in (tmp_path / "run" / "texts.jsonl").read_text().splitlines()]
    assert len(texts) == 3
    sure = PairOptions(**{**options.__dict__, "size": 1, "temperature": 0.01})
    with pytest.raises(ValueError, match="no pairs from 1 images"):
        make_pairs(sure, model, processor, tmp_path / "sure")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs.candidates", "1"], "pairs.candidates must be at least 2"),
        (["--pairs.coherence", "old"], "pairs.coherence must be one of named, new"),
        (["--tune.lr", "0"], "tune.lr must be above 0"),
        (["--pairs.images", "x"], "pairs.detectors has annotations, which the images of x lack"),
        (["--pairs.images", "nowhere", "--pairs.detectors", "[answers]"], "no folder at nowhere"),
    ],
)
def test_a_value_that_is_wrong_is_named_and_leaves_no_folder(tmp_path, capsys, arguments, message) -> None:
    output = tmp_path / "run"
    assert main(["pairs", "--output", str(output), *arguments]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.sentinel: ")
    assert message in line
    assert not output.exists()


def test_without_trl_the_extra_is_named_and_a_folder_in_use_is_refused(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "adapter").mkdir()
    assert main(["fit", "--config", str(CONFIG), "--output", str(tmp_path)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text('{"model": "embedded"}')
    assert main(["pairs", "--config", str(CONFIG), "--output", str(tmp_path)]) == 1
    assert "were begun with other settings (pairs." in capsys.readouterr().err
    assert main(["validate", "--output", str(tmp_path / "none"), "--validate.size", "1"]) == 1
    assert "no adapter in" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(["fit", "--config", str(CONFIG), "--output", str(tmp_path / "new")]) == 1
    assert 'pip install "visionsel[multimodal,train]"' in capsys.readouterr().err


def test_the_shipped_configuration_parses_and_names_no_class_of_ours(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIG), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == "runs/shapes/sentinel"
    PairOptions(**config["pairs"])
    TuneOptions(**config["tune"])
    text = CONFIG.read_text()
    assert "class_path" not in text
    assert text.startswith("# ")
    assert "train.sentinel fit --config configs/shapes/sentinel.yaml" in text
