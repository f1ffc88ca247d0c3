"""What the Create tab starts, and when."""

from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from apps.web.create_tab import BY_RECIPE, CreateTab


@pytest.fixture
def tab():
    """A tab of an app with the trials `running` and `over`, that notes what is started."""
    known = {name: SimpleNamespace(over=name == "over") for name in ("running", "over")}
    started = []
    trials = SimpleNamespace(
        find=known.get,
        start=lambda *asked, keep: started.append(asked) or SimpleNamespace(id="new"),
    )
    made = CreateTab(SimpleNamespace(trials=trials))  # pyright: ignore[reportArgumentType]
    made.job = SimpleNamespace(all=[], job=lambda values: ("zoo:x", {"seed": 1}))
    made.form = SimpleNamespace(edits=lambda values: {})
    made.started = started
    return made


@pytest.mark.parametrize(("last", "starts"), [("", True), ("over", True), ("running", False)])
def test_a_second_trial_waits_for_the_first_whichever_key_asks(tab, last, starts):
    trial, notice = tab._start(last, BY_RECIPE, "none", [], False)
    assert len(tab.started) == starts
    assert (trial == "new") == starts
    assert ("Cancel what is running" in notice) != starts
