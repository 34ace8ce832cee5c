"""A pretend accelerator: tensors that say they are on ``pretend:0`` and compute on the CPU.

It stands for a GPU where only places matter. As on CUDA an operator whose tensors are in two places raises, except
for copies, numbers (tensors without dimensions) and index tensors of ``x[index]``; ``numpy()`` raises; a tensor that
is made without ``device=`` stays on the CPU. Processes exchange its tensors over gloo, and FSDP2 splits them: its
streams are those of the CPU, which do nothing. Speed, races, the precision of products and the place of a random
generator are not those of a GPU.

Importing this registers the device for the whole process: tests that use it run in their own (``pretend_cases.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # it looks at functions that are replaced below
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
JOINS = {"aten::cat", "aten::stack"}
"""Operators that take no number from the CPU either."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "scaled_dot_product_attention")
"""What autocast computes in half precision."""
MAKERS = ("empty_strided", "empty.memory_format", "arange", "arange.start", "arange.start_step")
"""Operators without a tensor among their arguments that call no other one, or one that would resize its result."""
WAITING = "_c10d_functional::_wrap_tensor_autograd"
"""Wraps what a collective between processes will have written when it is first used; here it is waited for at once."""


class Pretend(torch.Tensor):
    """A tensor on the device; ``inner``, on the CPU, holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operator, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the numbers: who asks compares addresses."""
        return self.inner.untyped_storage()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Pretend({self.inner})"


class PretendGenerator(torch.Generator):
    """Random numbers of the device: those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        here = torch.device(device).type == NAME
        return super().__new__(cls, "cpu") if here else GENERATOR(device)

    @property
    def device(self) -> torch.device:
        return DEVICE


GENERATOR = torch.Generator


def unwrapped(x: Any) -> Any:
    """The CPU's form of an argument."""
    if isinstance(x, Pretend):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def check_places(name: str, here: list[Pretend], elsewhere: list[torch.Tensor]) -> None:
    if not here or name in COPIES | INDEXING:
        return
    wrong = [tuple(x.shape) for x in elsewhere if x.dim() or name in JOINS]
    if wrong:
        raise RuntimeError(f"{name}: expected all tensors on {DEVICE}, found on the cpu tensors of shape {wrong}")


def compute(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the numbers inside, after a check that its tensors are in one place."""
    name = operator._schema.name
    if name == WAITING:
        return Pretend(torch.ops._c10d_functional.wait_tensor(args[0].inner))
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, Pretend)]
    check_places(name, here, [x for x in tensors if not isinstance(x, Pretend)])
    wanted = kwargs.get("device")
    to_here = bool(here) if wanted is None else torch.device(wanted).type == NAME
    if name == "aten::copy_":
        to_here = isinstance(args[0], Pretend)
    plain = {key: value for key, value in tree_map(unwrapped, kwargs).items() if key != "pin_memory"}
    if wanted is not None:
        plain["device"] = torch.device("cpu")
    result = operator(*tree_map(unwrapped, args), **plain)
    # An operator in place gives back the tensor that came in.
    known = {id(x.inner): x for x in here}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in known:
            return Pretend(x) if to_here else x
        if known[id(x)].shape != x.shape:
            raise NotImplementedError(f"{name} gives a tensor on {DEVICE} another size")
        return known[id(x)]

    return tree_map(wrapped, result)


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    unwrapped(target).copy_(unwrapped(source))
    return target


def in_half(operator: Any) -> Callable[..., Any]:
    """A product under autocast."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


def maker(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: compute(operator, args, kwargs)


LIBRARIES = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
"""Registrations end with these."""


def register() -> None:
    every, aten = LIBRARIES
    every.fallback(lambda operator, *args, **kwargs: compute(operator, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    aten.impl("_local_scalar_dense", lambda x: x.inner.item(), "PrivateUse1")
    for name in MAKERS:
        operator, _, overload = name.partition(".")
        aten.impl(name, maker(getattr(getattr(torch.ops.aten, operator), overload or "default")), "PrivateUse1")
    for name in PRODUCTS:
        aten.impl(name, in_half(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    module = type(getattr(torch, NAME))
    module.get_amp_supported_dtype = lambda self: [torch.bfloat16, torch.float16]
    module.current_device = lambda self: 0
    module.device_count = lambda self: 1
    for name in ("Stream", "Event", "current_stream", "stream"):
        setattr(module, name, staticmethod(getattr(torch.cpu, name)))
    tolist, numpy = torch.Tensor.tolist, torch.Tensor.numpy

    def to_numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Pretend):
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy: use Tensor.cpu() first")
        return numpy(self, *args, **kwargs)

    data = torch.Tensor.data

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        """As on CUDA, where the device of a tensor changes with its data."""
        if isinstance(self, Pretend) == isinstance(value, Pretend):
            data.__set__(self, value)
            if isinstance(self, Pretend):
                self.inner = value.inner.detach()
            return
        other = value.detach()
        if isinstance(self, torch.nn.Parameter):
            other = torch.nn.Parameter(other, requires_grad=self.requires_grad)
        torch.utils.swap_tensors(self, other)

    alike = torch._has_compatible_shallow_copy_type
    # ``Module.to`` then gives every parameter other data, and tied ones stay one.
    torch._has_compatible_shallow_copy_type = lambda one, other: (  # type: ignore[assignment]
        isinstance(one, Pretend) or isinstance(other, Pretend) or alike(one, other)
    )
    torch.Tensor.data = property(data.__get__, set_data)  # type: ignore[assignment]
    torch.Tensor.tolist = lambda self: tolist(unwrapped(self))  # type: ignore[method-assign]
    torch.Generator = PretendGenerator  # type: ignore[misc]
    torch.Tensor.numpy = to_numpy  # type: ignore[method-assign]


register()
