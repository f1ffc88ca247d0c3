"""TemporalCache: bit-equal everywhere, weights gone and back, what changes is noticed."""

from __future__ import annotations

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from accel.clock import clock_of
from accel.denoiser import denoisers
from accel.method import FallbackWarning, NoEffectWarning, Recipe, attached
from accel.patch import Patch
from accel.settings import Settings
from accel.testing import TINY_NAMES, assert_equal, checks, conform, tiny
from caches.interval import IntervalCache
from caches.native import TaylorSeer
from quant.temporal_cache import PLANS_KEPT, TemporalCache
from samplers.rlg import RLG
from samplers.swap import SwapScheduler
from samplers.time_shift import TimeShift

DISK = TemporalCache(weights="disk")
# kept modules and the weights that they hold, of each tiny model with hold="timestep": the table
# that was made by hand from the classes (time embedders and their projections)
BY_HAND = {
    "ddpm": {"time_embedding", "time_emb_proj"},
    "pixart": {"adaln_single"},
    "wan": {"condition_embedder.time_embedder", "condition_embedder.time_proj"},
    "cogvideox": {"time_embedding", "norm1.linear", "norm2.linear", "norm_out.linear"},
    "ltx": {"time_embed"},
    "flux": {"time_text_embed.timestep_embedder"},
    "sd3": {"time_text_embed.timestep_embedder"},
}


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize(("method", "pipeline"), [(TemporalCache(), "dit"), (DISK, "sd")], ids=str)
def test_conformance(check, method, pipeline):
    conform(check, method, pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", TINY_NAMES)
def test_conformance_matrix(check, pipeline):
    conform(check, DISK, pipeline)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_bit_equal_with_the_weights_gone(name):
    """The weights are NaN while a run is served: an output that used one would be NaN."""
    host = tiny(name)
    plain = host.run()
    before = {d.slot: dict(d.module.state_dict()) for d in denoisers(host.pipe)}
    kept = {s: {k: v.clone() for k, v in d.items()} for s, d in before.items()}
    with attached(DISK, host.pipe) as live:
        assert_equal(plain, host.run(), "the run that is watched")
        assert_equal(plain, host.run(), "the run that is served")
        first, second = live.report()["runs"]
        for d in denoisers(host.pipe):
            gone = [p for p in d.module.parameters() if p.isnan().any()]
            assert sum(p.nbytes for p in gone) > 0
            assert all(p.untyped_storage().nbytes() == p.element_size() for p in gone)
    assert first["fallbacks"] == second["fallbacks"] == {}
    assert second["computed"] == 0
    assert second["reused"] > first["reused"] > 0
    for facts in second["detail"]["denoisers"].values():
        assert facts["moved_bytes"] > 0.9 * facts["weights_bytes"] > 0
        assert facts["watched_calls"] == facts["outside_grid"] == 0
    for d in denoisers(host.pipe):
        for key, value in d.module.state_dict().items():
            assert_equal(kept[d.slot][key], value, f"{key} after detach")


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_found_are_the_modules_that_a_person_would_name(name):
    host = tiny(name)
    with attached(TemporalCache(hold="timestep"), host.pipe) as live:
        host.run()
        (served,) = live.served.values()
        (plan,) = served.plans.values()
    found = set(plan.program.served)
    for wanted in BY_HAND[name]:
        assert any(path.endswith(wanted) for path in found), f"{wanted} is not in {found}"
    assert all(any(path.endswith(w) for w in BY_HAND[name]) for path in found)


@pytest.mark.parametrize("hold", ["timestep", "pooled", "text"])
@pytest.mark.parametrize("name", ["dit", "sd", "flux", "sdxl"])
def test_the_wider_the_more(name, hold):
    host = tiny(name)
    plain = host.run()
    with attached(TemporalCache(hold=hold), host.pipe) as live:
        assert_equal(plain, host.run(), "watched")
        assert_equal(plain, host.run(), "served")
        bytes_of = live.report()["runs"][-1]["detail"]["denoisers"]
    least = {"timestep": 0.01, "pooled": 0.08, "text": 0.08}[hold]
    total = sum(p.nbytes for p in denoisers(host.pipe)[0].module.parameters())
    assert sum(facts["weights_bytes"] for facts in bytes_of.values()) > least * total


def _served_equals_plain(host, calls, method=DISK):
    plain = [host.run(**call) for call in calls]
    with attached(method, host.pipe) as live:
        host.run()
        for call, expected in zip(calls, plain, strict=True):
            assert_equal(expected, host.run(**call), str(call))
    return live.report()["runs"][1:]


def test_another_prompt_is_computed_again():
    runs = _served_equals_plain(tiny("dit"), [{"class_labels": [5]}, {"class_labels": [3]}])
    assert runs[0]["computed"] > 0


def test_another_grid_is_computed_again_and_the_first_one_kept():
    runs = _served_equals_plain(
        tiny("cogvideox"), [{"num_inference_steps": 5}, {"num_inference_steps": 4}]
    )
    assert runs[0]["computed"] > 0
    assert runs[1]["computed"] == 0  # texts are the same, and so is the grid


def test_another_batch_and_size():
    host = tiny("dit")
    runs = _served_equals_plain(host, [{"class_labels": [3, 5]}, {"class_labels": [5, 3]}])
    assert runs[0]["detail"]["denoisers"]["transformer"]["watched_calls"] == 1
    assert runs[1]["detail"]["denoisers"]["transformer"]["watched_calls"] == 0


def test_two_stage_solvers():
    host = tiny("sd")
    host.pipe.scheduler = HeunDiscreteScheduler.from_config(host.pipe.scheduler.config)
    runs = _served_equals_plain(host, [{}])
    assert runs[0]["computed"] == 0


def test_conditions_that_change_in_a_run_are_noticed():
    def brighter(pipe, step, t, tensors):
        tensors["prompt_embeds"].mul_(1.1)  # in place: the same object, other values
        return tensors

    host = tiny("sd")
    calls = {
        "callback_on_step_end": brighter,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    plain = host.run()
    assert not torch.equal(plain, host.run(**calls))
    _served_equals_plain(host, [calls, {}])


def test_guidance_that_ends_in_a_run():
    def without(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    calls = {
        "callback_on_step_end": without,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    runs = _served_equals_plain(tiny("sd"), [calls, calls])
    assert runs[1]["computed"] == 0


def test_a_timestep_off_the_grid_is_computed_or_refused():
    shift = TimeShift(window=200)
    host = tiny("ddim")
    with attached(shift, host.pipe):
        plain = host.run()
    with attached(Recipe((DISK, shift)), host.pipe) as live:
        with pytest.warns(UserWarning, match="not on the sampler's grid"):
            assert_equal(plain, host.run(), "with other times than the grid's")
        report = live.report()["members"][0]["runs"][0]
    assert report["detail"]["denoisers"]["unet"]["outside_grid"] > 0
    with (
        attached(Recipe((TemporalCache(uncalibrated="refuse"), shift)), host.pipe),
        pytest.raises(ValueError, match="not on the grid"),
    ):
        host.run()
    with attached(TemporalCache(uncalibrated="refuse"), host.pipe):
        host.run()  # its own grid


def test_timesteps_off_the_grid_do_not_pile_up(recwarn):
    """Those of the latest run stay for one that asks for the same."""
    host = tiny("ddim")
    with attached(Recipe((TemporalCache(), TimeShift(window=200))), host.pipe) as live:
        (served,) = live.members[0].served.values()
        held = []
        for seed in range(4):
            host.run(generator=torch.Generator().manual_seed(seed))
            held.append({place[1] for plan in served.plans.values() for place in plan.table})
        computed = live.report()["members"][0]["runs"]
        host.run(generator=torch.Generator().manual_seed(seed))
        assert live.report()["members"][0]["runs"][-1]["computed"] == 0 < computed[-1]["computed"]
    assert max(map(len, held)) == len(held[-1])
    assert len(set().union(*held)) > len(held[-1]), "the runs had the same times: nothing to forget"
    assert len([w for w in recwarn if "sampler's grid" in str(w.message)]) == 1


def _table(live):
    facts = live.report()["runs"][-1]["detail"]["denoisers"]["transformer"]
    return facts["table_bytes"], facts["weights_bytes"]


def test_a_table_of_many_grids_is_no_larger_than_the_weights():
    host = tiny("cogvideox")
    with attached(TemporalCache(hold="timestep"), host.pipe) as live:
        host.run(num_inference_steps=4)
        sizes = [_table(live)]
        one = sizes[0][0]
        for steps in range(5, 30):
            host.run(num_inference_steps=steps)
            sizes.append(_table(live))
        served = host.run(num_inference_steps=29)
        assert live.report()["runs"][-1]["computed"] == 0
    assert_equal(host.run(num_inference_steps=29), served, "without the cache")
    assert sum(range(4, 30)) * one / 4 > sizes[0][1], "too few grids to outgrow the weights"
    assert all(table <= weights or table <= 30 * one / 4 for table, weights in sizes)


def test_plans_of_other_batches_are_few_and_go_when_the_table_outgrows_the_weights():
    host, counts = tiny("ddim"), []
    with attached(TemporalCache(), host.pipe) as live:
        (served,) = live.served.values()
        for rows in (*range(1, 12), 1):
            host.run(batch_size=rows, num_inference_steps=4)
            facts = live.report()["runs"][-1]["detail"]["denoisers"]["unet"]
            assert facts["table_bytes"] <= facts["weights_bytes"] or len(served.plans) == 1
            counts.append(len(served.plans))
        last = host.run(batch_size=1, num_inference_steps=4)
        assert live.report()["runs"][-1]["computed"] == 0
    assert max(counts) <= PLANS_KEPT + 1
    assert_equal(host.run(batch_size=1, num_inference_steps=4), last, "without the cache")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_conditions_are_compared_by_value_once_a_run(name, monkeypatch):
    """Each comparison waits for the device; after it the objects are known."""
    compared = []
    equal = torch.equal
    monkeypatch.setattr("quant._table.torch.equal", lambda *x: compared.append(1) or equal(*x))
    host = tiny(name)
    with attached(TemporalCache(), host.pipe) as live:
        for _ in range(3):
            compared.clear()
            tensors = {k: v.clone() for k, v in host.inputs.items() if isinstance(v, torch.Tensor)}
            host.run(**tensors, num_inference_steps=8)
            run = live.report()["runs"][-1]
            seen = len(compared)
    assert run["calls"] >= 8
    assert 0 < seen <= 4 * len(run["branches"])


def test_calls_outside_a_run_use_the_weights():
    host = tiny("dit")
    call = (torch.ones(1, 4, 8, 8),)
    known = {"timestep": torch.tensor([7]), "class_labels": torch.tensor([2])}
    with torch.no_grad():
        plain = host.pipe.transformer(*call, **known).sample
        with attached(DISK, host.pipe):
            host.run()
            assert_equal(plain, host.pipe.transformer(*call, **known).sample, "outside a run")
            with clock_of(host.pipe).at(1):
                assert_equal(plain, host.pipe.transformer(*call, **known).sample, "by hand")
            with pytest.warns(UserWarning, match="sampler's grid"):
                clock_of(host.pipe).end()


def test_what_is_saved_meanwhile_is_whole(tmp_path):
    host = tiny("dit")
    kept = {k: v.clone() for k, v in host.pipe.transformer.state_dict().items()}
    with attached(DISK, host.pipe):
        host.run()
        host.pipe.transformer.save_pretrained(tmp_path)
    again = type(host.pipe.transformer).from_pretrained(tmp_path)
    for key, value in again.state_dict().items():
        assert_equal(kept[key], value, key)


def test_weights_are_whole_after_the_model_was_cast(tmp_path):
    """Casting a model spreads what stands in for a weight to its size."""
    host = tiny("dit")
    model = host.pipe.transformer
    kept = {k: v.to(torch.float64) for k, v in model.state_dict().items()}
    call = (torch.ones(1, 4, 8, 8, dtype=torch.float64),)
    known = {"timestep": torch.tensor([7]), "class_labels": torch.tensor([2])}
    with attached(DISK, host.pipe), torch.no_grad():
        host.run()
        model.to(torch.float64)
        model.save_pretrained(tmp_path)
        outside = model(*call, **known).sample
    again = type(model).from_pretrained(tmp_path, torch_dtype=torch.float64)
    for key, value in again.state_dict().items():
        assert_equal(kept[key], value, key)
    with torch.no_grad():
        assert_equal(model(*call, **known).sample, outside, "outside a run")


@pytest.mark.parametrize("method", [TemporalCache(), DISK], ids=str)
def test_weights_that_others_write_are_used(method):
    host, other = tiny("dit"), tiny("dit", seed=1)
    weights = dict(other.pipe.transformer.named_parameters())
    patch = Patch()

    def swap():
        for name, parameter in host.pipe.transformer.named_parameters():
            patch.write(parameter, weights[name])

    swap()
    swapped = host.run()
    patch.undo()
    plain = host.run()
    with attached(method, host.pipe):
        assert_equal(plain, host.run(), "before")
        swap()
        assert_equal(swapped, host.run(), "weights written while attached")
        patch.undo()
        assert_equal(plain, host.run(), "written back while attached")
    assert_equal(plain, host.run(), "after detach")


def test_an_adapter_that_comes_meanwhile_is_used():
    from peft import LoraConfig

    host = tiny("cogvideox")
    config = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    with attached(DISK, host.pipe):
        plain = host.run()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            host.pipe.transformer.add_adapter(config)
        served = host.run()
        assert_equal(served, host.run(), "again")
        host.pipe.transformer.disable_adapters()
        assert_equal(plain, host.run(), "without it")
        host.pipe.transformer.enable_adapters()
    assert not torch.equal(plain, served)
    assert_equal(host.run(), served, "without the cache")


def test_an_adapter_that_was_fused_and_unloaded_is_used(fuse_and_forget):
    host = tiny("wan")
    with attached(TemporalCache(weights="keep"), host.pipe):
        plain = host.run()
        fuse_and_forget(host.pipe.transformer, "time_proj")
        fused = host.run()
    assert not torch.equal(plain, fused)
    assert_equal(host.run(), fused, "without the cache")


def test_weights_stay_in_place_where_the_disk_is_full(full_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    host = tiny("dit")
    plain = host.run()
    with attached(DISK, host.pipe) as live:
        with full_disk(), pytest.warns(FallbackWarning, match="stay in place"):
            assert_equal(plain, host.run(), "where there is no room")
        assert_equal(plain, host.run(), "with the table")
        assert live.report()["effect"] == "some"
    assert_equal(plain, host.run(), "after detach")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_change_within_a_run_are_refused():
    host = tiny("dit")
    with attached(TemporalCache(), host.pipe), pytest.raises(ValueError, match="leave one"):
        RLG(adapter="any").attach(host.pipe)


def test_blocks_compiled_one_by_one_keep_what_is_in_them():
    host = tiny("cogvideox")
    plain = host.run()
    for block in host.pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    with attached(DISK, host.pipe) as live:
        assert_equal(plain, host.run(), "watched")
        assert_equal(plain, host.run(), "served")
        (served,) = live.served.values()
        (plan,) = served.plans.values()
    assert set(plan.program.served) == {
        "time_embedding",
        "norm_out.linear",
        "patch_embed.text_proj",
    }


def test_one_graph_hides_everything():
    host = tiny("dit")
    plain = host.run()
    host.pipe.transformer.compile(backend="eager")
    with attached(DISK, host.pipe), pytest.warns(UserWarning, match="TemporalCache") as warned:
        assert_equal(plain, host.run(), "compiled")
    assert [w.category for w in warned] == [FallbackWarning, NoEffectWarning]
    assert "one graph" in str(warned[0].message)


def test_offloaded_models_keep_their_weights():
    from accelerate import cpu_offload_with_hook

    host = tiny("dit")
    plain = host.run()
    cpu_offload_with_hook(host.pipe.transformer, torch.device("cpu"))
    with attached(DISK, host.pipe) as live:
        assert_equal(plain, host.run(), "offloaded")
        assert_equal(plain, host.run(), "offloaded, served")
    facts = live.report()["runs"][-1]["detail"]["denoisers"]["transformer"]
    assert facts["moved_bytes"] == 0 < facts["weights_bytes"]


def test_a_table_larger_than_its_weights_is_not_kept():
    host = tiny("pixart")
    with attached(TemporalCache(largest=1e-6), host.pipe), pytest.warns(match="changed nothing"):
        host.run()


def test_bad_settings():
    with pytest.raises(ValueError, match="largest"):
        TemporalCache(largest=0.0)
    with pytest.raises(ValueError, match="hold"):
        TemporalCache(hold="prompt")


@pytest.mark.parametrize(
    "others",
    [
        (TaylorSeer(interval=2, warmup=2),),
        (IntervalCache(2, order=1, parts="modules"),),
        (IntervalCache(2, order=1, parts="output"),),
        (
            SwapScheduler("DPMSolverMultistepScheduler", Settings(timestep_spacing="trailing"), 5),
            IntervalCache(2, parts="blocks"),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False])
def test_composes_with_caches_and_solvers(others, first):
    host = tiny("dit")
    with attached(Recipe(others), host.pipe):
        plain = host.run(num_inference_steps=6)
    recipe = Recipe((DISK, *others) if first else (*others, DISK))
    with attached(recipe, host.pipe) as live:
        for _ in range(2):
            assert_equal(plain, host.run(num_inference_steps=6), str(recipe))
    assert all(member["effect"] == "some" for member in live.report()["members"])
