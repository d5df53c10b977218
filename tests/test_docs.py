"""What the documentation says is true: its code runs, its commands parse, names exist, the site builds."""

import doctest
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

import visionsel

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "visionsel"
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
API = sorted((ROOT / "docs" / "api").glob("*.md"))
GUIDES = [page for page in PAGES if page not in API]
SETUP = "visionsel.embedded.lvlm"  # whose example makes the model that the others use


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language; those marked `notest` are left out."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    for block in blocks(page, "python"):
        with redirect_stdout(io.StringIO()):
            exec(compile(block, name(page), "exec"), scope)
    return scope


@pytest.mark.slow
def test_the_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    states = {name: timm.create_model(name).state_dict() for name in ("dinat_mini", "biformer_tiny")}
    torch.save({"model": states["dinat_mini"]}, "downloaded.pth")
    torch.save({"model": states["biformer_tiny"]}, "biformer_tiny_best.pth")
    asked = []

    def download(address: str, **_: Any) -> Any:
        asked.append(address)
        return torch.load("downloaded.pth", weights_only=True)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", download)
    assert README.read_text().count("```python") == len(blocks(README, "python")) >= 6, "all blocks are run"
    scope = run_blocks(README)
    release = timm.get_pretrained_cfg("dinat_mini.in1k")
    assert release is not None
    assert asked == [release.url]
    for name, state in states.items():
        loaded = scope[name.partition("_")[0]].state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    logits, maps, out = scope["logits"], scope["maps"], scope["out"]
    assert tuple(logits.shape) == (1, 10)
    assert [m.shape[-2:] for m in maps] == [(64, 80), (32, 40), (16, 20), (8, 10)]
    assert tuple(out.shape) == (2, 28, 28, 4, 32)
    for picture in ("kept.png", "grounded.png"):
        assert (tmp_path / picture).stat().st_size > 1000


def test_an_answer_takes_few_lines() -> None:
    section = README.read_text().partition("\n## A vision-language model")[2]
    first = re.search(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    assert first is not None
    assert "generate_answer(" in first[1]
    assert len([line for line in first[1].splitlines() if line]) <= 6


def test_the_smallest_of_each_family_is_in_the_readme_as_on_its_page() -> None:
    row = re.compile(r"^\| `\S+` \| [\d.]+ M \| .*", flags=re.MULTILINE)
    expected = []
    for family in (ROOT / "docs" / "models.md").read_text().split("\n### ")[1:]:
        if "\nSource: " not in family:  # timm's own
            continue
        name, size, work, side, top1, _ = min(
            (line.strip("| ").split(" | ") for line in row.findall(family)),
            key=lambda cells: float(cells[1].split()[0]),
        )
        paper = re.search(r"\[arXiv:(\S+)\](\(\S+\))", family)
        source = f"[{paper[1]}]{paper[2]}" if paper else "ours"
        expected.append(f"| {name} | {size} | {work} | {side} | {top1} | {source} |")
    assert len(expected) == 7
    assert row.findall(README.read_text()) == expected


@pytest.mark.slow
def test_the_commands_of_the_readme_that_take_seconds_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from visionsel.cli import main
    from visionsel.data.shapes import ShapesWorld

    monkeypatch.chdir(tmp_path)
    ShapesWorld("balanced", 1, 1)[0].image.save("scene.png")
    ran = []
    for words in commands(README):
        if words[0] == "visionsel" and words[1] in ("models", "generate", "ground", "bench"):
            assert main(words[1:]) == 0, words
            assert capsys.readouterr().out
            ran.append(words[1])
    assert ran == ["generate", "generate", "ground", "bench", "models"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grounded.png", "kept.png", "scene.png"]
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"visionsel {visionsel.__version__}\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "python")], ids=name)
def test_the_code_of_a_page_runs_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


@pytest.mark.parametrize("page", API, ids=name)
def test_what_an_api_page_imports_is_there(page: Path) -> None:
    run_blocks(page)


def test_the_pages_that_the_readme_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.read_text())
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the shell blocks of a page, without what stands after a pipe."""
    for block in blocks(page, "(?:sh|bash|shell|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words[: words.index("|")] if "|" in words else words


@pytest.mark.parametrize("page", [README, *GUIDES], ids=name)
def test_the_commands_of_a_page_are_ones_that_there_are(page: Path) -> None:
    for words in commands(page):
        line = " ".join(words)
        if words[0] == "visionsel":
            from visionsel.cli import _parser

            said = io.StringIO()
            try:
                with redirect_stderr(said):
                    _parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{line}\n{said.getvalue()}")
        elif words[:2] == ["python", "-m"]:
            check_program(words[2], words[3:], line)
        elif words[0] == "make":
            verbs = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert set(words[1:]) <= set(verbs), line
        elif words[:2] == ["pip", "install"]:
            extras = {extra for text in re.findall(r"visionsel\[(.*?)\]", line) for extra in text.split(",")}
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert extras <= set(project["optional-dependencies"]), line


def check_program(module: str, arguments: list[str], line: str) -> None:
    """A module of the repository, and the configurations that it ships, exist; those in runs/ are made."""
    if module.split(".")[0] in {path.name for path in ROOT.iterdir() if path.is_dir()}:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), line
    for flag, value in pairwise(arguments):
        if flag == "--config" and not value.startswith(("runs/", "$")):
            assert (ROOT / value).is_file(), line


def modules_with_examples() -> list[str]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if "    >>> " in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def test_the_examples_of_docstrings_print_what_they_say() -> None:
    shared: dict[str, Any] = {}
    failures: list[str] = []
    total = 0
    for module in sorted(modules_with_examples(), key=lambda module: module != SETUP):
        runner = doctest.DocTestRunner(verbose=False)
        for test in doctest.DocTestFinder().find(importlib.import_module(module)):
            test.globs = dict(shared)  # an example brings what it uses, and nothing of its module is there
            said = io.StringIO()
            runner.run(test, out=said.write, clear_globs=False)
            if module == SETUP and test.examples:
                shared = test.globs
            if said.getvalue():
                failures.append(said.getvalue())
        total += runner.tries
    assert not failures, "\n".join(failures)
    assert total > 100


def test_every_operator_layer_pruner_modulator_and_decoder_has_an_example() -> None:
    from visionsel import layers, ops
    from visionsel.multimodal import MODULATORS, PRUNERS
    from visionsel.multimodal.decoding import DECODERS

    named = [getattr(room, member) for room in (ops, layers) for member in room.__all__]
    for thing in [*named, *PRUNERS, *MODULATORS, *DECODERS]:
        assert ">>> " in (thing.__doc__ or ""), f"{thing.__name__} has no example in its docstring"


def packages() -> Iterator[ModuleType]:
    """All packages of visionsel, and the modules whose names no package repeats."""
    yield visionsel
    for found in pkgutil.walk_packages([str(PACKAGE)], "visionsel."):
        if found.ispkg and not found.name.startswith("visionsel.ops."):  # an operator and its backends
            yield importlib.import_module(found.name)
    for module in ("viz", "files", "boxes", "generation", "export"):
        yield importlib.import_module(f"visionsel.{module}")
    for module in pkgutil.iter_modules([str(PACKAGE / "data")], "visionsel.data."):
        if not module.ispkg and module.name != "visionsel.data.folders":  # a tool of the writers
            yield importlib.import_module(module.name)


def find(path: str) -> Any:
    """What a dotted path names."""
    for cut in range(len(parts := path.split(".")), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {path}")


def documented() -> list[tuple[str, Any]]:
    """Paths of what the API pages show of the package, with what is there; of a module these are its members.

    What needs a harness of other people is left to mkdocs, which reads it and does not import it.
    """
    found = []
    for page in API:
        for path, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text(), flags=re.MULTILINE):
            if not path.startswith("visionsel.") or path.startswith("visionsel.integrations."):
                continue
            members = re.search(r"^ +members: \[(.*)\]", options, flags=re.MULTILINE)
            paths = [f"{path}.{member}" for member in members[1].split(", ")] if members else [path]
            found += [(path, find(path)) for path in paths]
    return found


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    named = documented()
    paths = {path for path, _ in named}
    things = {
        id(thing) for _, thing in named if not isinstance(thing, (str, int, float))
    }  # equal ones are one
    pages = "".join(page.read_text() for page in API)
    missing = []
    for package in packages():
        for member in getattr(package, "__all__", []):
            path, thing = f"{package.__name__}.{member}", getattr(package, member)
            if isinstance(thing, ModuleType):  # it has a heading or members of its own
                missing += [path] if f"::: {thing.__name__}" not in pages else []
            elif member != "__version__" and path not in paths and id(thing) not in things:
                missing.append(path)
    assert not missing, "on no page of docs/api: " + ", ".join(missing)


def test_every_training_program_is_on_its_page() -> None:
    page = (ROOT / "docs" / "api" / "training.md").read_text()
    for path in (ROOT / "train").glob("*.py"):
        if 'if __name__ == "__main__":' in path.read_text():
            assert f"::: train.{path.stem}\n" in page, path.stem


def test_arguments_that_docstrings_name_are_arguments() -> None:
    wrong = []
    for path, thing in documented():
        methods = (
            [value for value in vars(thing).values() if inspect.isfunction(value)]
            if inspect.isclass(thing)
            else []
        )
        for one in [thing, *methods] if callable(thing) else []:
            text = re.search(
                r"\nArgs:\n(.*?)(?:\n\S|\Z)", inspect.cleandoc(one.__doc__ or ""), flags=re.DOTALL
            )
            listed = re.findall(r"^    (\w+(?:, \w+)*): ", text[1], flags=re.MULTILINE) if text else []
            names = [name for names in listed for name in names.split(", ")]
            wrong += [f"{path}: {name}" for name in names if name not in inspect.signature(one).parameters]
    assert not wrong, wrong


def test_links_out_of_the_pages_become_addresses_of_files_that_exist() -> None:
    hooks = load_hooks()
    docs = ROOT / "docs"

    def linked(text: str, here: Path = docs) -> str:
        return hooks.linked(text, here, docs, "https://host/us")

    assert linked("[a](../README.md#use)") == "[a](https://host/us/blob/main/README.md#use)"
    assert linked("[`a`](../visionsel)") == "[`a`](https://host/us/tree/main/visionsel)"
    assert linked("[a](../../README.md)", docs / "api") == "[a](https://host/us/blob/main/README.md)"
    for same in ("[a](../nothing.md)", "![a](../README.md)", "[a](pruning.md)", "[a](https://host/b)"):
        assert linked(same) == same
    assert linked("[a](../pruning.md)", docs / "api") == "[a](../pruning.md)"


def load_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_the_help_of_every_verb_is_printed() -> None:
    text = "\n".join(load_hooks().command_help())
    for verb in ("", " models", " generate", " data shapes", " evaluate pope", " demo"):
        assert f"## visionsel{verb}\n" in text
        assert f"usage: visionsel{verb}" in text
    assert "\x1b" not in text


@pytest.mark.slow
def test_the_site_builds_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs mkdocs: pip install 'visionsel[docs]'")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs mkdocstrings[python]")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    addresses = [address for page in pages for address in loaded_by_page(page.read_text())]
    addresses += [address for style in site.rglob("*.css") for address in loaded_by_style(style.read_text())]
    assert len(addresses) > 100
    assert not [address for address in addresses if foreign(address)]
    inventory = {path.name for path in site.iterdir()}
    assert {"index.html", "objects.inv", "search"} <= inventory
    assert "hooks.py" not in inventory


def test_what_a_page_would_ask_other_hosts_for_is_noticed() -> None:
    page = """
        <link rel=canonical href=https://a/x.html><link rel="preconnect" href="https://b"><a href="https://c">
        <script src=//d/x.js></script><script src="x.js"></script><img alt="" src='http://e/x.png'>
        <style>@import "https://f/x.css"; p { background: url(https://g/x.png), url('data:,x') }</style>"""
    hosts = [address.split("/")[2] for address in loaded_by_page(page) if foreign(address)]
    assert sorted(hosts) == ["b", "d", "e", "f", "g"]


def foreign(address: str) -> bool:
    return re.match(r"(?!data:)[a-z]+:|//", address) is not None


def loaded_by_page(html: str) -> list[str]:
    """Addresses that a browser asks for without a click: sources, style sheets, icons."""
    links = [
        tag
        for tag in re.findall(r"<link\b[^>]*>", html)
        if not re.search(r"rel=\"?(canonical|next|prev)", tag)
    ]
    found = [address for tag in links for address in re.findall(r"href=[\"']?([^\"'\s>]+)", tag)]
    found += re.findall(
        r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)", html
    )
    return found + [
        address
        for style in re.findall(r"<style.*?</style>", html, flags=re.DOTALL)
        for address in loaded_by_style(style)
    ]


def loaded_by_style(css: str) -> list[str]:
    return re.findall(r"url\(\s*[\"']?([^\"')]+)", css) + re.findall(r"@import\s+[\"']([^\"']+)", css)


def test_the_repository_of_the_site_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = re.search(r"^  repository: (\S+)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert repository is not None
    assert all(address.startswith(repository[1]) for address in project["urls"].values())
