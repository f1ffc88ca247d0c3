import numpy as np
import pytest
import torch

from accel.zoo import judge, judge_b
from accel.zoo.world import split_scans


class Recorder:
    """Stands for a run: keeps the loss that would be trained, trains nothing."""

    shipped = None
    seed = 0
    device = torch.device("cpu")

    def seed_weights(self):
        torch.manual_seed(self.seed)

    def batch(self, stage: str) -> int:
        return 64

    def stage(self, stage: str, model, loss):
        self.model, self.loss = model, loss


def seen(module) -> set[int]:
    """Scans a training draws, in pictures and in videos."""
    run = Recorder()
    module.MODEL.train(run)
    worlds = (run.loss.world, run.loss.film)
    return {int(s) for world in worlds for s in world.attributes(np.arange(20_000)).scan}


def test_referee_and_judge_share_no_handwriting_with_each_other_or_the_test():
    referee, other = seen(judge_b), seen(judge)
    # 20,000 draws of 420 scans, about 42 of a digit: one is missed with a chance of e^-47.
    assert referee == set(split_scans("referee"))
    assert other <= set(split_scans("train"))
    assert not referee & other
    assert not (referee | other) & set(split_scans("heldout"))


def test_referee_is_another_architecture():
    """No layer of one trunk fits into the other."""
    one, two = (
        {(k, v.shape) for k, v in model.trunk.state_dict().items()}
        for model in (judge.Judge(), judge_b.Referee())
    )
    assert one
    assert not one & two


@pytest.mark.parametrize("canvas", [32, 64])
def test_every_pixel_matters_to_the_referee(canvas):
    model = judge_b.Referee()
    x = torch.randn(2, 3, canvas, canvas, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    model.features(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()
