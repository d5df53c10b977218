"""What every registered model owes to timm and to the people who use it, on small members of each family."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import visionsel
from tests.test_structure import EXPECTED_NAMES
from visionsel.export import export_onnx, export_program, onnx_function

# one small member of each family and of each architecture that a tag or a mixer makes different
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "biformer": ("biformer_tiny", {"embed_dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1)}),
    "biformer_stl": ("biformer_stl", {"embed_dims": (32, 64, 96, 128), "depths": (1, 1, 1, 1)}),
    "nat": ("nat_mini", {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}),
    "dinat": (
        "dinat_mini",
        {
            "embed_dim": 32,
            "depths": (2, 2, 2, 1),
            "num_heads": (1, 2, 4, 8),
            "dilations": ((1, 8), (1, 4), (1, 2), (1,)),
        },
    ),
    "dinat_s": (
        "dinat_s_tiny",
        {
            "embed_dim": 32,
            "depths": (2, 2, 2, 1),
            "num_heads": (1, 2, 4, 8),
            "dilations": ((1, 8), (1, 4), (1, 2), (1,)),
        },
    ),
    "halonet": ("halonet_h0_256", {}),
    "focalnet_iso": ("focalnet_tiny_iso_16", {"embed_dim": 48, "depth": 3}),
    "selectformer": ("selectformer_nano", {"depths": (2, 2, 2, 1)}),
    "selectformer_halo": ("selectformer_nano", {"depths": (1, 1, 1, 1), "mixers": ("halo",) * 4}),
}


def build(family: str, **kwargs: Any) -> nn.Module:
    name, small = SMALL[family]
    torch.manual_seed(0)
    return timm.create_model(name, **{**small, **kwargs})


@pytest.fixture(params=SMALL)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_registered_name_has_a_configuration_that_a_user_needs() -> None:
    for name in EXPECTED_NAMES:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None, name
        for tagged in timm.list_models(f"{name}.*", include_tags=True) or [name]:
            cfg = timm.get_pretrained_cfg(tagged)
            assert cfg.license, tagged
            assert len(cfg.mean) == len(cfg.std) == 3, tagged
            assert cfg.classifier == "head.fc", tagged


def test_logits_do_not_depend_on_the_rest_of_the_batch(family: str) -> None:
    model = build(family).eval()
    images = torch.randn(3, 3, 96, 128)
    with torch.inference_mode():
        together = model(images)
        for i, image in enumerate(images):
            torch.testing.assert_close(model(image[None])[0], together[i], rtol=1e-4, atol=1e-5)
        shuffled = model(images[[2, 0, 1]])
    torch.testing.assert_close(shuffled, together[[2, 0, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (224, 160)])
def test_any_image_size_runs_and_stages_are_nchw(family: str, size: tuple[int, int]) -> None:
    model = build(family).eval()
    with torch.inference_mode():
        final, maps = model.forward_intermediates(torch.randn(1, 3, *size))
        assert torch.isfinite(final).all()
    for feature, info in zip(maps, model.feature_info, strict=True):
        assert feature.shape[1] == info["num_chs"]
        for side, given in zip(feature.shape[2:], size, strict=True):
            assert abs(side - given / info["reduction"]) <= 1


def test_features_only_equals_the_intermediates(family: str) -> None:
    model = build(family).eval()
    backbone = build(family, features_only=True).eval()
    image = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        maps = model.forward_intermediates(image, intermediates_only=True)
        features = backbone(image)
    assert [f.shape for f in features] == [m.shape for m in maps]
    for feature, expected in zip(features, maps, strict=True):
        torch.testing.assert_close(feature, expected)


def test_pruning_to_an_intermediate_keeps_its_values(family: str) -> None:
    model = build(family).eval()
    image = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        expected = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
        parameters = sum(p.numel() for p in model.parameters())
        assert list(model.prune_intermediate_layers([0, 1])) == [0, 1]
        pruned = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
        assert model(image).shape[1] == model.num_features
    assert sum(p.numel() for p in model.parameters()) < parameters
    for a, b in zip(pruned, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_training_reaches_every_parameter_and_checkpointing_changes_no_gradient(family: str) -> None:
    image = torch.randn(2, 3, 64, 96)
    gradients = []
    for checkpointing in (False, True):
        model = build(family).train()
        model.set_grad_checkpointing(checkpointing)
        model(image).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_bfloat16_autocast_stays_close(family: str) -> None:
    model = build(family).eval()
    image = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(image), pre_logits=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.forward_head(model.forward_features(image), pre_logits=True)
    assert torch.isfinite(out).all()
    assert nn.functional.cosine_similarity(out.float(), expected).min() > 0.98


def test_half_precision_and_meta_construction_thread_through(family: str) -> None:
    model = build(family, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    meta = build(family, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    assert {k: v.shape for k, v in meta.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


# A translation of the graph takes seconds a block: one of each kind, and a downsampling.
FEW_BLOCKS: dict[str, dict[str, Any]] = {
    "biformer": {"embed_dims": (32, 64), "depths": (1, 1), "topks": (1, -1)},
    "biformer_stl": {"embed_dims": (32, 64), "depths": (0, 1), "topks": (1, -1)},
    "nat": {"depths": (0, 1), "num_heads": (1, 2)},
    "dinat": {"depths": (1, 0), "num_heads": (1, 2), "dilations": ((8,), ())},
    "dinat_s": {"depths": (0, 1), "num_heads": (1, 2), "dilations": ((), (2,))},
    "halonet": {"depths": (1, 1), "num_heads": (2, 2)},
    "focalnet_iso": {"depth": 2},
    "selectformer": {"depths": (1, 0, 1, 1)},
    "selectformer_halo": {"depths": (1, 0, 0, 1)},
}


@pytest.mark.slow
def test_compiled_without_graph_breaks_it_gives_the_same_and_serves_every_size(family: str) -> None:
    torch._dynamo.reset()  # other families' compilations of shared code count towards its limit
    model = build(family, **FEW_BLOCKS[family]).eval()
    graphs: list[torch.fx.GraphModule] = []  # a first image may be traced twice

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    # symbolic sizes take half a minute; the layers of three families are those of others
    dynamic = family not in ("biformer_stl", "dinat", "selectformer_halo")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=keep)
    counts = []
    # numbers of 0 and 1, and those that are equal, are constants to the compiler
    for size in ((2, 3, 192, 256), (3, 3, 161, 195))[: 1 + dynamic]:
        image = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
        counts.append(len(graphs))
    assert counts[0] == counts[-1]


class FromTheHost(TorchDispatchMode):
    """Names of the operators that take or give numbers of the CPU, or ask the device for one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        asks = "local_scalar" in str(function) or "nonzero" in str(function)
        if asks or any(x.device.type == "cpu" and x.numel() for x in tensors):
            self.names.append(str(function))
        return out


def test_after_the_first_call_nothing_is_copied_from_the_host(family: str) -> None:
    """As a CUDA graph needs it; tensors without numbers stand for those of a GPU."""
    model = build(family).eval().to("meta")
    image = torch.randn(2, 3, 96, 128, device="meta")
    with torch.no_grad():
        model(image)  # builds index tables, which are kept
        with FromTheHost() as seen:
            model(image)
        assert seen.names == []
        with FromTheHost() as seen:
            model(torch.zeros(2, 3, 96, 128).to("meta"))
        assert seen.names == ["aten.zeros.default", "aten._to_copy.default"]


@pytest.mark.gpu
def test_a_cuda_graph_replays_what_the_model_computes(family: str) -> None:
    model = build(family).eval().cuda()
    image = torch.randn(2, 3, 96, 128, device="cuda")
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # index tables are built by the first call, and kept
                model(image)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            out = model(image)
        for _ in range(2):
            image.copy_(torch.randn_like(image))
            graph.replay()
            torch.testing.assert_close(out, model(image), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_exported_once_as_program_and_as_onnx_it_serves_every_batch_and_size(
    family: str, tmp_path: Path
) -> None:
    model = build(family, **FEW_BLOCKS[family])
    size, shapes = (96, 128), [(1, 3, 64, 64), (3, 3, 97, 131), (2, 3, 224, 160), (1, 3, 448, 512)]
    if family == "selectformer":  # a window of bilevel routing of one column would be traced as a constant
        size, shapes = (192, 256), [(1, 3, 128, 128), (3, 3, 161, 195), (2, 3, 224, 160)]
    program = export_program(model, size)
    with torch.no_grad():
        for shape in shapes:
            image = torch.randn(shape)
            torch.testing.assert_close(program.module()(image), model(image), rtol=0, atol=1e-5)
        export_onnx(program, tmp_path / "model.onnx")
        run = onnx_function(tmp_path / "model.onnx")
        for shape in shapes[1:3]:
            image = torch.randn(shape)
            torch.testing.assert_close(run(image), model(image), rtol=0, atol=1e-4)


def test_saved_in_the_hub_layout_it_comes_back_equal(family: str, tmp_path: Path) -> None:
    model = build(family, num_classes=7).eval()
    small = SMALL[family][1]
    save_for_hf(model, tmp_path, model_args=small, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **small).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


def test_its_own_state_dict_loads_through_timm_with_other_channels_and_classes(
    family: str, tmp_path: Path
) -> None:
    model = build(family)
    file = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, file)
    loaded = build(
        family, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, num_classes=5, in_chans=1
    )
    ours, theirs = loaded.state_dict(), model.state_dict()
    fresh = {"head.fc.weight", "head.fc.bias", f"{loaded.default_cfg['first_conv']}.weight"}
    for key in set(ours) - fresh:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert loaded(torch.randn(2, 1, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_foreign_or_truncated_checkpoint_is_refused(family: str, damage: str, tmp_path: Path) -> None:
    state = build(family).state_dict()
    if damage == "truncated":
        state = dict(list(state.items())[: len(state) // 2])
    else:
        state = {f"encoder.layer.{i}.weight": torch.zeros(3) for i in range(5)}
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    with pytest.raises(
        (RuntimeError, ValueError, KeyError), match=r"(?i)missing|unexpected|not|lack|foreign"
    ):
        build(family, pretrained=True, pretrained_cfg_overlay={"file": str(file)})


def test_layer_decay_groups_cover_every_parameter_in_order_of_depth(family: str) -> None:
    from timm.optim import param_groups_layer_decay

    model = build(family)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    head = scales[id(model.get_classifier().weight)]
    stem = scales[id(dict(model.named_parameters())[f"{model.default_cfg['first_conv']}.weight"])]
    assert stem < head == 1.0
    assert all(name in dict(model.named_parameters()) for name in model.no_weight_decay())


def test_an_unknown_mixer_is_named_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match="unknown mixer 'window'; choose from neighborhood, bilevel, halo, focal"
    ):
        timm.create_model("selectformer_nano", mixers=("window", "neighborhood", "bilevel", "focal"))
    with pytest.raises(ValueError, match="mixers needs four entries"):
        timm.create_model("selectformer_nano", mixers="focal")


@pytest.mark.parametrize("mixer", ["neighborhood", "bilevel", "halo", "focal"])
def test_each_mixer_serves_every_stage(mixer: str) -> None:
    model = timm.create_model("selectformer_nano", depths=(1, 1, 1, 1), mixers=(mixer,) * 4, num_classes=3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_importing_costs_little_more_than_timm() -> None:
    code = "import sys, {0}; print(len(sys.modules))"
    counts = [
        int(
            subprocess.run(
                [sys.executable, "-c", code.format(m)], capture_output=True, text=True, check=True
            ).stdout
        )
        for m in ("timm", "timm, visionsel")
    ]
    assert counts[1] - counts[0] < 60  # modules loaded, which time follows; no test asserts a time
    assert visionsel.__version__
