"""Loading says nothing, and diffusers is as talkative afterwards as it was."""

from diffusers.utils import logging

import accel
from apps.render.quiet import quiet_loading


def test_nothing_is_printed_and_settings_come_back(tiny_model, capfd):
    before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    with quiet_loading():
        accel.load(tiny_model)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
