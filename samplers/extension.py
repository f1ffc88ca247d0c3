"""Stock diffusers schedulers with further settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin


class Extension:
    """Mixin before a stock scheduler: ``settings`` join its configuration.

    The parent's whole signature is spelled out: diffusers carries over only settings that it finds
    there, and a subclass that takes ``**kwargs`` shows the right betas in its configuration while
    its tensors hold the default ones.
    """

    settings: ClassVar[dict[str, Any]]  # names and defaults

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, SchedulerMixin):
            cls.__init__ = register_to_config(_with_settings(cls.__init__, cls))  # type: ignore

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for settings (all of them) that are out of range."""

    def check_stock(self) -> None:
        """Raises ValueError for settings of the stock scheduler that ours cannot serve."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs) -> Self:
        """As of a stock scheduler, and every setting carries over.

        The stock one drops what its giver was not told and had by default: a new ``LCMScheduler``
        hands on none of its betas, and other classes have others.
        """
        if isinstance(config, Mapping):  # else the stock class says what it wants
            config = {k: v for k, v in config.items() if k != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]


def _with_settings(stock: Any, cls: Any) -> Any:
    """`stock`, the __init__ of a scheduler, with the settings of `cls` as further parameters."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in cls.settings if name in kwargs}
        cls.check(cls.settings | given)
        stock(self, *args, **kwargs)
        self.check_stock()

    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [inspect.Parameter(name, keyword, default=v) for name, v in cls.settings.items()]
    known = inspect.signature(stock).parameters.values()
    __init__.__signature__ = inspect.Signature([*known, *ours])  # type: ignore[attr-defined]
    return __init__
