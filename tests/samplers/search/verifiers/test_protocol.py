import numpy as np
import pytest

from samplers.search.verifiers.digits import DigitsJudge
from samplers.search.verifiers.names import verifier_named
from samplers.search.verifiers.pixels import Brightness, Contrast, Darkness
from samplers.search.verifiers.protocol import RankEnsemble, Verifier, fingerprint, members


def test_ranks_by_hand():
    both = RankEnsemble((Brightness(), Contrast()))
    scores = np.array([[0.1, 5.0], [0.3, 5.0], [0.2, np.nan], [0.9, 1.0]])
    found = both.combine(scores)
    assert found[:2].tolist() == pytest.approx([(0 + 0.75) / 2, (2 / 3 + 0.75) / 2])
    assert np.isnan(found[2])
    assert found[3] == pytest.approx((1 + 0) / 2)


def test_ranks_do_not_depend_on_scale():
    both = RankEnsemble((Brightness(), Contrast()))
    scores = np.random.default_rng(0).normal(size=(9, 2))
    assert both.combine(scores) == pytest.approx(both.combine(np.exp(3 * scores)))


@pytest.mark.parametrize("few", [(Brightness(),), (Brightness(), Brightness())])
def test_an_ensemble_wants_different_verifiers(few):
    with pytest.raises(ValueError, match="different"):
        RankEnsemble(few)


def test_the_judge_prefers_what_was_asked_for():
    from accel.zoo.world import DigitWorld

    pictures, what = DigitWorld("heldout").batch(np.arange(40))
    right = what.captions()
    wrong = right[1:] + right[:1]
    judge = DigitsJudge()
    assert judge.score(pictures, right).mean() > judge.score(pictures, wrong).mean() + 3
    assert np.isnan(judge.score(pictures[:1], ["something else"])[0])
    low, high = judge.range
    scores = judge.score(pictures, right)
    assert np.all((low <= scores) & (scores <= high))
    assert fingerprint(judge) != fingerprint(DigitsJudge("digits-judge-b"))


@pytest.mark.parametrize("name", ["brightness", "judge", "referee", "brightness+darkness+judge"])
def test_names_give_verifiers(name):
    found = verifier_named(name, trusted=False)
    assert isinstance(found, Verifier)
    assert len(members(found)) == 1 + name.count("+")
    assert isinstance(verifier_named("darkness"), Darkness)


def test_unknown_names_say_what_is_known(tmp_path):
    with pytest.raises(ValueError, match=r"brightness.*clip:FOLDER"):
        verifier_named("beauty")
    with pytest.raises(ValueError, match="holds no model"):
        verifier_named(f"clip:{tmp_path}")


@pytest.mark.parametrize("name", ["worker:cat", "http://127.0.0.1:1/", "https://example.org"])
def test_job_files_start_no_command(name):
    with pytest.raises(ValueError, match="starts no command"):
        verifier_named(name, trusted=False)
