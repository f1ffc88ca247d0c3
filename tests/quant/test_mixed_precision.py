"""Plans of bits: chosen within a budget, measured on a model, written, edited, followed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.settings import Settings
from accel.testing import tiny
from quant.calibrate import TFMQCalibration
from quant.mixed_precision import (
    FORMATS,
    WHOLE,
    LayerCosts,
    for_quality,
    measured,
    read_plan,
    steps_down,
    taken,
    total,
    within,
    write_plan,
)

HOW = TFMQCalibration(rounding="nearest", calls=1)


def _layer(path, size, spoils):
    """Error of 8 bits, 16 times that of 4 (a squared error of twice the bits' step)."""
    return LayerCosts(
        path,
        {16: 4 * size, 8: size, 4: size // 2},
        {16: 2.0 * size, 8: 1.0 * size, 4: 1.0 * size},
        {16: 0.0, 8: spoils, 4: 16 * spoils},
    )


LAYERS = [_layer("robust", 64, 1e-8), _layer("usual", 64, 1e-5), _layer("delicate", 64, 1e-1)]


def test_what_spoils_most_goes_last():
    steps = steps_down(LAYERS, "bytes")
    assert [path for path, _ in steps if path != "robust"][-1] == "delicate"
    assert taken(LAYERS, steps) == {"robust": 4, "usual": 4, "delicate": 4}
    plan = within(LAYERS, "bytes", 0.42)
    assert plan == {"robust": 4, "usual": 4, "delicate": WHOLE}


def test_bits_that_save_no_time_are_not_taken():
    assert within(LAYERS, "seconds", 0.5) == dict.fromkeys(("robust", "usual", "delicate"), 8)
    with pytest.raises(ValueError, match=r"seconds .* the least is 0\.50"):
        within(LAYERS, "seconds", 0.4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 64), st.floats(1e-9, 1.0)), min_size=1, max_size=4),
    st.floats(0.13, 1.0),
)
def test_a_budget_is_kept_and_little_is_lost_to_greed(rows, share):
    """Greedy knapsack: at most one change more than a plan of the same error needs."""
    layers = [_layer(str(i), 2 * size, spoils) for i, (size, spoils) in enumerate(rows)]
    plan = within(layers, "bytes", share)
    most = share * total(layers, dict.fromkeys(plan, WHOLE), "bytes")
    assert total(layers, plan, "bytes") <= most
    plans = [
        dict(zip(plan, bits, strict=True)) for bits in product((WHOLE, *FORMATS), repeat=len(plan))
    ]
    fitting = [total(layers, p, "error") for p in plans if total(layers, p, "bytes") <= most]
    worst_change = max(layer.error[4] for layer in layers)
    assert total(layers, plan, "error") <= min(fitting) + worst_change


def test_quality_is_measured_and_kept():
    tried = []

    def quality(plan):
        tried.append(plan)
        return 50.0 - 10 * sum(bits < WHOLE for bits in plan.values())

    plan, found = for_quality(LAYERS, quality, 25.0)
    assert sum(bits < WHOLE for bits in plan.values()) == 2
    assert plan["delicate"] == WHOLE
    assert found == 30.0
    assert plan in tried
    with pytest.raises(ValueError, match="ask for less"):
        for_quality(LAYERS, quality, 45.0)


@pytest.fixture(scope="module")
def costs(tmp_path_factory, fit):
    folder = tmp_path_factory.mktemp("bits")
    host = tiny("dit")
    inputs = [{k: v for k, v in host.inputs.items() if k != "output_type"}]
    return measured(host.pipe, inputs, HOW, str(folder), say=lambda _: None), folder, inputs


def test_layers_are_measured_alone(costs):
    layers, folder, inputs = costs
    paths = {layer.path for layer in layers}
    assert {"transformer.pos_embed.proj", "transformer.proj_out_2"} <= paths  # found, not listed
    assert not any("norm1" in path for path in paths)  # a table's
    for layer in layers:
        assert layer.bytes[4] < layer.bytes[8] < layer.bytes[WHOLE]
        assert layer.error[8] > 0
    assert sum(x.error[4] for x in layers) > 10 * sum(x.error[8] for x in layers)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    again = measured(tiny("dit").pipe, inputs, HOW, str(folder), say=lambda _: None)
    assert again == layers
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("transformer*.json")} == {
        k: v for k, v in before.items() if k.startswith("transformer")
    }


def test_a_layer_whose_file_is_damaged_is_measured_again(costs):
    layers, folder, inputs = costs
    files = sorted(folder.glob("transformer*.json"))[:2]
    for file, data in zip(files, (file.read_bytes()[:20] for file in files), strict=True):
        file.write_bytes(data)
    files[1].write_bytes(b"[]")
    again = measured(tiny("dit").pipe, inputs, HOW, str(folder), say=lambda _: None)
    assert [layer.error for layer in again] == [layer.error for layer in layers]


def test_costs_of_other_activations_or_threads_are_not_these(costs, monkeypatch):
    """Errors depend on how activations are quantised, seconds on threads."""
    _, folder, inputs = costs
    for how in (replace(HOW, activations="static"), replace(HOW, groups=2)):
        with pytest.raises(ValueError, match="another calibration"):
            measured(tiny("dit").pipe, inputs, how, str(folder), say=lambda _: None)
    monkeypatch.setattr("torch.get_num_threads", lambda: 99)
    with pytest.raises(ValueError, match="99 here"):
        measured(tiny("dit").pipe, inputs, HOW, str(folder), say=lambda _: None)


def test_a_calibration_follows_the_plan(costs, tmp_path, fit):
    layers, *_ = costs
    plan = within(layers, "bytes", 0.3)
    assert set(plan.values()) & {4, 8}
    file = tmp_path / "plan.yaml"
    write_plan(file, layers, plan, {"model": "tiny"})
    assert read_plan(file) == plan
    path = layers[0].path
    file.write_text(file.read_text().replace(f"{path}: {plan[path]}", f"{path}: 8"))
    bits = read_plan(file)
    assert bits == {**plan, path: 8}
    how = TFMQCalibration(rounding="nearest", calls=1, plan=Settings(bits))
    artifact = fit(how, tiny("dit"), tmp_path / "parts")
    got = {path: how["bits"] for path, how in artifact.settings["layers"].items()}
    assert got == {path: b for path, b in bits.items() if b < WHOLE}
    packed = [n for n, t in artifact.tensors.items() if n.endswith(":q") and t.element_size() == 1]
    assert len(packed) == len(got)


def test_a_plan_of_another_model_is_refused(tmp_path, fit):
    plan = Settings({"transformer.transformer_blocks.99.ff.net.2": 8})
    with pytest.raises(ValueError, match="from this model"):
        fit(TFMQCalibration(plan=plan), tiny("dit"), tmp_path)
    stray = Settings({"tranformer.proj_out_2": 8, "transformer.proj_out_1": 8})
    with pytest.raises(ValueError, match="the plan has tranformer"):
        fit(TFMQCalibration(plan=stray), tiny("dit"), tmp_path)
    nothing = Settings({"transformer.proj_out_2": 16})
    with pytest.raises(ValueError, match="no layer is left"):
        fit(TFMQCalibration(plan=nothing), tiny("dit"), tmp_path / "b")
    with pytest.raises(ValueError, match="5 bits"):
        TFMQCalibration(plan=Settings({"a": 5}))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("layers: {a: 5}", "bits are"),
        ("layers: {a: true}", "bits are"),
        ("layers: {a: 8.0}", "bits are"),
        ("layers: []", "no plan"),
        ("- 1", "no plan"),
        ("a: [", "not valid YAML"),
        ("layers: " + "[" * 3000, "nested too deeply"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nlayers: {x: *b}", "not valid YAML: aliases"),
    ],
)
def test_wrong_plans(text, problem, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_plan(file)
