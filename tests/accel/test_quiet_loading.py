"""Loading says nothing, and diffusers is as talkative afterwards as it was."""

from __future__ import annotations

from diffusers.utils import logging

import accel
from accel.loading import quiet_loading
from accel.testing import tiny


def test_nothing_is_printed_and_settings_come_back(tmp_path, capfd):
    tiny("dit").pipe.save_pretrained(tmp_path)
    before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    capfd.readouterr()
    with quiet_loading():
        accel.load(tmp_path)
    accel.load("zoo:digits-dit")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
