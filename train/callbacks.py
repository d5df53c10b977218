"""Callbacks for the Lightning programs; none of them changes a loss.

    trainer:
      callbacks:
        - class_path: train.callbacks.FeaturePictures
          init_args: {images: 2, query: [0.5, 0.5]}
        - class_path: train.callbacks.PredictionPictures  # of train.segmentation
        - class_path: train.callbacks.Throughput

Pictures show what layers get and give while the run validates; no image goes through the network for them.
They are written to `OUTPUT/logs/version_N/pictures/` and shown by TensorBoard.
"""

from train.callbacks_pictures import FeaturePictures, PredictionPictures
from train.callbacks_throughput import Throughput

__all__ = ["FeaturePictures", "PredictionPictures", "Throughput"]
