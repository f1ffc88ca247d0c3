"""IntervalCache and, through it, the executor: conformance, exactness, what it keeps."""

from __future__ import annotations

import pytest
import torch

from accel.denoiser import denoisers
from accel.method import FallbackWarning, NoEffectWarning, attached
from accel.patch import Patch
from accel.testing import assert_equal, checks, conform, tiny
from caches.interval import IntervalCache

MODULES = IntervalCache(2, order=1)
BLOCKS = IntervalCache(2, parts="blocks")
OUTPUT = IntervalCache(2, parts="output", order=1)
DEEP = IntervalCache(2, parts="deep")
TRANSFORMERS = ["dit", "pixart", "flux", "wan", "wan22", "cogvideox", "hunyuanvideo", "ltx", "sd3"]
UNETS = ["ddpm", "ddim", "sd", "sd-img2img", "sdxl"]


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize(
    ("method", "pipeline"), [(MODULES, "dit"), (OUTPUT, "flux"), (DEEP, "sd")], ids=str
)
def test_conformance(check, method, pipeline):
    conform(check, method, pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize(
    ("method", "pipeline"),
    [(m, p) for p in TRANSFORMERS for m in (MODULES, BLOCKS, OUTPUT)]
    + [(m, p) for p in UNETS for m in (DEEP, OUTPUT)],
    ids=str,
)
def test_conformance_matrix(check, method, pipeline):
    conform(check, method, pipeline)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IntervalCache(0), "interval"),
        (lambda: IntervalCache(warmup=0), "warmup"),
        (lambda: IntervalCache(order=-1), "order"),
        (lambda: IntervalCache(parts="ff"), "parts"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(("method", "pipeline"), [(BLOCKS, "sd"), (DEEP, "dit")])
def test_parts_of_another_kind_of_network_are_refused(method, pipeline):
    with pytest.raises(ValueError, match="cannot go on"):
        method.attach(tiny(pipeline).pipe)


def _computed(method, host, column):
    """How often a column's module is really computed under the method, and the report."""
    slot, _, path = column.partition(".")
    module = getattr(host.pipe, slot)
    seen = []

    def look(call_next, *args, **kwargs):
        seen.append(1)
        return call_next(*args, **kwargs)

    patch = Patch()
    patch.around_call(module.get_submodule(path) if path else module, look)
    with attached(method, host.pipe) as live:
        host.run(num_inference_steps=6)
        report = live.report()["runs"][0]
    patch.undo()
    return len(seen), report


def test_feed_forwards_in_chunks_are_refused():
    host = tiny("pixart")
    for block in host.pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(4, 1)
    with pytest.raises(ValueError, match="in chunks"):
        IntervalCache(2).attach(host.pipe)
    plain = host.run()
    with attached(IntervalCache(1, parts="output"), host.pipe):
        assert_equal(plain, host.run(), "the whole network may be kept")


@pytest.mark.parametrize("pipeline", ["dit", "pixart", "flux", "wan", "sd3", "cogvideox", "ltx"])
def test_modules_run_only_at_their_steps(pipeline):
    host = tiny(pipeline)
    (denoiser,) = denoisers(host.pipe)
    first = f"{denoiser.slot}.{denoiser.blocks[0].self_attn}"
    plain, _ = _computed(IntervalCache(1), host, first)
    cached, report = _computed(IntervalCache(3), tiny(pipeline), first)
    assert cached == plain / 3  # steps 0 and 3 of 6
    assert report["computed"] == report["reused"] / 2
    assert report["fallbacks"] == {}
    assert report["detail"] == {}


def test_the_first_and_last_steps_compute():
    host = tiny("dit")
    _, plain = _computed(IntervalCache(3, parts="output"), host, "transformer")
    _, report = _computed(IntervalCache(3, 2, 2, parts="output"), tiny("dit"), "transformer")
    assert plain["computed"] == 2  # steps 0 and 3 of 6
    assert report["computed"] == 4  # 0 and 1; 4, which is due; 5


def test_one_stage_solvers_and_heun_alike():
    """Heun's second stage repeats its own last output, not the first stage's."""
    from diffusers import HeunDiscreteScheduler

    host = tiny("sd")
    host.pipe.scheduler = HeunDiscreteScheduler.from_config(host.pipe.scheduler.config)
    computed, report = _computed(IntervalCache(2, parts="output"), host, "unet")
    calls = 2 * 6 - 1
    assert report["calls"] == calls
    # steps 0, 2, 4 compute both stages
    assert report["computed"] == 6 == computed
    assert report["nfe"] == 2 * 6  # rows that the network really saw: two branches
    assert report["reused"] == calls - 6
    assert report["detail"] == {}


def test_a_solver_that_visits_a_noise_level_twice():
    from diffusers import PNDMScheduler

    host = tiny("sd")
    host.pipe.scheduler = PNDMScheduler.from_config(host.pipe.scheduler.config, skip_prk_steps=True)
    host.pipe.scheduler.set_timesteps(6)
    assert len(set(host.pipe.scheduler.timesteps.tolist())) < len(host.pipe.scheduler.timesteps)
    _, report = _computed(IntervalCache(2, 3, parts="output", order=2), host, "unet")
    assert report["reused"] > 0
    assert report["fallbacks"] == {}


def test_an_extrapolated_line_is_exact():
    """A network whose output is a line in the noise share is forecast without error."""
    from caches.schedule import noise_share

    host = tiny("dit")
    run = {}

    def line(module, arguments, output):
        level = noise_share(run["sigmas"])[run["step"]]
        return (torch.full_like(output[0], level),) if isinstance(output, tuple) else output

    outputs = {}
    for interval in (1, 3):
        with attached(
            IntervalCache(interval, warmup=2, parts="output", order=1), host.pipe
        ) as live:
            clock = live.clock
            seen = outputs.setdefault(interval, [])

            def step(call_next, model_output, *a, seen=seen, **k):
                seen.append(model_output.clone())
                return call_next(model_output, *a, **k)

            live.patch.around(host.pipe.scheduler, "step", step)

            def layer(call_next, *args, clock=clock, **kwargs):
                out = call_next(*args, **kwargs)
                shares = noise_share(clock.run.sigmas)
                value = torch.full_like(out[0], shares[clock.now.step])
                return (value, *out[1:]) if isinstance(out, tuple) else type(out)(sample=value)

            live._denoiser_layers["transformer"].insert(0, layer)
            host.run(num_inference_steps=8)
            report = live.report()["runs"][0]
    assert report["reused"] == 4  # computes 0, 1, 4, 7
    for exact, forecast in zip(outputs[1], outputs[3], strict=True):
        assert torch.allclose(exact, forecast, atol=1e-6)


def test_a_batch_that_changes_in_a_run_is_computed():
    host = tiny("dit")
    with attached(IntervalCache(2, parts="modules"), host.pipe) as live:
        clock, transformer = live.clock, host.pipe.transformer
        host.pipe.scheduler.set_timesteps(4)
        for step, rows in enumerate((4, 2, 2, 2)):
            x = torch.randn(rows, 4, transformer.config.sample_size, transformer.config.sample_size)
            with clock.at(step):
                transformer(x, timestep=torch.tensor([5]), class_labels=torch.zeros(rows).long())
        clock.end()
        report = live.report()["runs"][0]
    blocks = len(transformer.transformer_blocks)
    assert report["detail"]["forced"] == 2 * blocks  # step 1 wanted to repeat four rows
    assert report["reused"] == 2 * blocks  # step 3


def test_what_is_changed_in_place_is_computed_again():
    host = tiny("dit")
    module = host.pipe.transformer.transformer_blocks[0].ff
    with attached(IntervalCache(2), host.pipe) as live:
        live.patch.around_call(module, lambda nxt, *a, **k: nxt(*a, **k).add_(1e-3))
        with pytest.warns(FallbackWarning, match="changed in place"):
            host.run(num_inference_steps=4)
        assert sum(live.report()["runs"][0]["fallbacks"].values()) > 0


@pytest.mark.parametrize("loaded_first", [False, True])
def test_columns_follow_modules_that_a_lora_replaces(loaded_first):
    """peft puts another module in the place of Flux's projections, and takes it away again."""
    peft = pytest.importorskip("peft")
    host = tiny("flux")
    transformer = host.pipe.transformer
    config = peft.LoraConfig(r=2, target_modules=["proj_mlp", "proj_out"], init_lora_weights=False)
    if loaded_first:
        transformer.add_adapter(config, "a")
    with attached(IntervalCache(2), host.pipe) as live:
        host.run()
        transformer.unload_lora() if loaded_first else transformer.add_adapter(config, "a")
        followed = host.run()
        before, after = live.report()["runs"]
    assert (before["computed"], before["reused"]) == (after["computed"], after["reused"])
    with attached(IntervalCache(2), host.pipe):
        assert_equal(followed, host.run(), "attached to what is there now")


def test_memory_follows_what_is_kept():
    host = tiny("dit")
    peaks = {}
    for order in (0, 1, 2):
        method = IntervalCache(2, warmup=3, parts="output", order=order)
        with attached(method, host.pipe) as live:
            host.run(num_inference_steps=8)
            report = live.report()["runs"][0]
            peaks[order] = report["bytes_host"]
            assert report["bytes_device"] == 0  # of a CPU
    assert peaks[0] > 0
    assert (peaks[1], peaks[2]) == (2 * peaks[0], 3 * peaks[0])


def test_more_warmup_than_steps_costs_nothing():
    """A recipe may ask for any number; a set of so many would not fit in memory."""
    host = tiny("dit")
    method = IntervalCache(2, warmup=10**15, tail=10**15)
    with attached(method, host.pipe) as live, pytest.warns(NoEffectWarning):
        host.run()
    assert live.report()["runs"][0]["reused"] == 0


def test_what_the_first_of_two_denoisers_kept_is_let_go():
    host, held = tiny("wan22"), []
    with attached(IntervalCache(3, order=1), host.pipe) as live:
        live.clock.subscribe(lambda e: held.append({key[0].partition(".")[0] for key in live.kept}))
        host.run(num_inference_steps=6)
    assert {"transformer"} in held
    assert {"transformer_2"} in held
    assert max(map(len, held)) == 1


@pytest.mark.parametrize("interval", [9, 5])
def test_forecasts_keep_their_order_where_a_run_begins_in_the_middle(interval):
    """The plan had two points by then, of which this run has none, or one."""
    host = tiny("sd-img2img")
    method = IntervalCache(interval, warmup=2, parts="output", order=1)
    with attached(method, host.pipe) as live:
        host.run(num_inference_steps=10, strength=0.5)
        report = live.report()["runs"][0]
    assert {steps for steps, _ in live.weights} == {(6, 5)}
    assert (report["computed"], report["reused"]) == (2, 3)  # 5 and 6, of 5 to 9


def test_image_to_image_computes_its_first_call():
    host = tiny("sd-img2img")
    plain = host.run()
    with attached(IntervalCache(1, parts="output"), host.pipe):
        assert_equal(plain, host.run(), "an interval of one")
    with attached(IntervalCache(2, parts="output"), host.pipe) as live:
        host.run()
        report = live.report()["runs"][0]
    assert report["computed"] >= 1
    assert report["fallbacks"] == {}
