"""Stock diffusers schedulers with further settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from samplers.host import with_shift


class Extension:
    """Mixin before a stock scheduler: ``settings`` join its configuration.

    The parent's whole signature is spelled out: diffusers carries over only settings that it finds
    there, and a subclass that takes ``**kwargs`` shows the right betas in its configuration while
    its tensors hold the default ones.
    """

    settings: ClassVar[dict[str, Any]]  # names and defaults

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.joins_stock():
            cls.__init__ = register_to_config(_with_settings(cls.__init__, cls))  # type: ignore

    @classmethod
    def joins_stock(cls) -> bool:
        """Whether this class has a stock scheduler beside us; not one that was made of such a class
        since, whose methods are its own."""
        made = [c for c in cls.__mro__[1:] if issubclass(c, SchedulerMixin)]
        return bool(made) and not any(issubclass(c, Extension) for c in made)

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for settings (all of them) that are out of range."""

    def check_stock(self) -> None:
        """Raises ValueError for settings of the stock scheduler that ours cannot serve."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs) -> Self:
        """As of a stock scheduler, and every setting carries over.

        The stock one drops what its giver was not told and had by default: a new ``LCMScheduler``
        hands on none of its betas, and other classes have others. So does the shift of a flow.
        """
        if isinstance(config, Mapping):  # else the stock class says what it wants
            config = with_shift(config, cls)
            config.pop("_use_default_values", None)
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
