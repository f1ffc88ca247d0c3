"""TokenDensity: cells of any grid, what blocks are given, every model, the conformance suite."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.denoiser import denoisers
from accel.method import FallbackWarning, attached
from accel.patch import Patch
from accel.testing import GraphKeeper, assert_equal, checks, conform, tiny
from caches.interval import IntervalCache
from caches.token_density import (
    ROTARY,
    TokenDensity,
    cells,
    drawn,
    means,
    spread,
    thinned,
    thinned_rotary,
)
from caches.token_merge import TokenMerge

MODELS = ["dit", "pixart", "sd3", "flux", "wan", "wan22", "cogvideox", "hunyuanvideo", "ltx"]


@pytest.mark.parametrize("check", checks())
def test_conformance(check):
    conform(check, TokenDensity(0.5), "wan")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", MODELS)
def test_conformance_matrix(check, pipeline):
    choose = "drawn" if pipeline == "ltx" else "mean"
    conform(check, TokenDensity(0.7, 3, choose, 0, 0), pipeline)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TokenDensity(1.5), "until"),
        (lambda: TokenDensity(side=1), "side"),
        (lambda: TokenDensity(side=5), "side"),
        (lambda: TokenDensity(last=-1), "last = -1"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("pipeline", "method", "words"),
    [
        ("sd", TokenDensity(), "UNet2DConditionModel.*IntervalCache"),
        ("ddpm", TokenDensity(), "UNet2DModel"),
        ("ltx", TokenDensity(choose="mean"), "choose='drawn'"),
        ("dit", TokenDensity(first=2), "first = 2 and last = 1 leave none of its 3 blocks"),
        ("dit", TokenDensity(first=0, last=4), "last = 4 leave none"),
    ],
)
def test_refused_by_name(pipeline, method, words):
    with pytest.raises(ValueError, match=words):
        method.attach(tiny(pipeline).pipe)


def test_a_first_frame_with_a_time_of_its_own_is_refused():
    pipe = tiny("hunyuanvideo").pipe
    pipe.transformer.register_to_config(image_condition_type="token_replace")
    with pytest.raises(ValueError, match="first frame"):
        TokenDensity().attach(pipe)


@pytest.mark.parametrize("other", [TokenMerge(), IntervalCache(2)])
def test_not_beside_what_wants_all_tokens_of_these_blocks(other):
    pipe = tiny("wan").pipe
    with attached(other, pipe), pytest.raises(ValueError, match="both claim"):
        TokenDensity().attach(pipe)


# -- the maths --------------------------------------------------------------------------------

GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@given(grid=GRIDS, side=st.integers(2, 4), draw=st.integers(0, 50))
def test_cells_of_any_grid(grid, side, draw):
    """Against every cell cut out of the grid."""
    frames, height, width = grid
    x = torch.randn(1, frames * height * width, 2, dtype=torch.float64)
    whole = x.view(frames, height, width, 2)
    cut = [
        whole[f, i : i + side, j : j + side].reshape(-1, 2)
        for f in range(frames)
        for i in range(0, height, side)
        for j in range(0, width, side)
    ]
    source = cells(grid, side)
    expected = torch.stack([cell.mean(0) for cell in cut])
    torch.testing.assert_close(thinned(x, means(source))[0], expected, rtol=0, atol=1e-15)
    found = thinned(x, drawn(source, draw))[0]
    assert all((cell == token).all(1).any() for cell, token in zip(cut, found, strict=True))
    # back: every token gets the change of its cell
    numbers = torch.arange(len(cut), dtype=torch.float64).view(1, -1, 1)
    back = spread(torch.zeros(1, x.shape[1], 1, dtype=torch.float64), numbers, means(source))
    for f, i, j in ((0, 0, 0), (frames - 1, height - 1, width - 1), (0, height - 1, 0)):
        row = (f * -(-height // side) + i // side) * -(-width // side) + j // side
        assert back.view(grid)[f, i, j] == row


def test_every_token_of_a_cell_is_drawn_equally_often():
    """Also in the smaller cells at the ends. 600 draws: four standard deviations."""
    source = cells((1, 3, 5), 2)
    times = torch.zeros(15)
    for draw in range(600):
        times[drawn(source, draw).members[:, 0]] += 1
    size = source.bincount()[source].double()
    deviation = (600 / size * (1 - 1 / size)).sqrt()
    assert ((times - 600 / size).abs() <= 4 * deviation).all()


def test_draws_leave_the_random_state_alone():
    before = torch.get_rng_state()
    source = cells((1, 8, 8), 2)
    assert torch.equal(drawn(source, 3).members, drawn(source, 3).members)
    assert not torch.equal(drawn(source, 3).members, drawn(source, 4).members)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", [0, 3])
def test_rotary_tables_are_those_of_the_middle_of_a_cell(axis, text):
    """Half the channels turn with the row, half with the column, from a radian a token down."""
    grid, side = (2, 5, 7), 3
    frequencies = torch.logspace(0, -3, 5, dtype=torch.float64)

    def tables(rows, columns):
        angles = torch.cat((torch.outer(rows, frequencies), torch.outer(columns, frequencies)), 1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if axis == 0 else (cos[None, :, None], sin[None, :, None])

    row = torch.arange(5.0, dtype=torch.float64).repeat_interleave(7).repeat(2)
    column = torch.arange(7.0, dtype=torch.float64).repeat(10)
    words = torch.zeros(text, dtype=torch.float64)
    middle_row = torch.tensor([1.0, 1, 1, 3.5, 3.5, 3.5], dtype=torch.float64).repeat(2)
    middle_column = torch.tensor([1.0, 4, 6], dtype=torch.float64).repeat(4)
    source = cells(grid, side)
    given = tables(torch.cat((words, row)), torch.cat((words, column)))
    found = thinned_rotary(given, means(source))
    expected = tables(torch.cat((words, middle_row)), torch.cat((words, middle_column)))
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    of = drawn(source, 5)
    places = of.members[:, 0]
    found = thinned_rotary(given, of)
    expected = tables(torch.cat((words, row[places])), torch.cat((words, column[places])))
    assert all(torch.equal(ours, exact) for ours, exact in zip(found, expected, strict=True))


# -- on pipelines -----------------------------------------------------------------------------


def _given(host, method):
    """What each block of the first denoiser is given, call by call, by name; and the grid.

    The layers that look are put on first, so they stand inside those of the method.
    """
    (denoiser, *_) = denoisers(host.pipe)
    seen = {block.path: [] for block in denoiser.blocks}
    grids = []
    patch = Patch()

    def look_at(path):
        module = denoiser.module.get_submodule(path)
        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def look(call_next, *args, **kwargs):
            seen[path].append({**dict(zip(names, args, strict=False)), **kwargs})
            return call_next(*args, **kwargs)

        patch.around_call(module, look)

    def look_at_grid(call_next, *args, **kwargs):
        grids.append(denoiser.grid(args, kwargs))
        return call_next(*args, **kwargs)

    for path in seen:
        look_at(path)
    patch.around_call(denoiser.module, look_at_grid)
    try:
        with attached(method, host.pipe) as live:
            host.run()
            (run,) = live.report()["runs"]
    finally:
        patch.undo()
    return seen, grids[0], run


@pytest.mark.parametrize("choose", ["drawn", "mean"])
@pytest.mark.parametrize("pipeline", MODELS)
def test_the_middle_sees_fewer_tokens_in_the_first_steps(pipeline, choose):
    if (pipeline, choose) == ("ltx", "mean"):
        pytest.skip("refused")
    host = tiny(pipeline)
    plain = host.run()
    (denoiser, *_) = denoisers(host.pipe)
    method = TokenDensity(0.5, choose=choose)
    seen, grid, run = _given(host, method)
    middle = [block.path for block in method.middle(denoiser)]
    calls = len(seen[middle[0]])
    full, fewer = run["detail"]["tokens"]
    assert (full, fewer) == (math.prod(grid), grid[0] * -(-grid[1] // 2) * -(-grid[2] // 2))
    assert fewer < full
    for path, found in seen.items():
        lengths = [call["hidden_states"].shape[1] for call in found]
        # Wan 2.2 asks the first denoiser in the first half of this run only
        sparse = 0 if path not in middle else calls if pipeline == "wan22" else calls // 2
        assert lengths == [fewer] * sparse + [full] * (calls - sparse), path
        for call in found:  # text is never thinned
            text = call.get("encoder_hidden_states")
            assert text is None or text.shape == found[-1]["encoder_hidden_states"].shape
    assert run["fallbacks"] == {}
    assert_equal(plain, host.run(), "after detach")


@pytest.mark.parametrize("pipeline", ["flux", "wan", "cogvideox", "hunyuanvideo", "ltx"])
def test_positions_go_with_their_tokens(pipeline):
    """The rows of the tokens drawn in a step, text's in full; both guidance branches draw alike."""
    host = tiny(pipeline)
    (denoiser,) = denoisers(host.pipe)
    method = TokenDensity(1.0)
    full = _given(host, method.neutral())[0]
    seen, grid, run = _given(host, method)
    path = method.middle(denoiser)[0].path
    name = next(name for name in ROTARY if name in full[path][0])
    branches = run["calls"] // run["steps"]
    for call, (whole, part) in enumerate(zip(full[path], seen[path], strict=True)):
        of = method.sparse(grid, call // branches)
        tables = whole[name]
        axis = 0 if tables[0].ndim == 2 else 1
        text = tables[0].shape[axis] - len(of.source)
        places = torch.cat((torch.arange(text), text + of.members[:, 0]))
        for table, short in zip(tables, part[name], strict=True):
            assert_equal(table.index_select(axis, places), short, name)


def test_a_mask_goes_with_its_tokens():
    host = tiny("hunyuanvideo")
    host.inputs["prompt_attention_mask"] = host.inputs["negative_prompt_attention_mask"]
    (denoiser,) = denoisers(host.pipe)
    method = TokenDensity(1.0)
    path = method.middle(denoiser)[0].path
    full = _given(host, method.neutral())[0]
    seen, grid, _ = _given(host, method)
    whole, part = full[path][0]["attention_mask"], seen[path][0]["attention_mask"]
    fewer = seen[path][0]["hidden_states"].shape[1]
    assert_equal(whole[..., math.prod(grid) :], part[..., fewer:], "text")
    assert part[..., :fewer].all()
    assert not whole.all()  # some text is masked, else this would be no test


@pytest.mark.parametrize("choose", ["drawn", "mean"])
def test_a_time_for_each_token(choose):
    """Wan 2.2's image-to-video: a frame has a time of its own, which its cells keep."""
    host = tiny("wan")
    model = host.pipe.transformer
    method = TokenDensity(1.0, choose=choose)
    path = method.middle(denoisers(host.pipe)[0])[0].path
    latents, text = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 5, 24)
    grid = (3, 2, 3)  # patches of 2 x 2
    times = torch.tensor([0.0, 500.0, 900.0]).repeat_interleave(6)[None]
    found = []
    patch = Patch()

    def look(call_next, *args, **kwargs):
        found.append(args[2])
        return call_next(*args, **kwargs)

    patch.around_call(model.get_submodule(path), look)
    host.pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        model(latents, times, text)
        with attached(method, host.pipe) as live, live.clock.at(0):
            model(latents, times, text)
    patch.undo()
    whole, short = found
    of = method.sparse(grid, 0)
    assert short.shape[1] == len(of.members) == 3 * 1 * 2
    frame = whole[:, ::6]  # (1, frames, 6, c)
    assert not torch.equal(frame[:, 0], frame[:, 1])
    # a mean of two or four equal numbers is that number
    assert_equal(frame.repeat_interleave(2, 1), short, "times")


def test_where_the_middle_does_nothing_tokens_stay():
    """y + up(F(down(y)) - down(y)) with F the identity, bit for bit."""
    host = tiny("dit")
    skipped = Patch()
    middle = host.pipe.transformer.transformer_blocks[1]
    skipped.around_call(middle, lambda call_next, hidden_states, **kwargs: hidden_states)
    without = host.run()
    for choose in ("drawn", "mean"):
        with attached(TokenDensity(1.0, choose=choose), host.pipe):
            assert_equal(without, host.run(), choose)
    skipped.undo()


def test_a_row_does_not_depend_on_its_neighbours():
    """1e-5: some hundred roundings of float32 at values of one."""
    host = tiny("dit")
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 5])
    time = torch.tensor([900])
    host.pipe.scheduler.set_timesteps(4)

    def run(rows):
        with live.clock.at(0):
            return host.pipe.transformer(x[rows], time.expand(len(rows)), labels[rows]).sample

    with torch.no_grad(), attached(TokenDensity(1.0), host.pipe) as live:
        both, alone = run([0, 1]), torch.cat([run([0]), run([1])])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)


def test_every_solver_stage_draws_for_itself():
    from diffusers import HeunDiscreteScheduler

    draws = []

    class Noting(TokenDensity):
        def sparse(self, grid, draw):
            draws.append(draw)
            return super().sparse(grid, draw)

    host = tiny("dit")
    host.pipe.scheduler = HeunDiscreteScheduler()
    with attached(Noting(1.0), host.pipe):
        host.run()
        assert draws == list(range(2 * 4 - 1))
        host.run()
        assert draws == list(range(7)) * 2


def test_what_acts_on_blocks_at_full_length_is_computed_in_full():
    host = tiny("sd3")
    model = host.pipe.transformer
    given = {
        "hidden_states": torch.randn(1, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 7, 24),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([900.0]),
        "skip_layers": [1],
    }
    host.pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        plain = model(**given).sample
        with attached(TokenDensity(1.0), host.pipe) as live, live.clock.at(0):
            with pytest.warns(FallbackWarning, match="skip_layers was given"):
                assert_equal(plain, model(**given).sample, "in full")
            found = model(**{**given, "skip_layers": None}).sample
    assert not torch.equal(plain, found)


def test_one_token_has_no_cell():
    host = tiny("dit")
    given = (torch.randn(1, 4, 2, 2), torch.tensor([900]), torch.tensor([3]))
    host.pipe.scheduler.set_timesteps(4)
    with torch.no_grad(), attached(TokenDensity(), host.pipe) as live:
        plain = host.pipe.transformer(*given).sample
        with live.clock.at(0), pytest.warns(FallbackWarning, match="no cells of more than one"):
            assert_equal(plain, host.pipe.transformer(*given).sample, "one token")


@pytest.mark.parametrize("whole", [False, True])
def test_beside_graphs(whole):
    """Around graphs of blocks, inside one of the denoiser; a draw is an input, so two are enough.

    Blocks: one length, and any. Denoiser: with cells and without.
    """
    method = TokenDensity(0.5, choose="mean" if whole else "drawn")
    expected_host, host = tiny("wan"), tiny("wan")
    keeper = GraphKeeper()

    torch._dynamo.reset()
    transformer = host.pipe.transformer
    for part in [transformer] if whole else transformer.blocks:
        part.compile(fullgraph=True, backend=keeper)
    with attached(method, expected_host.pipe):
        expected = expected_host.run()
        longer = expected_host.run(num_inference_steps=6)
    with attached(method, host.pipe) as live:
        found = host.run()
        assert_equal(longer, host.run(num_inference_steps=6), "compiled, longer")
        (run, _) = live.report()["runs"]
    torch._dynamo.reset()
    assert_equal(expected, found, "compiled")
    assert run["fallbacks"] == {}
    assert len(keeper.graphs) == 2
