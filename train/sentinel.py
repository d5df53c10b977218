"""SENTINEL: a vision-language model learns from its own sentences not to go on with what it invents.

    python -m train.sentinel fit --config configs/shapes/sentinel.yaml        # pairs, then training
    python -m train.sentinel fit --config configs/shapes/sentinel.yaml --resume true     # go on exactly
    python -m train.sentinel pairs --config configs/shapes/sentinel.yaml      # the pairs alone
    python -m train.sentinel validate --config configs/shapes/sentinel.yaml   # with the adapter and without

After Peng et al. 2025 (arXiv:2507.12455, ICCV): pairs of a true and an invented sentence behind the same true
context (`train.sentinel_pairs`), then their C-DPO loss, with y+ the chosen and y- the rejected sentence,

    -log sigmoid(beta log p(y+ | v, q, c) / p0(y+ | v, q, c) - beta log p(y- | v, q, c) / p0(y- | v, q, c))

for image v, question q and context c. That is DPO whose prompt is question and context, so `trl.DPOTrainer`
computes it: only tokens of the sentence count, and p0 is the model with the adapter switched off. trl takes
this package's model as it is, timm towers included. Its collator is replaced by `PairCollator` for another
reason: it tokenises prompt and completion apart, where a tokenizer that marks spaces would write the words of
a sentence in the middle of a text otherwise than the model does.

Low-rank updates (peft) go to all linear layers of the decoder; the tower and the projector stay. A run leaves

    OUTPUT/texts.jsonl, pairs.jsonl, images/   the pairs, and the texts that they come from
    OUTPUT/settings.json                       how these were made
    OUTPUT/checkpoints/                        to resume from
    OUTPUT/adapter/                            for `model.load_adapter` or `peft.PeftModel.from_pretrained`
    OUTPUT/export/                             with `--merge true`: model and processor, updates merged in
    OUTPUT/history.json                        losses, rewards and their margins

After `load_adapter` a model is still of its own class, and pruners and modulators work on it; of a
`PeftModel`, hand them `get_base_model()`. `validate` describes fresh scenes of the shapes world, and asks
about them. Where the sentence that wins is often the one that ends the text, as there, the model learns to
say less too: look at recall beside CHAIR, and stop early.
"""

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.cli import run_cli
from train.sentinel_detectors import Answers, OpenVocabulary, annotations
from train.sentinel_options import PairOptions, TuneOptions, ValidateOptions
from train.sentinel_pairs import (
    Detector,
    Pair,
    Picture,
    bootstrap,
    build_pairs,
    read_pairs,
    sample_sentences,
)
from visionsel.data.imagefolder import list_images, open_image
from visionsel.data.shapes import Sample, ShapesWorld
from visionsel.embedded.hallucination_quality import MEASURES
from visionsel.files import whole_file, write_json
from visionsel.generation import load_lvlm
from visionsel.multimodal.evaluation import Hallucination, read_synonyms, shapes_synonyms
from visionsel.multimodal.evaluation.asking import ask, describe
from visionsel.multimodal.families import find_family
from visionsel.multimodal.prompts import chat_texts

__all__ = [
    "PairCollator",
    "PairOptions",
    "TuneOptions",
    "ValidateOptions",
    "build_trainer",
    "main",
    "make_pairs",
    "tune",
]

SETTINGS = "settings.json"  # of the pairs


class PairCollator:
    """Pairs as a batch of `DPOTrainer`: first all chosen sentences behind their prompts, then all rejected.

    The whole text is tokenised at once; its tokens from the first that differs from those of the prompt alone
    are the sentence.

    Args:
        processor: of the model, with a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.end = processor.tokenizer.eos_token

    def row(self, pair: Pair) -> dict[str, str]:
        """What the data set of `DPOTrainer` has of a pair: the prompt ends where the sentence begins."""
        [prompt] = chat_texts(self.processor, [pair.question])
        return {
            "image": pair.image,
            "prompt": prompt + pair.context,
            "chosen": pair.chosen + self.end * pair.chosen_last,
            "rejected": pair.rejected + self.end * pair.rejected_last,
        }

    def __call__(self, rows: Sequence[dict[str, str]]) -> dict[str, Tensor]:
        """Inputs of the model and `completion_mask`, int64 `[2 B, L]`, padded on the right."""
        images = [[open_image(row["image"])] for row in rows] * 2
        prompts = [row["prompt"] for row in rows] * 2
        sentences = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        common = {"images": images, "return_tensors": "pt", "padding": True, "padding_side": "right"}
        whole = [prompt + sentence for prompt, sentence in zip(prompts, sentences, strict=True)]
        batch = dict(self.processor(text=whole, **common))
        before = self.processor(text=prompts, **common)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        width = min(ids.shape[1], before["input_ids"].shape[1])
        same = (ids[:, :width] == before["input_ids"][:, :width]) & before["attention_mask"][:, :width].bool()
        lengths = same.long().cumprod(1).sum(1, keepdim=True)
        batch["completion_mask"] = mask * (torch.arange(ids.shape[1]) >= lengths)
        return batch


def make_pairs(options: PairOptions, model: Any, processor: Any, folder: Path) -> list[Pair]:
    """Bootstrap pairs into a folder, see `build_pairs`.

    Raises:
        FileNotFoundError: when there is no folder of images.
        ValueError: without images, or without any pair.
    """
    scenes = options.images is None
    table = shapes_synonyms() if scenes else None
    if options.synonyms is not None:
        table = read_synonyms(options.synonyms)
    detectors = [_detector(name, options, model, processor) for name in options.detectors]

    def write(picture: Picture) -> tuple[list[str], list[Pair]]:
        return bootstrap(
            picture,
            options.question,
            lambda picture, context: sample_sentences(
                model,
                processor,
                picture.image,
                options.question,
                context,
                options.candidates,
                options.temperature,
                options.sentences,
                options.max_new_tokens,
            ),
            detectors,
            table,
            options.coherence,
            options.max_sentences,
        )

    def tell(done: int, pairs: int) -> None:
        print(f"{done} images, {pairs} pairs", flush=True)

    return build_pairs(_pictures(options, folder / "images"), write, folder, options.seed, progress=tell)


def _pictures(options: PairOptions, folder: Path) -> Iterator[Picture]:
    """The images; those of scenes are written into the folder."""
    if options.images is not None:
        for path in list_images(options.images)[: options.size]:
            yield Picture(str(path.resolve()), open_image(path))
        return
    switch: dict[str, Any] = {}
    if options.distribution == "train":
        switch["co_occurrence"] = options.co_occurrence
    for index, sample in enumerate(ShapesWorld(options.distribution, options.seed, options.size, **switch)):
        path = folder / f"{options.distribution}_{options.seed}_{index:05d}.png"
        if not path.is_file():
            with whole_file(path) as partial:
                sample.image.save(partial)
        yield Picture(str(path), sample.image, frozenset(thing.shape for thing in sample.objects))


def _detector(name: str, options: PairOptions, model: Any, processor: Any) -> Detector:
    if name == "annotations":
        return annotations
    if name == "answers":
        return Answers(model, processor)
    return OpenVocabulary.load(name, options.threshold, model.device)


def tune(
    options: TuneOptions,
    model: Any,
    processor: Any,
    pairs: Sequence[Pair],
    folder: Path,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Train the updates and write them to `folder / "adapter"`.

    Args:
        options: of training.
        model, processor: to update; see `build_trainer` for what becomes of the model.
        pairs: to learn from.
        folder: of checkpoints and of the adapter.
        resume: go on from the last checkpoint.

    Returns:
        What `trl` logged at each update.

    Raises:
        ImportError: without trl and peft.
        FileNotFoundError: to resume without a checkpoint.
    """
    from transformers.trainer_utils import get_last_checkpoint

    trainer = build_trainer(options, model, processor, pairs, folder)
    checkpoints = folder / "checkpoints"
    if resume and (not checkpoints.is_dir() or get_last_checkpoint(str(checkpoints)) is None):
        raise FileNotFoundError(f"no checkpoint in {checkpoints} to resume from")
    with _without_deprecations():
        trainer.train(resume_from_checkpoint=resume)
    with _whole_folder(folder / "adapter") as partial:
        trainer.model.save_pretrained(partial)
    history = [row for row in trainer.state.log_history if "loss" in row]
    write_json(history, folder / "history.json")
    return history


def build_trainer(
    options: TuneOptions, model: Any, processor: Any, pairs: Sequence[Pair], folder: Path
) -> Any:
    """The `trl.DPOTrainer` of a run, with new updates.

    trl replaces the forward of the model that it is given by one that computes the loss in pieces, and puts
    the updates into it: read the model anew where it is needed afterwards.

    Args:
        options: of training.
        model, processor: to update.
        pairs: to learn from.
        folder: of the checkpoints.

    Raises:
        ImportError: without trl and peft.
    """
    trl, peft = _libraries()
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import PrinterCallback, TrainerCallback

    class Tell(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and logs and "loss" in logs:
                print(
                    f"update {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.4f}, "
                    f"margin {float(logs['rewards/margins']):.3f}",
                    flush=True,
                )

    collator = PairCollator(processor)
    cuda = torch.cuda.is_available()
    with _without_deprecations():
        arguments = trl.DPOConfig(
            output_dir=str(folder / "checkpoints"),
            beta=options.beta,
            learning_rate=options.lr,
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            max_grad_norm=options.max_grad_norm,
            max_length=None,
            bf16=options.bf16,
            gradient_checkpointing=options.gradient_checkpointing,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            seed=options.seed,
            logging_steps=1,
            save_strategy="epoch",
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trl.DPOTrainer(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=Dataset.from_list([collator.row(pair) for pair in pairs]),
            processing_class=processor,
            peft_config=peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=options.rank,
                lora_alpha=options.alpha,
                lora_dropout=0.0,
                target_modules=_decoder_layers(model),
            ),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Tell())
    return trainer


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Silence names that trl 1.16 and peft 0.21 use and transformers 5.24 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def _decoder_layers(model: nn.Module) -> str:
    """The linear layers of the decoder as one pattern over names of modules."""
    decoder = find_family(model).decoder(model)
    [name] = [name for name, module in model.named_modules() if module is decoder]
    leaves = {
        inner.rpartition(".")[2] for inner, layer in decoder.named_modules() if isinstance(layer, nn.Linear)
    }
    return rf"{re.escape(name)}\.(?:.+\.)?(?:{'|'.join(sorted(leaves))})"


def _libraries() -> tuple[Any, Any]:
    try:
        import peft
        import trl
    except ImportError as error:
        raise ImportError(
            f'train.sentinel needs trl and peft ({error}): pip install "visionsel[multimodal,train]"'
        ) from error
    return trl, peft


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model with the updates merged in, of its own class."""
    peft = _libraries()[1]
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"no adapter in {folder}; train one with the verb fit")
    with _without_deprecations():
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


def _run(arguments: Sequence[str]) -> None:
    config = _parse(arguments)
    folder = Path(config.output)
    _libraries()  # what is missing is told before anything is made
    if config.verb == "validate":
        _validate(config, folder)
        return
    fit = config.verb == "fit"
    if fit and not config.resume and ((folder / "adapter").exists() or (folder / "checkpoints").exists()):
        raise ValueError(
            f"{folder} already holds a run; go on with it with --resume true, name another --output, or "
            "delete it"
        )
    if config.pairs.images is not None:
        list_images(config.pairs.images)
    settings = {"model": config.model}
    settings |= {f"pairs.{name}": value for name, value in asdict(config.pairs).items()}
    _check_settings(settings, folder / SETTINGS)
    model, processor = load_lvlm(config.model)
    if (folder / "pairs.jsonl").is_file():
        pairs = read_pairs(folder / "pairs.jsonl")
    else:
        write_json(settings, folder / SETTINGS)
        pairs = make_pairs(config.pairs, model, processor, folder)
    print(f"{len(pairs)} pairs in {folder / 'pairs.jsonl'}", flush=True)
    if not fit:
        return
    history = tune(config.tune, model, processor, pairs, folder, config.resume)
    print(f"loss {history[0]['loss']:.4f} to {history[-1]['loss']:.4f}; adapter in {folder / 'adapter'}")
    if config.merge:
        merged = _with_adapter(load_lvlm(config.model)[0], folder / "adapter")
        with _whole_folder(folder / "export") as partial:
            merged.save_pretrained(partial)
            processor.save_pretrained(partial)
        print(f"model and processor in {folder / 'export'}")


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """Refuse to go on with pairs that were begun otherwise."""
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    if changed := [name for name in settings if settings[name] != before.get(name)]:
        raise ValueError(
            f"the pairs in {path.parent} were begun with other settings ({', '.join(changed)}); give "
            f"those of {path}, or name another --output"
        )


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write that takes the place of another when the block ends well."""
    partial = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
        yield partial
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors makes its files private
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _validate(config: Any, folder: Path) -> None:
    """Print what a model invents and leaves out before and after, on fresh scenes."""
    options: ValidateOptions = config.validate
    plain, processor = load_lvlm(config.model)
    models = {"before": plain, "after": _with_adapter(load_lvlm(config.model)[0], folder / "adapter")}
    print(f"{'scenes':10s}{'':8s}" + "".join(f"{title:>10s}" for title in MEASURES.values()))
    for distribution in options.distributions:
        for title, model in models.items():
            rows = [
                _measure(model, processor, list(ShapesWorld(distribution, seed, options.size)))
                for seed in options.seeds
            ]
            means = "".join(f"{sum(row[key] for row in rows) / len(rows):10.3f}" for key in MEASURES)
            print(f"{distribution:10s}{title:8s}{means}", flush=True)


def _measure(model: Any, processor: Any, scenes: Sequence[Sample]) -> dict[str, float]:
    """CHAIR of captions and POPE of answers, both greedy."""
    said = describe(model, processor, scenes, shapes_synonyms())
    both = Hallucination.of(said, ask(model, processor, scenes))
    return {
        key: said["mentions"] / said["captions"] if key == "mentions" else getattr(both, key)
        for key in MEASURES
    }


def _parse(arguments: Sequence[str]) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog="train.sentinel", description="Learn not to go on with what is invented.")
    parser.add_argument("verb", choices=["pairs", "fit", "validate"], help="what to do")
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options")
    parser.add_argument("--output", type=str, default="runs/sentinel", help="folder of the run")
    parser.add_argument("--model", type=str, default="embedded", help="embedded, or of transformers")
    parser.add_argument("--resume", type=bool, default=False, help="go on from the last checkpoint")
    parser.add_argument("--merge", type=bool, default=False, help="write the whole model too")
    parts = {"pairs": PairOptions, "tune": TuneOptions, "validate": ValidateOptions}
    for name, options in parts.items():
        parser.add_class_arguments(options, name)
    config = parser.parse_args(list(arguments))
    for name, options in parts.items():
        config[name] = options(**config[name].as_dict())
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.sentinel", _run, arguments)


if __name__ == "__main__":
    sys.exit(main())
