"""`visionsel models`: the backbones and their releases."""

import argparse
import json
from typing import Any

from visionsel.cli_text import add_markdown, add_verb, check_form, print_table
from visionsel.names import near

__all__ = ["add_models", "list_releases"]


def add_models(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `models` to the command; `common` has the options of every verb."""
    models = add_verb(
        verbs,
        "models",
        common,
        "list the backbones and their releases",
        "visionsel models",
        "visionsel models 'dinat_*' --json",
        "visionsel models 'nat_*' --markdown",
    )
    models.add_argument(
        "pattern", nargs="?", default="*", help="names to list, with wildcards (default: all)"
    )
    add_markdown(models)
    models.set_defaults(run=_models)


def _models(options: argparse.Namespace) -> None:
    check_form(options)
    rows = list_releases(options.pattern)
    if not rows:
        from visionsel.models import registered_names

        raise ValueError(
            f"no visionsel model matches {options.pattern!r}{near(options.pattern, registered_names())}; "
            "'visionsel models' lists all"
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["model", "parameters", "input", "classes", "weights"],
        [
            [
                row["model"],
                f"{row['parameters'] / 1e6:.1f} M",
                "x".join(map(str, row["input_size"])),
                str(row["num_classes"]),
                row["weights"] or "-",
            ]
            for row in rows
        ],
        options.markdown,
    )


def list_releases(pattern: str = "*") -> list[dict[str, Any]]:
    """One dict for each model and release that match a pattern: name, size, input, licence, weights."""
    import timm

    from visionsel.models import registered_names

    rows = []
    for name in registered_names(pattern):
        for tagged in timm.list_models(f"{name}.*", include_tags=True) or [name]:
            cfg = timm.get_pretrained_cfg(tagged)
            assert cfg is not None  # every model of ours has one
            model = timm.create_model(tagged, device="meta")  # a tag may change the architecture
            parameters = sum(p.numel() for p in model.parameters())
            rows.append(
                {
                    "model": tagged,
                    "parameters": parameters,
                    "input_size": list(cfg.input_size),
                    "num_classes": cfg.num_classes,
                    "license": cfg.license,
                    "weights": cfg.url or cfg.hf_hub_id or "",
                }
            )
    return rows
