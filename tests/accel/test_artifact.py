"""Artifacts: on disk, tied to their model, never pickle."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from safetensors.torch import save_file

from accel.artifact import Artifact, ArtifactRef, Fingerprint, fingerprints, inputs_digest
from accel.patch import Patch
from accel.testing import tiny


def _artifact(module, **changes) -> Artifact:
    fields = {
        "method": "caches.native:MagCache",
        "fingerprint": changes.get("fingerprint") or Fingerprint.of(module),
        "tensors": {"ratios": torch.arange(5.0), "table": torch.eye(3, dtype=torch.int8)},
        "grid": (1.0, 0.5),
        "guidance": True,
        "inputs_sha256": inputs_digest([{"seed": 1}]),
        "seed": 7,
        "settings": {"beta": 0.1},
    }
    return Artifact(**{**fields, **changes})


@pytest.fixture
def dit():
    return tiny("dit").pipe.transformer


def test_round_trip(tmp_path, dit):
    written = _artifact(dit)
    ref = written.save(tmp_path / "a" / "b.safetensors")
    read = Artifact.load(ref)
    for name, tensor in written.tensors.items():
        assert torch.equal(tensor, read.tensors[name])
    for name in ("method", "grid", "guidance", "inputs_sha256", "seed", "settings", "match"):
        assert getattr(read, name) == getattr(written, name)
    assert "diffusers" in read.versions
    read.check_model(dit)
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_copies_match(dit, dtype):
    artifact = _artifact(dit)
    artifact.check_model(dit.to(dtype))
    artifact.check_model(dit.to(torch.float32))


class _Shelf:
    """Where the values of one lent tensor are."""

    def __init__(self, tensor):
        self.values = tensor.detach().clone()

    def load(self, like):
        return self.values

    def store(self, values):
        self.values = values


def test_weights_that_are_lent_are_looked_for_at_home(dit):
    artifact, patch = _artifact(dit), Patch()
    for parameter in dit.parameters():
        patch.lend(parameter, _Shelf(parameter))
    artifact.check_model(dit)
    patch.undo()
    torch.nn.init.constant_(dit.proj_out_1.weight, torch.nan)  # as a stand-in would look
    with pytest.raises(ValueError, match=r"proj_out_1.weight\[0\] is nan"):
        artifact.check_model(dit)
    with pytest.raises(ValueError, match="not nan"):
        _artifact(dit).check_model(tiny("dit").pipe.transformer)


def test_weights_that_accelerate_keeps_are_looked_for_there(dit):
    loaded = Fingerprint.of(dit)
    cpu_offload(dit, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in dit.parameters())
    assert Fingerprint.of(dit) == loaded
    remove_hook_from_module(dit, recurse=True)


def test_a_fingerprint_without_weights_fits_none(dit):
    known = Fingerprint.of(dit)
    empty = dataclasses.replace(known, weights={})
    assert "none of the model's weights" in (empty.mismatch(known, "weights") or "")
    assert empty.mismatch(known, "architecture") is None


def test_an_artifact_fits_by_architecture_or_weights(tmp_path, dit):
    artifact = Artifact("m", Fingerprint.of(dit), {"t": torch.zeros(1)})
    artifact.match = "nonsense"  # pyright: ignore[reportAttributeAccessIssue]
    ref = artifact.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="its match is 'nonsense'"):
        Artifact.load(ref)


def test_lora_is_looked_through():
    peft = pytest.importorskip("peft")
    model = tiny("wan").pipe.transformer
    artifact = _artifact(model)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    model.add_adapter(config)
    artifact.check_model(model)


def test_other_weights_of_the_same_architecture(dit):
    other = tiny("dit", seed=1).pipe.transformer
    with pytest.raises(ValueError, match=r"weight .* is .* not"):
        _artifact(dit).check_model(other)
    _artifact(dit, match="architecture").check_model(other)


def test_a_small_fine_tune_is_noticed(dit):
    artifact = _artifact(dit)
    with torch.no_grad():
        for p in dit.parameters():
            p.mul_(1 + 2**-5)
    with pytest.raises(ValueError, match="calibrate again"):
        artifact.check_model(dit)


def test_other_class_and_configuration(dit):
    with pytest.raises(ValueError, match="WanTransformer3DModel"):
        _artifact(dit).check_model(tiny("wan").pipe.transformer)
    dit.register_to_config(norm_eps=0.5)
    fresh = tiny("dit").pipe.transformer
    with pytest.raises(ValueError, match="another configuration"):
        _artifact(dit, match="architecture").check_model(fresh)


def test_both_denoisers_of_a_pair_are_told_apart_from_others(tmp_path):
    pipe = tiny("wan22").pipe
    made = _artifact(None, **fingerprints(pipe))
    read = Artifact.load(made.save(tmp_path / "pair.safetensors"))
    read.check_pipeline(pipe)
    pipe.transformer_2, pipe.transformer = pipe.transformer, pipe.transformer_2
    with pytest.raises(ValueError, match="does not fit: weight"):
        read.check_pipeline(pipe)
    pipe.transformer = pipe.transformer_2
    with pytest.raises(ValueError, match="does not fit: transformer_2: weight"):
        read.check_pipeline(pipe)


def test_a_second_denoiser_of_no_fingerprint_is_built_as_the_first():
    pipe = tiny("wan22").pipe
    made = _artifact(pipe.transformer)
    made.check_pipeline(pipe)
    pipe.transformer_2 = tiny("ltx").pipe.transformer
    with pytest.raises(ValueError, match="transformer_2: it is for Wan"):
        made.check_pipeline(pipe)


def test_changed_file_is_noticed(tmp_path, dit):
    ref = _artifact(dit).save(tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        Artifact.load(ref)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"not one"])
def test_not_an_artifact(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not an accel artifact"):
        Artifact.load(path)


def test_plain_safetensors_and_other_formats(tmp_path, dit):
    path = tmp_path / "plain.safetensors"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no accel header"):
        Artifact.load(path)
    save_file({"x": torch.ones(1)}, path, metadata={"accel": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match="another major version"):
        Artifact.load(path)
    for header in ("[]", "{}", '{"format": 1}', '{"format": 1, "fingerprint": 3}'):
        save_file({"x": torch.ones(1)}, path, metadata={"accel": header})
        with pytest.raises(ValueError, match="not an accel artifact"):
            Artifact.load(path)
    _artifact(dit, settings=[1]).save(path)
    with pytest.raises(ValueError, match="settings"):
        Artifact.load(path)
    _artifact(dit).save(path)
    data = path.read_bytes().replace(b'\\"guidance\\"', b'\\"guidanxe\\"')
    path.write_bytes(data)
    with pytest.raises(ValueError, match="guidanxe"):
        Artifact.load(path)
    with pytest.raises(FileNotFoundError):
        Artifact.load(ArtifactRef(str(tmp_path / "none"), ""))


def test_inputs_are_json():
    assert inputs_digest([{"a": 1, "b": 2}]) == inputs_digest([{"b": 2, "a": 1}])
    with pytest.raises(ValueError, match=r"\{'latents': 'Tensor'\}: JSON values only"):
        inputs_digest([{"a": 1, "latents": torch.ones(1)}])
