"""Settings beside those of a stock scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from samplers.extension import Extension


class Louder(Extension, DDIMScheduler):
    settings = {"volume": 1, "where": None}  # noqa: RUF012

    @classmethod
    def check(cls, settings):
        if settings["volume"] < 0:
            raise ValueError(f"volume = {settings['volume']}")


def test_settings_have_defaults_are_checked_and_saved(tmp_path):
    assert Louder().config.volume == 1
    Louder(500, volume=3, where="here").save_pretrained(tmp_path)
    loaded = Louder.from_pretrained(tmp_path)
    assert (loaded.config.volume, loaded.config.where) == (3, "here")
    assert loaded.config.num_train_timesteps == len(loaded.alphas_cumprod) == 500
    with pytest.raises(ValueError, match="volume = -1"):
        Louder.from_config(loaded.config, volume=-1)
    with pytest.raises(TypeError, match="loudness"):
        Louder(loudness=1)


def test_what_a_stock_scheduler_had_by_default_carries_over():
    """diffusers' own from_config drops it: the host defect that this class is there for."""
    giver = LCMScheduler()
    assert torch.equal(Louder.from_config(giver.config).alphas_cumprod, giver.alphas_cumprod)
    stock = DDIMScheduler.from_config(giver.config)
    assert not torch.equal(stock.alphas_cumprod, giver.alphas_cumprod), "host defect is gone"


def test_no_configuration_is_refused_in_the_stock_words():
    with pytest.raises(ValueError, match="config"):
        Louder.from_config(None)
