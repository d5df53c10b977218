"""The demos, as a page and as its visitors meet them."""

import html
import json
import re
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.multimodal.families.ramps import tokenizer
from tests.multimodal.tiny import IMAGE, START, make_model
from visionsel.cli import main
from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, ShapesWorld
from visionsel.multimodal.grounding.results import Grounding
from visionsel.multimodal.grounding.segmenters import build_segmenter

gr = pytest.importorskip("gradio", reason='the demos need Gradio: pip install "visionsel[demo]"')
gradio_client = pytest.importorskip("gradio_client")

from demos import inputs  # noqa: E402
from demos.app import ABOUT, build_app  # noqa: E402
from demos.examples import known_objects, scenes  # noqa: E402
from demos.grounding import ask_in_pieces, ground, heatmap_choices, word_pieces  # noqa: E402
from demos.hallucination import (  # noqa: E402
    answer_with,
    head_table,
    mark_invented,
    measure_heads,
    redistributed,
    remedy_names,
)
from demos.head_maps import draw_head_maps  # noqa: E402
from demos.models import Models, load_models  # noqa: E402
from demos.page import DOCS, served  # noqa: E402
from demos.pruning import compare, pruner_names  # noqa: E402
from demos.sessions import Session, Sessions  # noqa: E402

# of Gradio and of what it stands on, none of our doing
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
FAST = "mean"
COUNT = "how many objects are there?"
QWEN_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # of models this small more threads only wait for each other


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models(device="cpu")


@pytest.fixture(scope="module")
def page(models: Models) -> Iterator[Any]:
    parts = models.model, models.processor, models.segmenter
    with served(lambda: build_app(*parts, segmenter_name=models.segmenter_name)) as made:
        yield made


@pytest.fixture
def scene(tmp_path: Path) -> str:
    scenes()[0].image.save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def connect(page: Any) -> Any:
    return gradio_client.Client(page.local_url, verbose=False, download_files=False, analytics_enabled=False)


def test_an_answer_grows_and_ends_as_what_the_grounder_says(models: Models, scene: str) -> None:
    *grown, last = ask_in_pieces(models, scene, CAPTION_PROMPT, FAST)
    assert isinstance(last, Grounding)
    expected = models.grounder(FAST).ask(scene, CAPTION_PROMPT)
    assert last.answer == expected.answer == grown[-1]
    assert len(grown) > 3
    assert all(isinstance(one, str) and last.answer.startswith(one) for one in grown)


def test_pieces_are_the_answer_word_by_word_and_objects_have_the_colours_of_the_picture(
    models: Models, scene: str
) -> None:
    found = models.grounder(FAST).ask(scene, CAPTION_PROMPT)
    pieces = word_pieces(found)
    assert "".join(text for text, _ in pieces) == found.answer
    assert len(pieces) == len(found.words)
    colored = [(text, color) for text, color in pieces if color is not None]
    named = [word for word in found.objects if word.box is not None]
    assert colored == [(word.text, str(number)) for number, word in enumerate(named)]
    assert all(word.text in text for (text, _), word in zip(pieces, found.words, strict=True))


@pytest.mark.slow
def test_every_heatmap_that_is_offered_answers(models: Models, scene: str) -> None:
    for _, name in heatmap_choices(models):
        found = ground(models, scene, "is there a star in the image?", name)
        assert found["answer"] == "yes"
        assert [set(word) >= {"text", "box", "score"} for word in found["words"]] == [True]


def test_head_maps_are_one_a_layer_or_one_a_head(models: Models) -> None:
    image = scenes()[0].image
    found = models.grounder(FAST).ask(image, COUNT)
    word = found.words[0]
    layers = draw_head_maps(models, image, COUNT, word.span, None)
    heads = draw_head_maps(models, image, COUNT, word.span, 2)
    assert [caption for _, caption in layers] == [f"layer {n}" for n in range(4)]
    assert [caption for _, caption in heads] == [f"layer 2, head {n}" for n in range(4)]
    pictures = [np.asarray(picture) for picture, _ in (*layers, *heads)]
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_a_comparison_has_what_each_budget_costs(models: Models) -> None:
    full, found = compare(models, scenes()[1].image, COUNT, "divprune", [1.0, 0.25])
    assert found[0].answer == full
    assert [one.report.equivalent_tokens for one in found] == [64, 16]
    assert found[1].report.flops < found[0].report.flops == found[0].report.full_flops
    assert all(one.report.seconds is not None for one in found)
    with pytest.raises(ValueError, match="no method is called 'nothing'"):
        compare(models, scenes()[1].image, COUNT, "nothing", [0.5])


@pytest.mark.slow
def test_every_pruner_and_every_remedy_that_is_offered_works(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = scenes()[3].image
    monkeypatch.setattr("demos.pruning.ROUNDS", 1)
    for name in pruner_names(models):
        _, (found,) = compare(models, image, "is there a cross in the image?", name, [0.5])
        assert found.report.equivalent_tokens < 64, name
    for name in remedy_names(models):
        assert answer_with(models, image, "how many objects are there?", name).answer, name


def test_a_remedy_tells_what_it_did_and_the_model_is_as_before(models: Models) -> None:
    image = scenes()[3].image
    plain = answer_with(models, image, CAPTION_PROMPT, None)
    strong = answer_with(models, image, CAPTION_PROMPT, "grounding_heads")
    assert "heads strengthened" in strong.notes
    assert strong.heads
    assert "attention redistributed" in answer_with(models, image, CAPTION_PROMPT, "pai").notes
    assert answer_with(models, image, CAPTION_PROMPT, None).answer == plain.answer
    drawn = head_table([[0.0, 1.0], [2.0, 3.0]], {"one": {1: [0]}})
    assert drawn.count('class="strong"') == 1
    assert drawn.index('class="strong"') > drawn.index("layer 1")


def test_another_model_needs_nothing_that_was_chosen_for_the_embedded_one(
    tmp_path: Path, models: Models, scene: str
) -> None:
    models.model.save_pretrained(tmp_path / "other")
    models.processor.save_pretrained(tmp_path / "other")
    other = load_models(str(tmp_path / "other"), device="cpu")
    assert (models.embedded, other.embedded, other.name) == (True, False, "other")
    size, small = (
        sum(one.numel() for one in model.parameters()) for model in (models.model, models.segmenter.model)
    )
    assert models.facts == {
        "model": f"the embedded LLaVA, {size / 1e6:.3g} M parameters",
        "segmenter": f"the embedded SAM, {small / 1e3:.3g} k parameters",
        "on": "cpu, float32",
    }
    assert other.facts["model"] == f"other, {size / 1e6:.3g} M parameters"
    assert set(remedy_names(models)) - set(remedy_names(other)) == {"grounding_heads", "agla", "act"}
    assert not any("embedded" in name or name == "mask_head" for _, name in heatmap_choices(other))
    assert ground(other, scene, COUNT, heatmap_choices(other)[0][1])["answer"] == "three"
    assert answer_with(other, scenes()[3].image, COUNT, "vcd").answer


@pytest.fixture(scope="module")
def qwen() -> Models:
    """A tiny Qwen2-VL of random weights, whose processor says what images are in ways of its own."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    words = ["user:", "assistant:", *COUNT.split(), *SHAPES]
    words += [f"word{number}" for number in range(START - 2 - len(words))]  # pad and unk come first
    named = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    named |= {"video_token": "<|video_pad|>", "image_token": "<|image_pad|>"}
    pixels: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**pixels, size={"shortest_edge": 64, "longest_edge": 4096}),
        tokenizer(words, **named),
        Qwen2VLVideoProcessor(**pixels),
        chat_template=QWEN_CHAT,
    )
    assert processor.image_token_id == IMAGE
    return Models(make_model("qwen2_vl", dtype=torch.float32), processor, build_segmenter("embedded"))


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of models that never end by themselves, and one round of the clock."""
    for module in ("grounding", "head_maps", "hallucination", "pruning"):
        monkeypatch.setattr(f"demos.{module}.MAX_NEW_TOKENS", 5)
    monkeypatch.setattr("demos.pruning.ROUNDS", 1)


@pytest.mark.usefixtures("_brief")
def test_a_model_of_another_family_is_grounded_by_every_heatmap_that_is_offered(
    qwen: Models, scene: str
) -> None:
    image = scenes()[0].image
    expected = answer_with(qwen, image, COUNT, None).answer
    for _, heatmap in heatmap_choices(qwen):
        *grown, last = ask_in_pieces(qwen, scene, COUNT, heatmap)
        assert isinstance(last, Grounding)
        assert last.answer == grown[-1] == expected, heatmap
        assert "".join(text for text, _ in word_pieces(last)) == last.answer
        seen = np.stack([word.heatmap for word in last.words])
        assert seen.shape[1:] == (384, 384)
        assert np.isfinite(seen).all()
        assert seen.max() > seen.min(), heatmap
        span = last.words[-1].span
    maps = [one for layer in (None, 3) for one in draw_head_maps(qwen, image, COUNT, span, layer)]
    assert [caption for _, caption in maps] == [
        *(f"layer {number}" for number in range(4)),
        *(f"layer 3, head {number}" for number in range(4)),
    ]
    assert len({picture.tobytes() for picture, _ in maps}) == 8


@pytest.mark.usefixtures("_brief")
def test_a_model_of_another_family_is_pruned_by_every_method_that_is_offered(qwen: Models) -> None:
    image = scenes()[1].image
    for name in pruner_names(qwen):
        full, found = compare(qwen, image, COUNT, name, [1.0, 0.25])
        assert found[1].report.full_tokens == 64
        assert found[1].report.equivalent_tokens < 64, name
        if name != "prumerge":  # it decides itself
            assert found[0].answer == full, name
            assert found[0].picture.tobytes() != found[1].picture.tobytes(), name


@pytest.mark.usefixtures("_brief")
def test_a_model_of_another_family_is_answered_for_by_every_remedy_that_is_offered(qwen: Models) -> None:
    image, names = scenes()[3].image, remedy_names(qwen)
    plain = answer_with(qwen, image, COUNT, None)
    assert len(plain.answer.split()) > 2
    for name in names:
        assert answer_with(qwen, image, COUNT, name).answer, name
    drawn = redistributed(qwen, image, COUNT, plain, names)
    assert re.findall("<h3>(.*?)</h3>", drawn) == ["VHR", "VAR", "PAI", "Paint"]
    assert drawn.count("<img") == 12
    table = head_table(measure_heads(qwen, image, COUNT, plain.answer), {})
    assert table.count("<td") == 16
    assert answer_with(qwen, image, COUNT, None).answer == plain.answer


def test_inventions_are_marked_where_the_truth_is_known() -> None:
    marked, invented = mark_invented("a red cross and a <small> ring", {"cross"})
    assert invented == ["ring"]
    assert marked == (
        'a red <mark class="seen" title="in the image">cross</mark> and a &lt;small&gt; '
        '<mark class="invented" title="not in the image">ring</mark>'
    )
    assert mark_invented("a ring", None) == ("a ring", [])
    assert known_objects(scenes()[3].image) == {"cross"}
    assert known_objects(Image.new("RGB", (9, 9))) is None
    assert known_objects(ShapesWorld("balanced", 0, 1)[0].image) is None, "no example, though of the world"


def test_bad_input_is_refused_with_what_to_do(tmp_path: Path, models: Models, scene: str) -> None:
    (tmp_path / "<b>notes.png").write_text("no image")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(tmp_path / "deep.png")
    whole = Path(scene).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for path, words in (
        (None, "Add an image first"),
        (str(tmp_path / "gone.png"), "no longer here"),
        (str(tmp_path / "<b>notes.png"), html.escape("<b>notes.png is not an image")),
        (str(tmp_path / "deep.png"), "not an image that can be read"),
        (str(tmp_path / "cut.png"), "cut off"),
    ):
        with pytest.raises(gr.Error, match=words) as caught:
            ground(models, path, "describe the image.", FAST)
        assert "<b>" not in caught.value.message
    for text, words in (
        ("", "question is empty"),
        (" \n", "question is empty"),
        ("a" * 5000, "5,000 characters"),
    ):
        with pytest.raises(gr.Error, match=words):
            ground(models, scene, text, FAST)


def test_a_large_image_is_scaled_down_and_a_huge_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Info", told.append)
    Image.new("RGB", (8000, 5000), "red").save(tmp_path / "large.jpg")
    image = inputs.read_image(str(tmp_path / "large.jpg"))
    assert image.size == (1024, 640)
    assert image.getpixel((700, 400))[0] > 250
    assert told == ["The image has 8000 x 5000 pixels; it is scaled down to 1024 x 640."]
    monkeypatch.setattr(inputs, "MOST_PIXELS", 30_000_000)
    with pytest.raises(gr.Error, match="8000 x 5000 pixels; at most 30 million"):
        inputs.read_image(str(tmp_path / "large.jpg"))


def test_files_go_with_the_last_page_that_has_them(tmp_path: Path) -> None:
    sessions, shared, own = Sessions(tmp_path), tmp_path / "shared.png", tmp_path / "own.png"
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    one, two = SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="two")
    for path in (shared, own, outside):
        path.write_text("x")
    sessions.own(one, shared)
    sessions.own(two, shared)
    sessions.own(one, own)
    sessions.own(one, outside)
    picture = sessions.of(one).path("picture.png")
    picture.write_text("x")
    sessions.end(one)
    assert [path.exists() for path in (shared, own, outside, picture)] == [True, False, True, False]
    sessions.end(two)
    assert not shared.exists()
    assert outside.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_page_keeps_few_files_of_a_name(tmp_path: Path) -> None:
    session = Session(tmp_path / "session")
    paths = []
    for _ in range(20):
        paths.append(session.path("picture.png"))
        paths[-1].write_text("x")
    assert len(set(paths)) == 20
    assert paths[-1].exists()
    assert sum(path.exists() for path in paths) < 16


@pytest.mark.slow
def test_ten_visitors_at_once_are_answered_one_after_the_other(
    page: Any, scene: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # visitors who left are noticed at once, not in 15 s
    expected = json.loads(json.dumps(ground(models, scene, COUNT, heatmap_choices(models)[0][1])))
    clients = [connect(page) for _ in range(10)]
    jobs = [client.submit(gradio_client.handle_file(scene), COUNT, api_name="/ground") for client in clients]
    for job in jobs:
        found = job.result(timeout=120)
        assert found["answer"] == expected["answer"]
        assert [(word["text"], word["box"]) for word in found["words"]] == [
            (word["text"], word["box"]) for word in expected["words"]
        ]
        assert all(word["score"] is not None for word in found["words"])
    folder = Path(page.GRADIO_CACHE)
    assert list(folder.rglob("scene.png"))
    for client in clients:
        client.close()
    gone_by = time.monotonic() + 40  # of all that the visitors sent
    while time.monotonic() < gone_by and list(folder.rglob("scene.png")):
        time.sleep(0.5)
    assert not list(folder.rglob("scene.png"))


def test_only_what_was_uploaded_is_read_and_errors_arrive(page: Any, scene: str, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    client = connect(page)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    inside = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    away = {"path": "http://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}}
    for image, text, words in (
        (gradio_client.handle_file(str(tmp_path / "notes.png")), "what?", "not an image"),
        (gradio_client.handle_file(scene), "", "question is empty"),
        (gradio_client.handle_file(scene), "a" * 5000, "5,000 characters"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(image, text, api_name="/ground")
    for image in (inside, away):
        body = {"data": [image, "describe the image."]}
        start = httpx.post(f"{page.local_url}gradio_api/call/ground", json=body)
        event = start.json()["event_id"]
        told = httpx.get(f"{page.local_url}gradio_api/call/ground/{event}", timeout=60).text
        assert "event: error" in told
    for path in (secret, "/etc/passwd", Path(page.GRADIO_CACHE) / ".." / ".." / "etc" / "passwd"):
        answer = httpx.get(f"{page.local_url}gradio_api/file={path}")
        assert answer.status_code in (403, 404), path
    client.close()


def test_the_page_has_one_endpoint_and_names_no_other_host(page: Any) -> None:
    assert list(connect(page).view_api(return_format="dict", print_info=False)["named_endpoints"]) == [
        "/ground"
    ]
    config = page.get_config_file()
    assert config["title"] == "visionsel: grounding, pruning, hallucination"
    words = " ".join(str(one["props"].get("value")) for one in config["components"] if one["type"] == "html")
    for text in ("the embedded LLaVA, ", "the embedded SAM, ", "cpu, float32", *ABOUT.values()):
        assert text in words
    links = re.findall('href="(.*?)" target="_blank" rel="noopener noreferrer"', words)
    assert links == [DOCS, *(f"{DOCS}/{name.lower()}.md" for name in ABOUT)]
    assert words.count("href=") == len(links)
    assert all((ROOT / "docs" / Path(link).name).is_file() for link in links[1:])
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Documentation"] == DOCS
    assert config["analytics_enabled"] is False
    assert page.share_url is None
    assert page.local_url.startswith("http://127.0.0.1:")
    assert "fonts.googleapis" not in httpx.get(page.local_url).text.replace("preconnect", "")
    assert [one["props"]["label"] for one in config["components"] if one["type"] == "tabitem"] == [
        "Grounding",
        "Pruning",
        "Hallucination",
    ]


def test_each_tab_is_a_page_of_its_own(models: Models) -> None:
    parts = models.model, models.processor, models.segmenter
    for name in ABOUT:
        config = build_app(*parts, tabs=(name,)).get_config_file()
        assert config["title"] == f"visionsel: {name.lower()}"
        tabs = [one["props"]["label"] for one in config["components"] if one["type"] == "tabitem"]
        assert tabs == [name]
    with pytest.raises(ValueError, match="there is no tab 'Pruned'"):
        build_app(*parts, tabs=("Pruned",))


def test_the_page_is_shared_only_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = []

    @contextmanager
    def serve_nothing(make: Any, port: int | None, share: bool) -> Iterator[Any]:
        shared.append(share)
        yield SimpleNamespace(local_url="http://127.0.0.1:7860/")

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("demos.page.served", serve_nothing)
    waiting = SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupt))
    monkeypatch.setattr("demos.page.threading", waiting)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for arguments, words in (([], "for this machine alone"), (["--share"], "whoever has the public link")):
        main(["demo", "--device", "cpu", *arguments])
        assert words in capsys.readouterr().out
    assert shared == [False, True]


def test_the_command_refuses_a_port_and_a_model_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", "70000"]) == 1
    assert "--port is a number from 1 to 65535" in capsys.readouterr().err
    assert main(["demo", "--segmenter", "sam:vit_z"]) == 1
    assert "visionsel demo: " in capsys.readouterr().err
