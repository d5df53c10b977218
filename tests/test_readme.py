"""The README's Python runs as it stands, top to bottom."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    logits, maps, out = scope["logits"], scope["maps"], scope["out"]
    assert tuple(logits.shape) == (1, 10)
    assert [m.shape[-2:] for m in maps] == [(64, 80), (32, 40), (16, 20), (8, 10)]
    assert tuple(out.shape) == (2, 28, 28, 4, 32)
    assert (tmp_path / "kept.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("page", ["pruning.md", "grounding.md"])
def test_the_code_of_the_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (README.parent / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_the_pages_that_the_readme_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    for link in links:
        if not link.startswith("http"):
            assert (README.parent / link).exists(), link
