"""TokenMerge: any number of frames, the first one alone, rotary tables, the conformance suite."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.denoiser import denoisers
from accel.method import FallbackWarning, NoEffectWarning, attached
from accel.testing import GraphKeeper, assert_equal, checks, conform, tiny
from caches.token_merge import (
    Groups,
    TokenMerge,
    grouped,
    merged,
    merged_rotary,
    unmerged,
)

VIDEOS = ["wan", "wan22", "cogvideox", "hunyuanvideo", "ltx"]


@pytest.mark.parametrize("check", checks())
def test_conformance(check):
    conform(check, TokenMerge(), "wan")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", VIDEOS)
def test_conformance_matrix(check, pipeline):
    conform(check, TokenMerge(0.7, first_alone=False), pipeline)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TokenMerge(1.5), "until"),
        (lambda: TokenMerge(frames=1), "frames"),
        (lambda: TokenMerge(frames=5), "frames"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_pictures_are_refused():
    with pytest.raises(ValueError, match="no frames"):
        TokenMerge().attach(tiny("dit").pipe)


# -- the maths --------------------------------------------------------------------------------


@given(
    frames=st.integers(1, 34), size=st.integers(2, 4), alone=st.booleans(), side=st.integers(1, 3)
)
def test_every_frame_is_in_one_place_whatever_their_number(frames, size, alone, side):
    """Against frames written out one by one; the official code fails for 13, 21, 31, 33 frames."""
    of = grouped((frames, 1, side), size, alone)
    x = torch.arange(frames * side, dtype=torch.float64).view(1, frames, side, 1)
    groups = [[0]] if alone else []
    rest = list(range(len(groups), frames))
    while len(rest) >= size:
        groups.append(rest[:size])
        rest = rest[size:]
    groups += [[frame] for frame in rest]
    means = torch.stack([x[:, group].mean(1) for group in groups], 1)
    found = merged(x.flatten(1, 2), of)
    assert torch.equal(found, means.flatten(1, 2))
    copies = torch.tensor([len(group) for group in groups])
    back = means.repeat_interleave(copies, dim=1)
    assert torch.equal(unmerged(found, of), back.flatten(1, 2))


@pytest.mark.parametrize("frames", [4, 8, 12, 30])
def test_as_the_paper_for_even_numbers(frames):
    """merged_j = (x_2j + x_2j+1) / 2, and each result to both."""
    x = torch.randn(2, frames, 3, 5)
    of = grouped((frames, 1, 3), 2, first_alone=False)
    found = merged(x.flatten(1, 2), of).view(2, frames // 2, 3, 5)
    assert torch.equal(found, (x[:, 0::2] + x[:, 1::2]) / 2)
    back = unmerged(found.flatten(1, 2), of).view_as(x)
    assert torch.equal(back, found.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("layout", ["tokens first", "tokens second, heads third"])
def test_rotary_tables_are_those_of_the_middle(layout):
    """One frequency a channel, from one radian a frame down."""
    frames, width, size = 9, 4, 2
    frequencies = torch.logspace(0, -3, 5, dtype=torch.float64)

    def tables(places):
        angles = torch.outer(places, frequencies).repeat_interleave(width, 0)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if layout == "tokens first" else (cos[None, :, None], sin[None, :, None])

    of = grouped((frames, 1, width), size, first_alone=True)
    middles = torch.tensor([0.0, 1.5, 3.5, 5.5, 7.5], dtype=torch.float64)
    found = merged_rotary(tables(torch.arange(frames).double()), of, frames * width)
    for ours, exact in zip(found, tables(middles), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "places"), [(2, [0, 1, 3, 5, 7]), (3, [0, 2, 5, 7, 8])])
def test_tables_that_turn_many_times_are_those_of_a_frame(size, places):
    """As LTX's: the mean of what is hundreds of radians apart is nowhere."""
    frames, width = 9, 4
    angles = torch.outer(torch.arange(frames).double(), torch.logspace(3, 0, 5).double())
    tables = tuple(t.repeat_interleave(width, 0) for t in (angles.cos(), angles.sin()))
    of = grouped((frames, 1, width), size, first_alone=True)
    found = merged_rotary(tables, of, frames * width, one=True)
    for ours, whole in zip(found, tables, strict=True):
        assert torch.equal(ours, whole.view(frames, width, -1)[places].flatten(0, 1))


def test_ltx_has_tables_that_turn_many_times():
    host = tiny("ltx")
    made = host.pipe.transformer.rope
    tables = []
    made.register_forward_hook(lambda _, __, output: tables.append(output))
    host.run()
    cos, sin = tables[0]
    assert (cos.square() + sin.square() - 1).abs().max() < 1e-5
    of = grouped((2, 1, cos.shape[1] // 2), 2, first_alone=False)
    mean_cos, mean_sin = merged(cos, of), merged(sin, of)
    assert (mean_cos.square() + mean_sin.square()).min() < 0.2, "there would be a middle"


def test_a_still_video_is_attended_to_exactly():
    """Equal frames, no positions: doubling keys changes no softmax. What is left is rounding."""
    of = grouped((6, 2, 2), 2, first_alone=False)
    frame = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    x = frame.expand(1, 6, 4, 8).flatten(1, 2)

    def attend(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    torch.testing.assert_close(unmerged(attend(merged(x, of)), of), attend(x), rtol=0, atol=1e-13)


# -- on pipelines -----------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["wan", "cogvideox", "hunyuanvideo", "ltx"])
def test_attentions_see_fewer_tokens_in_the_first_steps(pipeline):
    host = tiny(pipeline)
    (denoiser,) = denoisers(host.pipe)
    plain = host.run()
    with attached(TokenMerge(0.5), host.pipe) as live:
        shorter = []
        inner = host.pipe.transformer.get_submodule(denoiser.blocks[0].self_attn)
        processor = inner.processor

        class Look:
            def __call__(self, attn, hidden_states, *args, **kwargs):
                shorter.append(hidden_states.shape[1])
                return processor(attn, hidden_states, *args, **kwargs)

        inner.processor = Look()
        found = host.run()
        inner.processor = processor
        (run,) = live.report()["runs"]
    full, fewer = run["detail"]["tokens"]
    calls = len(shorter) // 2
    assert shorter == [fewer] * calls + [full] * calls
    assert fewer < full
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)
    assert_equal(plain, host.run(), "after detach")


def test_one_frame_has_nothing_to_merge():
    host = tiny("wan")
    plain = host.run(num_frames=1)
    with attached(TokenMerge(), host.pipe), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        with pytest.warns(FallbackWarning, match="1 latent frames"):
            assert_equal(plain, host.run(num_frames=1), "one frame")


def test_ltx_by_coordinates_instead_of_sides():
    """As its newer pipelines call it: merged as well, and in full where no grid is told."""
    host = tiny("ltx")
    merge = TokenMerge(until=1.0)
    with attached(merge, host.pipe):
        expected = host.run()
    with attached(merge, host.pipe) as live:
        live.patch.around_call(host.pipe.transformer, _by_coordinates(host), outer=True)
        torch.testing.assert_close(host.run(), expected, rtol=1e-4, atol=1e-4)
    assert live.report()["runs"][0]["fallbacks"] == {}
    with attached(merge, host.pipe) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        live.patch.around_call(host.pipe.transformer, _by_coordinates(host, True), outer=True)
        with pytest.warns(FallbackWarning, match="tokens"):
            backwards = host.run()
    assert torch.isfinite(backwards).all()
    assert live.report()["runs"][0]["fallbacks"]


def _by_coordinates(host, backwards=False):
    rope = host.pipe.transformer.rope
    bases = torch.tensor([rope.base_num_frames, rope.base_height, rope.base_width])

    def layer(
        call_next, *args, num_frames, height, width, rope_interpolation_scale, hidden_states, **call
    ):
        sides = num_frames, height, width
        grid = rope._prepare_video_coords(
            len(hidden_states), *sides, rope_interpolation_scale, hidden_states.device
        )
        coords = (grid * bases).transpose(1, 2)
        call |= {"video_coords": coords.flip(2) if backwards else coords}
        return call_next(*args, hidden_states=hidden_states, **call)

    return layer


def test_attention_to_text_may_be_left_alone():
    assert {p.rpartition(".")[2] for _, paths in TokenMerge(cross=False).claims(tiny("wan").pipe)
            for p in paths} == {"attn1"}  # fmt: skip


def test_inside_graphs_of_blocks():
    expected_host, host = tiny("wan"), tiny("wan")
    keeper = GraphKeeper()

    torch._dynamo.reset()
    for block in host.pipe.transformer.blocks:
        block.compile(fullgraph=True, backend=keeper)
    with attached(TokenMerge(0.5), expected_host.pipe):
        expected = expected_host.run()
    with attached(TokenMerge(0.5), host.pipe) as live:
        found = host.run()
        (run,) = live.report()["runs"]
    torch._dynamo.reset()
    assert_equal(expected, found, "compiled")
    assert run["fallbacks"] == {}
    assert len(keeper.graphs) == 2  # with and without groups


def test_groups_are_told_in_tokens():
    assert grouped((5, 4, 4), 2, True) == Groups(alone=16, groups=2, size=2, frame=16)
    assert grouped((5, 4, 4), 2, True).end == 80
