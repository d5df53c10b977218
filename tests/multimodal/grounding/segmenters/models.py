"""Tiny SAMs with random weights: segment_anything's, the same in transformers, SAM-HQ, SAM 2 and SAM 3."""

import re
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as tf
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig, Sam2VisionConfig
from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor
from transformers.models.sam3.configuration_sam3 import Sam3VisionConfig, Sam3ViTConfig
from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

SIDE, PATCH, DIM = 64, 16, 32
DECODER = {
    "hidden_size": DIM,
    "mlp_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "iou_head_depth": 3,
    "iou_head_hidden_dim": 32,
}
# names of segment_anything -> names of transformers, in this order
NAMES = [
    (r"image_encoder\.blocks", "vision_encoder.layers"),
    (r"image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj", "patch_embed.projection"),
    (r"neck\.0", "neck.conv1"),
    (r"neck\.1", "neck.layer_norm1"),
    (r"neck\.2", "neck.conv2"),
    (r"neck\.3", "neck.layer_norm2"),
    (r"\.norm", ".layer_norm"),
    (r"mask_downscaling\.0", "mask_embed.conv1"),
    (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"),
    (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"),
    (r"point_embeddings", "point_embed"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"(mlps\.\d+|prediction_head)\.layers\.0", r"\1.proj_in"),
    (r"(mlps\.\d+|prediction_head)\.layers\.2", r"\1.proj_out"),
    (r"(mlps\.\d+|prediction_head)\.layers\.1", r"\1.layers.0"),
]


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def shaken(model: nn.Module) -> Any:
    """In evaluation mode, with no parameter at a constant that it starts from."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def sam() -> Any:
    torch.manual_seed(0)
    grid = (SIDE // PATCH, SIDE // PATCH)
    encoder = ImageEncoderViT(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        out_chans=DIM,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=(1,),
        window_size=2,
    )
    decoder = MaskDecoder(
        transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, mlp_dim=32, num_heads=4),
        transformer_dim=DIM,
        iou_head_hidden_dim=32,
    )
    return shaken(Sam(encoder, PromptEncoder(DIM, grid, (SIDE, SIDE), mask_in_chans=8), decoder))


def hf_sam(source: Any, kind: str = "Sam") -> Any:
    """A tiny `SamModel` with the weights of a `Sam`, or a `SamHQModel` with its own."""
    vision = {
        "hidden_size": 24,
        "output_channels": DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "mlp_dim": 48,
        "global_attn_indexes": [1],
        "window_size": 2,
        "num_pos_feats": DIM // 2,
    }
    prompt = {"hidden_size": DIM, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": 8}
    decoder = DECODER | ({"vit_dim": 24} if kind == "SamHQ" else {})
    config = getattr(tf, f"{kind}Config")(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    torch.manual_seed(0)
    model = getattr(tf, f"{kind}Model")(config)
    if source is None:
        return shaken(model)
    state = {}
    for name, value in source.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    state["shared_image_embedding.positional_embedding"] = state[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    model.load_state_dict(state)
    return model.eval()


def sam2() -> Any:
    tower = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[128, 128],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_positional_embedding_background_size=[4, 4],
        window_size_per_stage=[8, 4, 4, 4],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=tower,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=DIM,
    )
    prompt = {"hidden_size": DIM, "image_size": 128, "patch_size": 16, "mask_input_channels": 8}
    torch.manual_seed(0)
    config = tf.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)
    return shaken(tf.Sam2Model(config))


def sam3() -> Any:
    tower = Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=7,
        window_size=4,
        global_attn_indexes=[1],
        pretrain_image_size=28,
    )
    vision = Sam3VisionConfig(
        backbone_config=tower, fpn_hidden_size=DIM, backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]]
    )
    prompt = {"hidden_size": DIM, "image_size": 56, "patch_size": 7, "mask_input_channels": 8}
    torch.manual_seed(0)
    config = tf.Sam3TrackerConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER
    )
    return shaken(tf.Sam3TrackerModel(config))


def sam2_processor() -> Any:
    return tf.Sam2Processor(Sam2ImageProcessor(size={"height": 128, "width": 128}))


def sam3_processor() -> Any:
    return tf.Sam3TrackerProcessor(Sam3ImageProcessor(size={"height": 56, "width": 56}))


def sam_hq_processor() -> Any:
    square = {"height": SIDE, "width": SIDE}
    images = tf.SamImageProcessor(size={"longest_edge": SIDE}, pad_size=square)
    return tf.SamHQProcessor(images)
