"""Schedules inside graphs of torch.compile: the uncompiled result, and no graph too many."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from accel.clock import sampling_grid
from accel.denoiser import denoisers
from accel.method import FallbackWarning, NoEffectWarning, attached
from accel.testing import assert_equal, tiny
from caches._executor import LiveSchedule
from caches.evolution import EvolutionCache
from caches.interval import IntervalCache
from caches.schedule import Schedule, causal, module_columns, to_artifact

STEPS = 6
REPORTED = ("computed", "reused", "skipped", "nfe", "fallbacks")


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def _compile(host, how, backend):
    """The tiny denoiser compiled "whole", or block by block. No graph may break."""
    (denoiser,) = denoisers(host.pipe)
    if how == "whole":
        compiled = torch.compile(denoiser.module, fullgraph=True, backend=backend)
        setattr(host.pipe, denoiser.slot, compiled)
        return
    for block in denoiser.blocks:
        module = denoiser.module.get_submodule(block.path)
        module.compile(fullgraph=True, backend=backend)


def _run(host, method):
    with attached(method, host.pipe) as live:
        output = host.run(num_inference_steps=STEPS)
        (run,) = live.report()["runs"]
    return output, {key: run[key] for key in REPORTED}


# Graphs of an interval schedule: one where all computes, one where nothing does, of every kind of
# block. Kinds differ by class (two in Flux) and by the layout of what comes in (the first of DiT's
# blocks, and of PixArt's; one of Flux's, whose attentions alone see it).
GRAPHS = [
    ("dit", IntervalCache(2, order=1), "whole", 2),
    ("dit", IntervalCache(2, order=1), "blocks", 2 * 2),
    ("sd", IntervalCache(2, parts="deep"), "whole", 2),
]
MORE = [
    ("dit", IntervalCache(2, parts="blocks", order=1), "whole", 2),
    ("pixart", IntervalCache(3), "blocks", 2 * 2),
    ("wan", IntervalCache(3, order=2, warmup=2), "whole", 2),
    ("wan", IntervalCache(2), "blocks", 2),
    ("flux", IntervalCache(2, order=1), "blocks", 2 * 2 + 1),
    ("flux", IntervalCache(2), "whole", 2),
    ("sd3", IntervalCache(2), "whole", 2),
    ("cogvideox", IntervalCache(2), "whole", 2),
    ("hunyuanvideo", IntervalCache(2), "whole", 2),
    ("ltx", IntervalCache(2), "whole", 2),
    ("sd", IntervalCache(2), "whole", 2),
]


@pytest.mark.parametrize(
    ("pipeline", "method", "how", "graphs"),
    GRAPHS + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE],
    ids=str,
)
def test_a_graph_for_each_pattern_and_the_uncompiled_result(pipeline, method, how, graphs):
    expected, report = _run(tiny(pipeline), method)
    host, backend = tiny(pipeline), Counting()
    _compile(host, how, backend)
    found, compiled = _run(host, method)
    assert_equal(expected, found, "compiled")
    assert compiled == report
    assert compiled["reused"] > 0
    assert backend.graphs == graphs


def test_the_output_column_needs_no_graph_of_its_own():
    """All that the network returns is kept outside of its graph, which stays the one it has."""
    method = IntervalCache(2, parts="output", order=1)
    expected, report = _run(tiny("dit"), method)
    host, backend = tiny("dit"), Counting()
    _compile(host, "whole", backend)
    found, compiled = _run(host, method)
    assert_equal(expected, found, "compiled")
    assert compiled == report
    assert backend.graphs == 1


def _learned(host, path, seed=0):
    """A schedule with every pattern of a block, skips among them, as a file."""
    (denoiser,) = denoisers(host.pipe)
    columns, rng = module_columns(denoiser), random.Random(seed)
    rows = ["".join(rng.choice("CRF") for _ in columns) for _ in range(STEPS)]
    host.pipe.scheduler.set_timesteps(STEPS)
    grid = sampling_grid(host.pipe.scheduler)[1]
    schedule = causal(Schedule(columns, tuple(rows)))
    made = to_artifact(schedule, denoiser, method=EvolutionCache.name(), grid=grid)
    return schedule, EvolutionCache(made.save(path))


def test_blocks_share_the_graphs_of_a_learned_schedule(tmp_path):
    schedule, method = _learned(tiny("dit"), tmp_path / "learned.safetensors")
    patterns = {
        (layout, row[j].replace("F", "R"), row[j + 1].replace("F", "R"))
        for row in schedule.rows
        for j, layout in ((0, "first"), (2, "others"), (4, "others"))
    }
    expected, report = _run(tiny("dit"), method)
    host, backend = tiny("dit"), Counting()
    _compile(host, "blocks", backend)
    found, compiled = _run(host, method)
    assert_equal(expected, found, "compiled")
    assert compiled == report
    assert len(patterns) > 4
    assert backend.graphs == len(patterns)


def test_skipped_blocks_and_columns_inside_others_in_a_whole_graph(tmp_path):
    host = tiny("dit")
    (denoiser,) = denoisers(host.pipe)
    host.pipe.scheduler.set_timesteps(STEPS)
    grid = sampling_grid(host.pipe.scheduler)[1]
    columns = tuple(f"{denoiser.slot}.{block.path}" for block in denoiser.blocks)
    columns += (f"{denoiser.slot}.{denoiser.blocks[0].self_attn}",)
    schedule = Schedule(columns, ("CCCC", "CSCR", "CRRC", "SCCR", "RCSR", "CCCR"))
    made = to_artifact(schedule, denoiser, method=EvolutionCache.name(), grid=grid)
    method = EvolutionCache(made.save(tmp_path / "skips.safetensors"))
    expected, report = _run(tiny("dit"), method)
    _compile(host, "whole", Counting())
    found, compiled = _run(host, method)
    assert_equal(expected, found, "compiled")
    assert compiled == report
    assert compiled["skipped"] == 3


@pytest.mark.slow
def test_another_batch_and_a_call_outside_a_run():
    method = IntervalCache(2)
    host, plain = tiny("dit"), tiny("dit")
    _compile(host, "blocks", Counting())
    x = torch.randn(2, 4, 8, 8)
    call = {"timestep": torch.tensor([5]), "class_labels": torch.zeros(2).long()}
    with attached(method, host.pipe), attached(method, plain.pipe), torch.no_grad():
        for labels in ([1], [1, 2, 3], [1]):
            changed = {"class_labels": labels, "num_inference_steps": STEPS}
            assert_equal(plain.run(**changed), host.run(**changed), f"{len(labels)} samples")
        found = host.pipe.transformer(x, **call).sample
    with torch.no_grad():
        assert_equal(tiny("dit").pipe.transformer(x, **call).sample, found, "outside a run")


def test_a_failed_call_leaves_nothing_in_the_graph():
    method = IntervalCache(2)
    expected, _ = _run(tiny("dit"), method)
    host = tiny("dit")
    _compile(host, "whole", Counting())
    with attached(method, host.pipe) as live:
        assert isinstance(live, LiveSchedule)
        host.pipe.scheduler.set_timesteps(STEPS)
        with live.clock.at(0), pytest.raises(Exception, match="channels"):
            host.pipe.transformer(torch.randn(2, 3, 8, 8), timestep=torch.tensor([5]))
        live.clock.end()
        assert all(port.letter == "" and port.kept is None for port in live.ports.values())
        assert_equal(expected, host.run(num_inference_steps=STEPS), "the next run")


def test_patterns_above_the_compilers_limit_are_computed_in_full():
    expected = tiny("dit").run(num_inference_steps=STEPS)
    host = tiny("dit")
    _compile(host, "whole", Counting())
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.warns(FallbackWarning, match="recompile_limit"),
        pytest.warns(NoEffectWarning),
    ):
        found, report = _run(host, IntervalCache(2))
    assert_equal(expected, found, "nothing reused")
    assert sum(report["fallbacks"].values()) == STEPS / 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_through_a_real_compiler(how):
    """Inductor sums in another order: equal to its own rounding, 1e-5 relative in float32."""
    method = IntervalCache(2, order=1)
    expected, report = _run(tiny("dit"), method)
    host = tiny("dit")
    _compile(host, how, "inductor")
    found, compiled = _run(host, method)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert compiled == report
