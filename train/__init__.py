"""Training with Lightning: `python -m train.classification fit --config configs/digits/biformer.yaml`."""

try:
    import jsonargparse  # noqa: F401
    import lightning  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError(f'training needs {error.name}: pip install "visionsel[train]"') from error
