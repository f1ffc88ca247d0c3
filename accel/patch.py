"""The only file that changes a host object. Everything is undone, in any order.

Three kinds of change, all on instances, never on classes:

* ``Patch.around(owner, "forward", layer)`` puts ``layer(call_next, *args, **kwargs)`` around a
  callable attribute. All layers on one attribute share one ``Trampoline``.
* ``Patch.swap(owner, "scheduler", value)`` replaces an attribute.
* ``Patch.write(tensor, values)`` changes what a tensor holds, ``Patch.lend(tensor, home)`` puts a
  stand-in of one element in its place; the tensor stays the same object, and copies of it (deep
  ones, pickles) hold what is at home.

Other libraries also replace ``forward`` (offloading, diffusers' caches) and restore what they found
whenever they like. So a trampoline that somebody captured stays as an empty pass-through until it
is topmost again, and one that somebody threw away is put back by ``Patch.ensure`` (called at the
start of every run).
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from accel import compat

Layer = Callable[..., Any]
_MISSING = object()

# owner -> {attribute: weak reference to its trampoline}. Weak on both sides: the owner (or whoever
# captured the callable) keeps the trampoline alive, and a trampoline refers to its owner.
_TRAMPOLINES: weakref.WeakKeyDictionary[Any, dict[str, weakref.ref[Trampoline]]] = (
    weakref.WeakKeyDictionary()
)
_SWAPS: weakref.WeakKeyDictionary[Any, dict[str, _SwapStack]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class _Entry:
    """One layer with its place: outer layers (the clock's) run before all inner ones."""

    layer: Layer
    outer: bool


class Trampoline:
    """What stands in ``vars(owner)[name]``, by its ``entry``; runs its layers around ``original``.

    In a method's place stands a method. Dynamo tells callable objects apart by identity, methods by
    their code, so that graphs go on to be shared by modules that are alike.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner_ref = weakref.ref(owner)
        self.name = name
        self.entries: list[_Entry] = []
        self.install()

    def install(self) -> None:
        """Become the topmost callable, around whatever is there now."""
        owner = self.owner_ref()
        self.shadowed = vars(owner).get(self.name, _MISSING)
        self.original = getattr(owner, self.name)
        self.entry = self._entry()  # signature() and capture checks follow its __wrapped__
        object.__setattr__(owner, self.name, self.entry)
        self.compose()

    def _entry(self) -> Callable:
        if not isinstance(self.original, types.MethodType):
            return functools.update_wrapper(self, self.original)

        def enter(trampoline: Trampoline, *args: Any, **kwargs: Any) -> Any:
            return trampoline.call(*args, **kwargs)

        functools.update_wrapper(enter, self.original.__func__).__name__ = self.name
        return types.MethodType(enter, self)

    def compose(self) -> None:
        """Fold the layers into one callable, so that a call costs one frame per layer."""
        call = self.original if self.entries else self._pass_through
        for entry in sorted(self.entries, key=lambda e: e.outer):  # stable: keeps attach order
            call = functools.partial(entry.layer, call)
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def _pass_through(self, *args: Any, **kwargs: Any) -> Any:
        if not compat.is_compiling():
            self.remove_if_topmost()
        return self.original(*args, **kwargs)

    def remove_if_topmost(self) -> bool:
        """Give the attribute back if no other wrapper stands on top of this one."""
        owner = self.owner_ref()
        if owner is None or vars(owner).get(self.name) is not self.entry:
            return False
        if self.shadowed is _MISSING:
            object.__delattr__(owner, self.name)
        else:
            object.__setattr__(owner, self.name, self.shadowed)
        return True

    def is_reachable(self) -> bool:
        """Whether a call of the owner's attribute still comes through here."""
        current = vars(self.owner_ref()).get(self.name)
        seen: set[int] = set()
        while current is not None and id(current) not in seen:
            if current is self.entry:
                return True
            seen.add(id(current))
            current = compat.wrapped_callable(current)
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the owner gets its plain method back, bound to the copy."""
        owner = self.owner_ref()
        plain = types.MethodType(getattr(type(owner), self.name), memo.get(id(owner), owner))
        return plain if self.entry is self else _Plain(plain)

    def __reduce__(self) -> Any:
        """Pickled, the owner gets its plain method back too."""
        if self.entry is self:
            return _unpatched, (self.owner_ref(), self.name)
        return _itself, (self.owner_ref(),)  # a method is pickled as an attribute of its object


class _Plain:
    """In a copy of an owner what the trampoline was: its entry comes here."""

    def __init__(self, call: types.MethodType) -> None:
        self.call = call

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plain:
        owner: Any = self.call.__self__
        return _Plain(types.MethodType(self.call.__func__, memo.get(id(owner), owner)))

    def __reduce__(self) -> Any:
        return _itself, (self.call.__self__,)


def _unpatched(owner: Any, name: str) -> Any:
    return types.MethodType(getattr(type(owner), name), owner)


def _itself(owner: Any) -> Any:
    return owner


@dataclass
class _Placed:
    """A layer of one patch and where it is; ``find`` tells the module whose calls it follows."""

    trampoline: Trampoline
    entry: _Entry
    find: Callable[[], Any] | None = None

    def take_off(self) -> None:
        self.trampoline.entries.remove(self.entry)
        self.trampoline.compose()
        if not self.trampoline.entries:
            self.trampoline.remove_if_topmost()


@dataclass
class _SwapStack:
    """All swaps of one attribute, oldest first, over what the host had. Refers to no owner."""

    base: Any
    entries: list[tuple[object, Any]] = field(default_factory=list)  # (token, value)


class Home(Protocol):
    """Where the values of a lent tensor are meanwhile."""

    def load(self, like: Any) -> Any:
        """The values, on the device and in the type of ``like``."""

    def store(self, values: Any) -> None:
        """Other values from now on."""


# tensor -> its home, for every tensor that is lent now; by identity, tensors compare elementwise
_LENT: Any = compat.weak_identity_dictionary()
# of those, the ones that have their values for now; sizes do not tell: a stand-in that is moved or
# cast is spread over its shape
_HOME: Any = compat.weak_identity_dictionary()
# tensor -> weak reference to the patch that has written it
_WRITTEN: Any = compat.weak_identity_dictionary()
_TAKEN = (
    "a tensor of shape {} is {} by another method already, on this pipeline or one that shares it; "
    "detach that one first"
)


class Patch:
    """A set of reversible changes, undone together.

    Patches of several methods may sit on the same attribute and be undone in any order; after the
    last one ``vars(owner)`` holds exactly what it held before the first.
    """

    def __init__(self) -> None:
        self._placed: list[_Placed] = []
        self._swaps: list[tuple[weakref.ref[Any], str, object]] = []
        self._written: list[tuple[Any, Any]] = []  # (tensor, what it held, on the host)
        self._lent: list[Any] = []

    def around(self, owner: Any, name: str, layer: Layer, *, outer: bool = False) -> None:
        """Run ``layer(call_next, *args, **kwargs)`` instead of ``owner.name(*args, **kwargs)``.

        Later layers run outside earlier ones; ``outer=True`` keeps a layer outside all others.
        """
        self._placed.append(_place(owner, name, _Entry(layer, outer)))

    def around_call(
        self,
        module: Any,
        layer: Layer,
        *,
        outer: bool = False,
        find: Callable[[], Any] | None = None,
    ) -> None:
        """``around`` for calls of a ``torch.nn.Module``, outside its compiled graph if it has one.

        Compiling the module later moves the layer along (at the next ``ensure``), and so does
        replacing it (loading a LoRA does) where ``find`` tells what is in its place.
        """
        placed = _place(*compat.call_point(module), _Entry(layer, outer))
        placed.find = find or (lambda: module)
        self._placed.append(placed)

    def swap(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name = value`` until undone (through the owner's own ``__setattr__``)."""
        stacks = _SWAPS.setdefault(owner, {})
        stack = stacks.get(name)
        if stack is None:
            stack = stacks[name] = _SwapStack(base=vars(owner).get(name, _MISSING))
        token = object()
        stack.entries.append((token, value))
        self._swaps.append((weakref.ref(owner), name, token))
        setattr(owner, name, value)

    def write(self, tensor: Any, values: Any) -> None:
        """Put ``values`` (its shape, any type and device) into a tensor until undone.

        The tensor stays the same object, so offloading and compiled graphs go on. What it held is
        kept in host memory. One patch at a time may write a tensor: claim the slot ``weights``.

        Raises:
            ValueError: another patch has written it; nothing was changed.
        """
        holder = _WRITTEN.get(tensor, lambda: None)()
        if holder not in (None, self):
            raise ValueError(_TAKEN.format(tuple(tensor.shape), "written"))
        _WRITTEN[tensor] = weakref.ref(self)
        self._written.append((tensor, values_of(tensor).detach().to("cpu", copy=True)))
        _put(tensor, values)

    def lend(self, tensor: Any, home: Home) -> None:
        """Leave one NaN, spread over its shape, in a tensor's place until undone.

        Device, type and shape stay; its memory is free once nobody else holds it. What it held must
        be at ``home``: ``values_of`` and ``Patch.write`` look there, and it comes back from there.

        Raises:
            ValueError: it is lent already; nothing was changed.
        """
        if tensor in _LENT:
            raise ValueError(_TAKEN.format(tuple(tensor.shape), "lent"))
        _LENT[tensor] = home
        self._lent.append(tensor)
        tensor.__deepcopy__ = functools.partial(_deep_copy, weakref.ref(tensor))
        tensor.__reduce_ex__ = functools.partial(_reduce, weakref.ref(tensor))
        stand_in(tensor)

    def ensure(self) -> None:
        """Put back what the host threw away, and follow modules compiled or replaced since."""
        for placed in self._placed:
            trampoline = placed.trampoline
            if placed.find is not None:
                owner, name = compat.call_point(placed.find())
                if owner is not trampoline.owner_ref() or name != trampoline.name:
                    placed.take_off()
                    placed.trampoline = _place(owner, name, placed.entry).trampoline
                    continue
            if trampoline.owner_ref() is not None and not trampoline.is_reachable():
                trampoline.install()

    def undo(self) -> None:
        """Take all changes of this patch back, the last first. Safe to call twice.

        Where one of them cannot be (out of memory), the others are, and then it raises.
        """
        with ExitStack() as changes:
            changes.callback(self.take_back)
            for tensor, before in self._written:
                changes.callback(_put_back, tensor, before)
            for owner_ref, name, token in self._swaps:
                changes.callback(_unswap, owner_ref(), name, token)
            for placed in self._placed:
                changes.callback(placed.take_off)
            self._placed, self._swaps, self._written = [], [], []

    def take_back(self) -> None:
        """Everything that is lent gets its values again, where it is now.

        If there is no room for them, they stay where they are, for another try.
        """
        while self._lent:
            tensor = self._lent[-1]
            tensor.data = _LENT[tensor].load(tensor)
            del _LENT[tensor], self._lent[-1]
            del tensor.__deepcopy__, tensor.__reduce_ex__


def values_of(tensor: Any) -> Any:
    """What a tensor holds; of a lent one, what it holds at home, on its device."""
    home = _LENT.get(tensor)
    return tensor if home is None else home.load(tensor)


def stand_in(tensor: Any) -> None:
    """(Again) one NaN in a lent tensor's place; moving it to another device had spread it."""
    tensor.data = tensor.data.new_full((), float("nan")).expand(tensor.shape)


@contextmanager
def exchanged(others: Mapping[Any, Any]) -> Iterator[None]:
    """Tensors that hold other values for the length of a ``with`` block; nothing is copied.

    others: tensor -> values of its shape, type and device, which it then shares.
    """
    before = [(tensor, tensor.data) for tensor in others]
    try:
        for tensor, values in others.items():
            tensor.data = values
        yield
    finally:
        for tensor, own in before:
            tensor.data = own


@contextmanager
def at_home(tensors: list[Any]) -> Iterator[None]:
    """Lent tensors with their values in place, for the length of a ``with`` block."""
    away = [t for t in tensors if t in _LENT and t not in _HOME]
    try:
        for tensor in away:
            tensor.data = values_of(tensor)
            _HOME[tensor] = True
        yield
    finally:
        for tensor in away:
            _HOME.pop(tensor, None)
            if tensor in _LENT:  # else it was given back meanwhile
                stand_in(tensor)


def _put_back(tensor: Any, before: Any) -> None:
    _put(tensor, before)
    _WRITTEN.pop(tensor, None)


def _whole(tensor: Any) -> Any:
    """A tensor of the same kind that holds what a lent one holds at home."""
    return compat.tensor_like(tensor, values_of(tensor))


def _deep_copy(lent: weakref.ref[Any], memo: dict[int, Any]) -> Any:
    tensor: Any = lent()
    if id(tensor) not in memo:
        memo[id(tensor)] = copy.deepcopy(_whole(tensor))
    return memo[id(tensor)]


def _reduce(lent: weakref.ref[Any], protocol: int) -> Any:
    return _whole(lent()).__reduce_ex__(protocol)


def _put(tensor: Any, values: Any) -> None:
    home = _LENT.get(tensor)
    if home is None:
        compat.copy_into(tensor, values)
    else:
        home.store(values)


def _place(owner: Any, name: str, entry: _Entry) -> _Placed:
    """Add a layer to the trampoline of ``owner.name``, made or put back as needed."""
    known = _TRAMPOLINES.setdefault(owner, {})
    trampoline = known[name]() if name in known else None
    if trampoline is None or not (trampoline.entries or trampoline.is_reachable()):
        trampoline = Trampoline(owner, name)
        known[name] = weakref.ref(trampoline)
    elif not trampoline.is_reachable():
        trampoline.install()  # thrown away by the host while layers were on it
    trampoline.entries.append(entry)
    trampoline.compose()
    return _Placed(trampoline, entry)


def _unswap(owner: Any, name: str, token: object) -> None:
    if owner is None:  # gone meanwhile
        return
    stack = _SWAPS[owner][name]
    index = next(i for i, (t, _) in enumerate(stack.entries) if t is token)
    _, value = stack.entries.pop(index)
    is_top = index == len(stack.entries)
    if is_top and vars(owner).get(name) is value:  # else: someone assigned it since; theirs stays
        below = stack.entries[-1][1] if stack.entries else stack.base
        if below is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, below)
    if not stack.entries:
        del _SWAPS[owner][name]
