"""What the training programs share: the run's folder, loggers, checkpoints, and early errors.

A run is a folder: `config.yaml` (everything, resolved), `checkpoints/best.ckpt` and `last.ckpt`, and
`logs/version_N/` with `metrics.csv` and TensorBoard's events, one N for each start. A checkpoint replaces the
one before it when it is complete.
"""

import inspect
import pickle
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from train.callbacks_bad_samples import bad_samples_file
from train.checkpoint_io import WholeCheckpointIO, remove_partial

__all__ = ["EndlessCLI", "RunCLI", "WeightEMA", "below", "brief", "read_checkpoint", "run_cli"]


class RunCLI(LightningCLI):
    """LightningCLI with a run folder, `weights_only=True` for every file that is loaded, and early checks.

    Subclasses set:

    Attributes:
        monitor: the metric whose highest value is the best checkpoint.
        program: its name, for messages.
        fixed: hyperparameters that a checkpoint must have been trained with as they are given.
        marks: further ones by which a checkpoint of the program is known.
        seeded: arguments that take the seed of the run.
        first_weights: arguments of the model that a checkpoint replaces; only training looks at them.
        whole_weights: those of them that serve in place of a checkpoint.
    """

    monitor = "val/top1"
    program = "this program"
    fixed: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    seeded: tuple[str, ...] = ("data.seed", "model.seed")
    first_weights: tuple[str, ...] = ()
    whole_weights: tuple[str, ...] = ()

    def __init__(
        self,
        model: type[LightningModule],
        data: type[LightningDataModule],
        arguments: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            model,
            data,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            args=None if arguments is None else list(arguments),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The arguments of a run, beside Lightning's; its seed is that of all that draws."""
        for target in self.seeded:
            parser.link_arguments("seed_everything", target)
        parser.add_argument("--output", type=str, default="runs/run", help="folder of the run")
        parser.add_argument(
            "--save_every",
            type=int | None,
            default=None,
            help="updates after which last.ckpt is written, also inside an epoch [after each epoch]",
        )
        parser.add_argument(
            "--predictions",
            type=str | None,
            default=None,
            help="CSV of the predict verb [OUTPUT/predictions.csv]",
        )
        parser.add_argument(
            "--matmul_precision",
            type=str,
            default="high",
            help="float32 products on tensor cores: highest, high (TF32) or medium",
        )
        if "bad_samples" in inspect.signature(self._datamodule_class).parameters:
            parser.link_arguments("output", "data.bad_samples", compute_fn=bad_samples_file)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs; `weights_only` is not an option."""
        return {
            verb: skipped | {"weights_only"} | ({"return_predictions"} if verb == "predict" else set())
            for verb, skipped in LightningCLI.subcommands().items()
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's, without its warning when a program with arguments of its own calls this one."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint's arguments win over those given; here the given ones hold."""

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self._get(self.config, "output"))

    def before_instantiate_classes(self) -> None:
        """Refuse what can be refused without building anything."""
        given = self._named_checkpoint(self._get(self.config, "ckpt_path"))
        self.resumed = given not in (None, "hpc", "registry")
        if given is not None and self.resumed:
            self.checkpoint = read_checkpoint(given)
        asked = self._get(self.config, "ckpt_path")
        self.config[self.subcommand]["ckpt_path"] = given
        if self.subcommand == "fit" and asked is None and (self.output / "config.yaml").exists():
            raise ValueError(
                f"{self.output} already holds a run; resume it with --ckpt_path "
                f"{self.output / 'checkpoints' / 'last.ckpt'}, name another --output, or delete it"
            )
        if self.subcommand == "fit" and self.resumed:
            remove_partial(self.output / "checkpoints")
        if self.subcommand != "fit" and self.resumed:
            model = self.config[self.subcommand]["model"]
            for name in self.first_weights:
                model[name] = False if isinstance(model[name], bool) else None
        torch.set_float32_matmul_precision(self._get(self.config, "matmul_precision"))

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another program, or of one with other hyperparameters."""
        given = self.model.hparams
        if not self.resumed:
            if self.subcommand != "fit" and not any(given[name] for name in self.whole_weights):
                other = f", or --model.{self.whole_weights[0]}" if self.whole_weights else ""
                raise ValueError(f"{self.subcommand} needs weights: give --ckpt_path{other}")
            return
        path = self._get(self.config, "ckpt_path")
        trained = self.checkpoint.get("hyper_parameters", {})
        if "state_dict" not in self.checkpoint or not {*self.fixed, *self.marks} <= set(trained):
            start = "; to start from other weights, give them as --model.checkpoint"
            raise ValueError(
                f"{path} is not a checkpoint of {self.program}{start if 'checkpoint' in given else ''}"
            )
        for name in self.fixed:
            if trained[name] != given[name]:
                raise ValueError(f"{path} was trained with {name} {trained[name]!r}, not {given[name]!r}")
        del self.checkpoint

    def _named_checkpoint(self, given: str | None) -> str | None:
        """What `last` and `best` mean: those of the run; a run that has no `last` yet starts afresh."""
        if given not in ("best", "last"):
            return given
        path = self.output / "checkpoints" / f"{given}.ckpt"
        if given == "last" and self.subcommand == "fit" and not path.exists():
            return None
        return str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with our loggers and checkpoints, where the configuration names none."""
        config = self._get(self.config_init, "trainer")
        if config.get("sync_batchnorm"):
            raise ValueError(
                "trainer.sync_batchnorm loses the activations in timm's batch norms; "
                "set model.sync_batchnorm instead, where the program has it"
            )
        fit = self.subcommand == "fit"
        if config.get("logger") is None:
            kwargs["logger"] = self._loggers() if fit else False
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        writes = fit and config.get("enable_checkpointing") is not False and not config.get("fast_dev_run")
        named = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        if not fit and config.get("enable_checkpointing") is None and not named:
            kwargs["enable_checkpointing"] = False
        if named and self._get(self.config, "save_every") is not None:
            raise ValueError("save_every belongs to our checkpoints; the ModelCheckpoint given replaces them")
        if writes and not named:
            kwargs["callbacks"] = [*callbacks, *self._checkpoints()]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        strategy = trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            raise ValueError(
                "checkpoints are files here: set trainer.strategy.save_distributed_checkpoint to false"
            )
        return trainer

    def _loggers(self) -> list[CSVLogger | TensorBoardLogger]:
        csv = CSVLogger(self.output, name="logs")
        version = csv.version
        return [csv, TensorBoardLogger(self.output, name="logs", version=version, default_hp_metric=False)]

    def _checkpoints(self) -> list[ModelCheckpoint]:
        folder = self.output / "checkpoints"
        best = ModelCheckpoint(
            folder,
            "best",
            monitor=self.monitor,
            mode="max",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        every = self._get(self.config, "save_every")
        if every is None:
            return [best, last]
        if every < 1:
            raise ValueError(f"save_every must be at least 1, got {every}")
        # under the same name: the newest counts
        steps = ModelCheckpoint(folder, "last", every_n_train_steps=every, enable_version_counter=False)
        return [best, last, steps]

    def fit(self, **kwargs: Any) -> None:
        """Train; leave no folder behind when nothing was trained."""
        existed = self.output.exists()
        try:
            self.trainer.fit(weights_only=True, **kwargs)
        except Exception:
            if not existed and self.trainer.global_step == 0:
                shutil.rmtree(self.output, ignore_errors=True)
            raise

    def validate(self, **kwargs: Any) -> Any:
        """Metrics on the validation split."""
        return self.evaluate("validate", **kwargs)

    def test(self, **kwargs: Any) -> Any:
        """Metrics on the test split."""
        return self.evaluate("test", **kwargs)

    def evaluate(self, verb: str, **kwargs: Any) -> Any:
        """Run a verb of the trainer that does not train."""
        if verb == "predict" and self.trainer.world_size > 1:
            raise ValueError("predict runs on one device: set --trainer.devices 1")
        with warnings.catch_warnings():
            # the callbacks that the checkpoint names belong to training
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            return getattr(self.trainer, verb)(weights_only=True, **kwargs)


class EndlessCLI(RunCLI):
    """A program whose data has no test split: it fits and validates."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Two of Lightning's verbs."""
        verbs = RunCLI.subcommands()
        return {verb: verbs[verb] for verb in ("fit", "validate")}


class WeightEMA(EMAWeightAveraging):
    """Lightning's averaged weights, forgotten when training ends.

    Lightning keeps the average, and a later `trainer.validate` or `trainer.test` of a checkpoint would
    exchange its weights with those of the end of training.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            # models that shard themselves in configure_model refuse an average
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
            super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._average_model = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class _SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            output = Path(self.config["output"])
            output.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, output / self.config_filename, skip_none=False, overwrite=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A file of weights, as tensors and plain values only.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: naming the file that is truncated, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is cut off: {brief(error)}") from error
    except Exception as error:  # safetensors has its own
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path} is not a safetensors file, or is cut off: {brief(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict or a checkpoint")
    return checkpoint


def below(prefix: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a part of a network, by their names in the part."""
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def run_cli(program: str, build: Callable[[list[str]], Any], arguments: Sequence[str] | None) -> int:
    """Run a program; what the user can mend becomes one line on stderr. `--debug` shows where it came from.

    Returns:
        The exit status: 0 done, 1 the input was not usable (2, from argparse, wrong arguments).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet()
    try:
        build(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def _quiet() -> None:
    """Silence what a user of Lightning 2.6 can do nothing about."""
    # whether a run's folder is in use is checked above, and resuming into it is the ordinary case
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning calls torch functions that torch 2.15 deprecates
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")


def brief(error: BaseException, limit: int = 300) -> str:
    """The message of a foreign error on one line, cut off when it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."
