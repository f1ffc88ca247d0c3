"""The table of model classes against what really runs inside stock pipelines."""

import functools
import gc
import inspect
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from torch import nn

from accel.denoiser import (
    Anatomy,
    Block,
    Denoiser,
    chunked_feed_forward,
    denoisers,
    register,
)
from accel.tiny import TEXT, TINY_NAMES, TinyPipeline, tiny

# The grid at the denoiser's input, known from the pixel size asked for.
GRIDS = {
    "ddpm": (1, 8, 12),
    "ddim": (1, 8, 12),
    "sd": (1, 8, 12),
    "sd-img2img": (1, 8, 12),
    "sdxl": (1, 8, 12),
    "sd3": (1, 4, 6),
    "dit": (1, 4, 4),
    "pixart": (1, 4, 6),
    "flux": (1, 4, 6),
    "wan": (3, 2, 4),
    "wan22": (3, 2, 4),
    "cogvideox": (3, 2, 4),
    "hunyuanvideo": (3, 2, 4),
    "ltx": (3, 2, 4),
}
TEXT_FIRST, TEXT_LAST = ("flux", "cogvideox"), ("sd3", "hunyuanvideo")
CLASSES = {
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
}


class Recorded:
    """First call of every module of a denoiser in a real pipeline run, and the running order."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.order: list[str] = []
        self.inputs: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, Any] = {}
        for path, module in denoiser.module.named_modules():
            before, after = functools.partial(self._in, path), functools.partial(self._out, path)
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after)

    def _in(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if path not in self.inputs:
            self.order.append(path)
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
            self.inputs[path] = {k: v for k, v in bound.arguments.items() if k != "self"}

    def _out(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.setdefault(path, output)

    @property
    def call(self) -> dict[str, Any]:
        return self.inputs[""]


@functools.cache
def recorded(name: str) -> tuple[TinyPipeline, tuple[Recorded, ...]]:
    made = tiny(name)
    records = tuple(Recorded(d) for d in denoisers(made.pipe))
    made.run()
    return made, records


def each(name: str) -> Iterator[tuple[Recorded, Denoiser, Block]]:
    for record in recorded(name)[1]:
        for block in record.denoiser.blocks:
            yield record, record.denoiser, block


def is_stage(block: Block) -> bool:
    return block.kind in ("unet.down", "unet.mid", "unet.up")


every_pipeline = pytest.mark.parametrize("name", TINY_NAMES)


def test_the_tiny_pipelines_cover_the_table() -> None:
    assert {r.denoiser.cls for name in TINY_NAMES for r in recorded(name)[1]} == CLASSES


def test_slots() -> None:
    assert [r.denoiser.slot for r in recorded("wan22")[1]] == ["transformer", "transformer_2"]
    assert [r.denoiser.slot for r in recorded("sd")[1]] == ["unet"]


@every_pipeline
def test_attentions_and_feed_forwards_are_listed_once_and_completely(name: str) -> None:
    for record in recorded(name)[1]:
        blocks = record.denoiser.blocks
        # Hunyuan's text refiner runs before the blocks, on text alone.
        inside = [
            (path, module)
            for path, module in record.denoiser.module.named_modules()
            if not path.startswith("context_embedder")
        ]
        listed = [p for b in blocks for p in (b.self_attn, b.self_attn_2, b.cross_attn) if p]
        assert sorted(listed) == sorted(path for path, m in inside if hasattr(m, "to_q"))
        listed = [path for b in blocks for path in b.ff]
        ff = [path for path, m in inside if type(m).__name__ == "FeedForward"]
        single = [b.path for b in blocks if b.kind == "single"]
        ff += [f"{path}.{layer}" for path in single for layer in ("proj_mlp", "proj_out")]
        assert sorted(listed) == sorted(ff)


@every_pipeline
def test_blocks_come_in_running_order(name: str) -> None:
    for record in recorded(name)[1]:
        paths = [block.path for block in record.denoiser.blocks]
        assert paths == [path for path in record.order if path in set(paths)]
        ff = [path for block in record.denoiser.blocks for path in block.ff]
        assert ff == [path for path in record.order if path in set(ff)]


@every_pipeline
def test_self_attention_sees_grid_and_text(name: str) -> None:
    checked = 0
    for record, denoiser, block in each(name):
        if block.self_attn is None:
            continue
        call = record.call
        tokens = math.prod(denoiser.grid((), call, block.path))
        if denoiser.text_span((), call) is not None:
            tokens += TEXT
        seen = record.inputs[block.self_attn]
        hidden, text = seen["hidden_states"], seen.get("encoder_hidden_states")
        length = math.prod(hidden.shape[2:]) if hidden.ndim == 4 else hidden.shape[1]
        assert length + (0 if text is None else text.shape[1]) == tokens
        checked += 1
    assert checked >= 3


def test_second_self_attention_sees_hidden_tokens_alone() -> None:
    second = [(r, d, b) for r, d, b in each("sd3") if b.self_attn_2]
    assert len(second) == 1
    record, denoiser, block = second[0]
    seen = record.inputs[block.self_attn_2]
    assert seen["hidden_states"].shape[1] == math.prod(denoiser.grid((), record.call))
    assert "encoder_hidden_states" not in seen


@every_pipeline
def test_cross_attention_gets_the_text(name: str) -> None:
    crossed = [(r, b.cross_attn) for r, _, b in each(name) if b.cross_attn]
    with_text = {"sd", "sd-img2img", "sdxl", "pixart", "wan", "wan22", "ltx"}
    assert bool(crossed) == (name in with_text)
    for record, path in crossed:
        assert record.inputs[path]["encoder_hidden_states"].shape[1] == TEXT


@every_pipeline
def test_grid_at_the_input(name: str) -> None:
    for record in recorded(name)[1]:
        denoiser = record.denoiser
        signature = inspect.signature(type(denoiser.module).forward)
        call = signature.bind(denoiser.module, **record.call)
        call.apply_defaults()
        assert denoiser.grid((), record.call) == GRIDS[name]
        assert denoiser.grid(call.args[1:], {}) == GRIDS[name]
        assert denoiser.batch_rows(call.args[1:], {}) == denoiser.batch_rows((), record.call)


@every_pipeline
def test_one_argument_of_a_call_is_replaced(name: str) -> None:
    """By position and by name; all others stay the objects that they are."""
    for record in recorded(name)[1]:
        forward, told = type(record.denoiser.module).forward, object()
        call = inspect.signature(forward).bind(record.denoiser.module, **record.call)
        for args, kwargs in (((), record.call), (call.args[1:], call.kwargs)):
            args, kwargs = record.denoiser.replace(args, kwargs, timestep=told)
            changed = inspect.signature(forward).bind(record.denoiser.module, *args, **kwargs)
            assert changed.arguments["timestep"] is told
            for argument, value in call.arguments.items():
                assert argument == "timestep" or changed.arguments[argument] is value


@pytest.mark.parametrize("name", ["sd3", "pixart", "wan", "cogvideox", "hunyuanvideo"])
def test_tokens_are_in_raster_order_of_the_grid(name: str) -> None:
    """Changing one patch of the input changes one token, at the index that the grid gives it."""
    record = recorded(name)[1][0]
    denoiser = record.denoiser
    frames, height, width = denoiser.grid((), record.call)
    entry = denoiser.blocks[0].path
    f, h, w = frames - 1, height - 1, 1
    sample = record.call["hidden_states"].clone()
    where = [slice(None)] * sample.ndim
    where[-2], where[-1] = slice(2 * h, 2 * h + 2), slice(2 * w, 2 * w + 2)  # patches are 2x2
    if sample.ndim == 5:
        where[1 if name == "cogvideox" else 2] = slice(f, f + 1)
    sample[tuple(where)] += 1.0
    before = record.inputs[entry]["hidden_states"]
    after = first_input(denoiser, entry, {**record.call, "hidden_states": sample})
    changed = (after["hidden_states"] != before).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [(f * height + h) * width + w]


def first_input(denoiser: Denoiser, path: str, call: dict[str, Any]) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []
    module = denoiser.module.get_submodule(path)

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        denoiser.module(**call)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", [*TEXT_FIRST, *TEXT_LAST])
def test_text_span_is_where_the_text_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every block, other text changes the joint queries exactly at the text span."""
    for record, denoiser, block in each(name):
        span = denoiser.text_span((), record.call)
        assert span is not None
        tokens = math.prod(GRIDS[name])
        assert span == (slice(0, TEXT) if name in TEXT_FIRST else slice(tokens, tokens + TEXT))
        module = denoiser.module.get_submodule(block.path)
        call = record.inputs[block.path]
        # Hunyuan's blocks take *args, which bind collects under that name.
        call = {key: value for key, value in call.items() if key not in ("args", "kwargs")}
        other = {**call, "encoder_hidden_states": call["encoder_hidden_states"] + 1.0}
        other["encoder_hidden_states"][..., 0] += 5.0  # a shift alone would not survive the norm
        with queries(monkeypatch) as before, torch.no_grad():
            module(**call)
        with queries(monkeypatch) as after, torch.no_grad():
            module(**other)
        positions = before[0].shape.index(tokens + TEXT)
        rest = [axis for axis in range(4) if axis != positions]
        changed = (before[0] != after[0]).permute(positions, *rest).flatten(1).any(dim=1)
        assert changed.nonzero().flatten().tolist() == list(range(span.start, span.stop))


@contextmanager
def queries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The queries given to the attention kernel."""
    seen: list[torch.Tensor] = []
    stock = nn.functional.scaled_dot_product_attention

    def keep(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.clone())
        return stock(query, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", keep)
        yield seen


@every_pipeline
def test_no_text_span_without_joint_attention(name: str) -> None:
    for record in recorded(name)[1]:
        joint = name in (*TEXT_FIRST, *TEXT_LAST)
        assert (record.denoiser.text_span((), record.call) is not None) == joint


@every_pipeline
def test_output_layout(name: str) -> None:
    for record, denoiser, block in each(name):
        output = record.outputs[block.path]
        grid = denoiser.grid((), record.call, block.path)
        if block.output_layout == ("hidden",):
            parts = {"hidden": output}
        else:
            assert type(output) is tuple
            parts = dict(zip(block.output_layout, output, strict=True))
        if is_stage(block) or block.kind == "unet.attention":
            assert parts["hidden"].ndim == 4
        else:
            assert parts["hidden"].shape[1] == math.prod(grid)
        if "skips" in parts:
            assert type(parts["skips"]) is tuple
            assert torch.equal(parts["skips"][-1], parts["hidden"])
        if "text" in parts:
            dropped = name == "sd3" and block == denoiser.blocks[-1]
            assert parts["text"] is None if dropped else parts["text"].shape[1] == TEXT


@every_pipeline
def test_unet_grid_at_every_level(name: str) -> None:
    for record in recorded(name)[1]:
        if record.denoiser.slot == "unet":
            check_unet_levels(record, dict(record.call))


def check_unet_levels(record: Recorded, call: dict[str, Any]) -> None:
    """Sides at each stage: those its first resnet works on, and those each attention sees."""
    denoiser = record.denoiser
    assert len({denoiser.grid((), call, block.path) for block in denoiser.blocks}) > 1
    for block in denoiser.blocks:
        grid = denoiser.grid((), call, block.path)
        if is_stage(block):
            sides = record.inputs[f"{block.path}.resnets.0"]["input_tensor"].shape[-2:]
        else:
            attention = block.path.partition(".transformer_blocks")[0]
            sides = record.inputs[attention]["hidden_states"].shape[-2:]
        assert grid == (1, *sides), block.path


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", None])
def test_unet_grid_of_odd_sides_and_without_mid_block(padding: int, mid: str | None) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=mid,
        downsample_padding=padding,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=1,
    )
    record = Recorded(denoisers(SimpleNamespace(unet=unet))[0])
    call = {"timestep": 1, "encoder_hidden_states": torch.randn(1, TEXT, 8)}
    call["sample"] = torch.randn(1, 4, 9, 14)
    with torch.no_grad():
        unet(**call)
    check_unet_levels(record, call)
    check_skips(record)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "sd", "sd-img2img", "sdxl"])
def test_skip_concats(name: str) -> None:
    check_skips(recorded(name)[1][0])


def check_skips(record: Recorded) -> None:
    """Every decoder resnet is fed (what ran before it, the last skip not taken yet)."""
    unet, concats = record.denoiser.module, record.denoiser.skip_concats
    skips = [record.outputs["conv_in"]]
    for i in range(len(unet.down_blocks)):
        hidden, added = record.outputs[f"down_blocks.{i}"]
        skips += added
    if unet.mid_block is not None:
        hidden = record.outputs["mid_block"]
    up = [path for path in record.order if path.startswith("up_blocks")]
    assert [c.resnet for c in concats] == [p for p in up if p.split(".")[-2] == "resnets"]
    stage = None
    for concat in concats:
        if concat.up_block != stage:
            hidden = record.outputs[stage] if stage else hidden
            stage = concat.up_block
        fed = record.inputs[concat.resnet]["input_tensor"]
        assert torch.equal(fed[:, : concat.hidden], hidden)
        assert torch.equal(fed[:, concat.hidden :], skips.pop())
        assert fed.shape[1] == concat.hidden + concat.skip
        hidden = record.outputs[concat.resnet]
        attention = concat.resnet.replace("resnets", "attentions")
        if attention in record.outputs:
            output = record.outputs[attention]
            hidden = output[0] if isinstance(output, tuple) else output
    assert not skips


@every_pipeline
def test_only_unets_have_skip_concats(name: str) -> None:
    for record in recorded(name)[1]:
        assert bool(record.denoiser.skip_concats) == (record.denoiser.slot == "unet")


def test_only_cross_attention_is_no_self_attention() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        only_cross_attention=True,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=1,
    )
    first = denoisers(SimpleNamespace(unet=unet))[0].blocks[1]
    assert first.self_attn is None
    assert first.cross_attn == f"{first.path}.attn2"


# Flux: the grid is read from position ids


def flux() -> tuple[Denoiser, dict[str, Any]]:
    record = recorded("flux")[1][0]
    return record.denoiser, dict(record.call)


def ids(height: int, width: int, frame: int = 0) -> torch.Tensor:
    rows = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return torch.cat([torch.full((len(rows), 1), frame), rows], dim=1).float()


def test_flux_tells_sizes_of_equal_area_apart() -> None:
    denoiser, call = flux()
    for height, width in ((4, 6), (6, 4), (2, 12), (24, 1)):
        call["img_ids"] = ids(height, width)
        assert denoiser.grid((), call) == (1, height, width)
    call["img_ids"] = ids(4, 6)[None]  # the deprecated form with a batch axis
    assert denoiser.grid((), call) == (1, 4, 6)


def test_flux_with_a_reference_image() -> None:
    denoiser, call = flux()
    call["hidden_states"] = torch.zeros(1, 48, 16)
    call["img_ids"] = torch.cat([ids(4, 6), ids(4, 6, frame=1)])
    assert denoiser.grid((), call) == (2, 4, 6)
    call["img_ids"] = torch.cat([ids(4, 6), ids(3, 8, frame=1)])
    with pytest.raises(ValueError, match="48 hidden tokens of this FluxTransformer2DModel"):
        denoiser.grid((), call)
    assert denoiser.text_span((), call) == slice(0, TEXT)  # needs no grid


def test_flux_reads_ids_once_a_tensor_and_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, call = flux()
    call["img_ids"] = ids(4, 6)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    for _ in range(3):
        denoiser.grid((), call)
    assert len(reads) == 1
    call["img_ids"] = ids(6, 4)
    denoiser.grid((), call)
    assert len(reads) == 2
    alive = weakref.ref(call.pop("img_ids"))
    gc.collect()
    assert alive() is None


def test_ltx_without_sizes_or_with_condition_tokens() -> None:
    record = recorded("ltx")[1][0]
    call = dict(record.call)
    with pytest.raises(ValueError, match="neither video_coords"):
        record.denoiser.grid((), {**call, "num_frames": None})
    longer = torch.zeros(2, 30, 4)
    with pytest.raises(ValueError, match="30 hidden tokens"):
        record.denoiser.grid((), {**call, "hidden_states": longer})


def test_ltx_with_coordinates() -> None:
    """Seconds and pixels of a video of 3 x 2 x 4 tokens, as its newer pipelines give them."""
    record = recorded("ltx")[1][0]
    call = {k: v for k, v in record.call.items() if k not in ("num_frames", "height", "width")}
    axes = torch.tensor([0.0, 1, 9]) / 25, torch.arange(2) * 32.0, torch.arange(4) * 32.0
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[None].expand(2, -1, -1)
    call |= {"hidden_states": torch.zeros(2, 24, 4), "video_coords": coords}
    assert record.denoiser.grid((), call) == (3, 2, 4)
    assert record.denoiser.grid((), {**call, "num_frames": 1, "height": 1, "width": 1}) == (3, 2, 4)
    frame = coords[..., :8].clone()
    frame[:, 0] = 5 / 25  # a condition in between, which stands first
    call["hidden_states"] = torch.zeros(2, 32, 4)
    with pytest.raises(ValueError, match="32 hidden tokens"):
        record.denoiser.grid((), {**call, "video_coords": torch.cat([frame, coords], dim=2)})


# Which classes are known


def small_wan(cls: type = WanTransformer3DModel) -> Any:
    return cls(
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=2,
    )


def test_unknown_class_is_refused_with_the_known_ones_and_the_way_to_add_one() -> None:
    model = HunyuanDiT2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8
    )
    with pytest.raises(ValueError, match="HunyuanDiT2DModel") as refusal:
        denoisers(SimpleNamespace(transformer=model))
    assert all(name in str(refusal.value) for name in CLASSES)
    assert "accel.denoiser.register('HunyuanDiT2DModel'" in str(refusal.value)


def test_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(ValueError, match="none of unet, transformer, transformer_2"):
        denoisers(SimpleNamespace(unet=None, vae=object()))


def test_register_adds_a_class_and_refuses_a_taken_name() -> None:
    class OneLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
            return self.only(x)

    block = Block("only", "dit", None, None, (), ("hidden",))
    entry = Anatomy(lambda model: (block,), lambda model, call, path: (1, 1, 5), sample="x")
    pipe = SimpleNamespace(transformer=OneLinear())
    register("OneLinear", entry)
    register("OneLinear", entry)  # importing a plugin twice is harmless
    (found,) = denoisers(pipe)
    assert found.blocks == (block,)
    assert found.grid((torch.zeros(3, 5, 4), 0.0), {}) == (1, 1, 5)
    assert found.batch_rows((), {"x": torch.zeros(3, 5, 4), "timestep": 0.0}) == 3
    assert found.text_span((torch.zeros(3, 5, 4), 0.0), {}) is None
    assert found.skip_concats == ()
    with pytest.raises(ValueError, match="WanTransformer3DModel is in the table"):
        register("WanTransformer3DModel", entry)


def test_subclass_is_known_unless_it_has_a_forward_of_its_own() -> None:
    class Sharded(WanTransformer3DModel):
        pass

    class Different(WanTransformer3DModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    (found,) = denoisers(SimpleNamespace(transformer=small_wan(Sharded)))
    assert found.cls == "WanTransformer3DModel"
    assert len(found.blocks) == 2
    with pytest.raises(ValueError, match="Different"):
        denoisers(SimpleNamespace(transformer=small_wan(Different)))


def test_compiled_module_is_seen_through() -> None:
    model = small_wan()
    pipe = SimpleNamespace(transformer=torch.compile(model, backend="eager"))
    assert denoisers(pipe)[0].module is model


def test_unet_stage_of_another_wiring_is_refused() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("AttnSkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnSkipUpBlock2D"),
        norm_num_groups=4,
    )
    (denoiser,) = denoisers(SimpleNamespace(unet=unet))
    for ask in (
        lambda: denoiser.blocks,
        lambda: denoiser.skip_concats,
        lambda: denoiser.grid((torch.zeros(1, 3, 8, 8), 1), {}),
    ):
        with pytest.raises(ValueError, match=r"down_blocks\.0 .*AttnSkipDownBlock2D"):
            ask()


def test_call_that_lacks_an_argument_names_it() -> None:
    denoiser, call = flux()
    del call["hidden_states"]
    with pytest.raises(TypeError, match="hidden_states"):
        denoiser.grid((), call)
    assert type(denoiser.module) is FluxTransformer2DModel


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart"])
def test_chunked_feed_forward(name: str) -> None:
    made = tiny(name)
    (denoiser,) = denoisers(made.pipe)
    assert not chunked_feed_forward(denoiser.module)
    ff = next(block.ff[0] for block in denoiser.blocks if block.ff)
    calls: list[int] = []
    denoiser.module.get_submodule(ff).register_forward_hook(lambda *_: calls.append(1))
    made.run(num_inference_steps=2)
    plain = len(calls)
    for module in denoiser.module.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, dim=1)
    assert chunked_feed_forward(denoiser.module)
    made.run(num_inference_steps=2)
    assert len(calls) >= 8 * plain  # once a token
