"""The `visionsel` command.

A verb a file: `cli_models`, `cli_predict`, `cli_export`, `cli_generate`, `cli_ground`, `cli_evaluate`,
`cli_bench`, `cli_demo`, `cli_data`. Results go to stdout as text or, with `--json`, as JSON; messages and
progress go to stderr. Exit status: 0 done, 1 the input was not usable or a goal was missed, 2 wrong
arguments, 130 interrupted, 141 the reader of the output has gone (as a shell says of a program that SIGPIPE
ended).
"""

import argparse
import os
import sys
from collections.abc import Sequence

from visionsel import __version__
from visionsel.cli_bench import add_bench
from visionsel.cli_data import add_data
from visionsel.cli_demo import add_demo
from visionsel.cli_evaluate import add_evaluate
from visionsel.cli_export import add_export
from visionsel.cli_generate import add_generate
from visionsel.cli_ground import add_ground
from visionsel.cli_models import add_models
from visionsel.cli_predict import add_predict
from visionsel.cli_text import Parser, add_verbs, report_error
from visionsel.devices import choose_device
from visionsel.processes import join_processes

DESCRIPTION = """\
Vision models that select what they look at.

backbones:
  models      list them, with their size, input and released weights
  predict     classify images
  export      write a classifier for other programs: the hub, torch.export, ONNX

vision-language models:
  generate    answer about an image: with fewer image tokens, or with less invention
  ground      answer, and say where each word of the answer is seen

measurements:
  evaluate    answers, masks and boxes on benchmarks; the models of the package
  bench       speed: operators, models, pruners, reading attention

and:
  demo        see it in a browser
  data        write a data set"""

EPILOG = """\
examples:
  visionsel models 'dinat_*'
  visionsel predict cat.jpg --model nat_tiny --checkpoint nat_tiny.pth
  visionsel export nat_tiny --checkpoint nat_tiny.pth --to onnx -o nat_tiny.onnx
  visionsel generate scene.png 'describe the image.' --prune fastv:keep=0.5,layer=1 --out kept.png
  visionsel ground scene.png 'describe the image.' -o grounded.png
  visionsel evaluate pope --data shapes --decode vcd
  visionsel bench --explain
  visionsel demo
  visionsel data shapes --out shapes

'visionsel VERB --help' has the options of a verb, and more examples. Results go to stdout, as JSON with
--json; messages and progress go to stderr. Exit status: 0 done; 1 the input was not usable, or a goal was
missed; 2 wrong arguments; 130 interrupted; 141 the reader of the output has gone, as head does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Raises:
        SystemExit: for wrong arguments, with status 2, and where only help or the version is asked for.
    """
    try:
        return _run(_parser().parse_args(arguments))
    except BrokenPipeError:
        return 141
    finally:
        _give_up_output()


def _run(options: argparse.Namespace) -> int:
    try:
        if options.verb == "evaluate":
            options.processes = join_processes()  # several, where torchrun started them
        if getattr(options, "device", None) is not None:
            choose_device(options.device)  # refused before anything is read or loaded
        status: int = options.run(options) or 0
        if options.verb == "evaluate":
            options.processes.part()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:  # every failure becomes one line; --debug shows where it came from
        report_error(options, error)
        return 1
    return status


def _give_up_output() -> None:
    """What could not be written is given up, or Python would complain about it once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="visionsel",
        usage="visionsel [-h] [--version] VERB ...",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"visionsel {__version__}")
    parser.set_defaults(json=False, markdown=False, debug=False)
    common = argparse.ArgumentParser(add_help=False)
    # without defaults, since a verb inside a verb would put its own in the place of what was given before it
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON"
    )
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    # the description lists the verbs, by what they are about
    verbs = add_verbs(parser, "verb", prog="visionsel", help=argparse.SUPPRESS)
    add_models(verbs, common)
    add_predict(verbs, common)
    add_export(verbs, common)
    add_generate(verbs, common)
    add_ground(verbs, common)
    add_evaluate(verbs, common)
    add_bench(verbs, common)
    add_demo(verbs, common)
    add_data(verbs, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
