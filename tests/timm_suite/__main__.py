"""Fetch timm's tests once and run them.

`--smallest` takes one name for each architecture, with few blocks (see `plugin.py`); other arguments go to
pytest.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

CACHE = Path(sys.prefix) / "timm-suite"


def timm_tests() -> Path:
    """`test_models.py` of timm: from the checkout at TIMM_SOURCE, or from the installed version's source."""
    if source := os.environ.get("TIMM_SOURCE"):
        path = Path(source) / "tests" / "test_models.py"
        if not path.is_file():
            sys.exit(
                f"TIMM_SOURCE={source} has no tests/test_models.py; name a pytorch-image-models checkout"
            )
        return path
    path = CACHE / timm.__version__ / "test_models.py"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
            subprocess.run([*command, "--dest", folder, f"timm=={timm.__version__}"], check=True)
            (archive,) = Path(folder).glob("timm-*.tar.gz")
            with tarfile.open(archive) as tar:
                member = tar.extractfile(f"timm-{timm.__version__}/tests/test_models.py")
                if member is None:
                    sys.exit(f"the source release of timm {timm.__version__} has no tests/test_models.py")
                text = member.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(text)
        partial.replace(path)
    return path


def main() -> int:
    """Run the suite; returns pytest's exit status."""
    path = timm_tests()
    CACHE.mkdir(exist_ok=True)
    settings = CACHE / "pytest.ini"
    markers = "base cfg cfg_nonstd forward backward torchscript features fxforward fxbackward".split()
    settings.write_text("[pytest]\nmarkers =\n" + "".join(f"    {marker}\n" for marker in markers))
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(settings), "-p", "tests.timm_suite.plugin"]
    command += ["-p", "no:cacheprovider", "--numprocesses", "auto"]
    arguments = sys.argv[1:]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}  # one thread for each worker
    if "--smallest" in arguments:
        arguments.remove("--smallest")
        environment["TIMM_SUITE_SMALLEST"] = "1"
    command += [str(path), *arguments]
    return subprocess.run(command, cwd=repository, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
