"""Globals that a pickle of weights may name: descriptions of tensors, plain values, placeholders.

Nothing is imported or looked up by name here: a global is an entry of the tables below, or refused.
"""

from __future__ import annotations

# Python 2's names, which protocol 2 writes: long, unicode, xrange …
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Name of a class, or of an object's class, that is not built; its content is dropped."""

    name: str


@dataclass(frozen=True, eq=False)
class StorageType:
    """dtype of `torch.FloatStorage` and the like; None: bytes."""

    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A block of the file, by its key: ``count`` elements of ``dtype``, or bytes."""

    key: str
    dtype: torch.dtype | None
    count: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize if self.dtype else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.count * self.itemsize


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor to be built: view of a storage, with offset and strides in elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Function:
    """A function that a pickle may call."""

    call: Callable[..., Any]


# Packages and modules whose names all become placeholders: trainers write them beside the weights, or they hold values.
PACKAGES = {
    *("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "torchvision"),
    *("omegaconf", "hydra", "transformers", "tokenizers", "accelerate", "diffusers", "peft", "timm", "taming", "sgm"),
    *("cldm", "wandb", "easydict", "addict", "munch", "box", "ml_collections", "yacs", "main", "__main__"),
}
_VALUES = {"pathlib", "pathlib._local", "datetime", "decimal", "fractions", "uuid", "typing", "collections"}
_WITHIN = ("torch.optim.", "numpy.random.")  # prefixes of modules
_BUILTINS = (
    "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple type Ellipsis"
    " NotImplemented"
)
_NUMPY = (
    "bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 str_"
    " bytes_ datetime64 timedelta64 object_ ndarray core.multiarray._reconstruct _core.multiarray._reconstruct"
    " core.numeric._frombuffer _core.numeric._frombuffer"
)
_TORCH = (
    "device Tensor nn.parameter.Parameter nn.parameter.Buffer nn.modules.container.ParameterDict"
    " torch_version.TorchVersion _utils._rebuild_sparse_tensor serialization._get_layout"
)
_EXTRA = {  # single names that become placeholders
    *("argparse.Namespace", "types.SimpleNamespace", "types.GenericAlias"),
    *(f"builtins.{name}" for name in _BUILTINS.split()),
    *(f"numpy.{name}" for name in _NUMPY.split()),
    *(f"torch.{name}" for name in _TORCH.split()),
}
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_DTYPES = (*_STORAGES.values(), *(getattr(torch, name) for name in (*_FLOAT8, "uint16", "uint32", "uint64")))
_NUMBERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}  # numpy's codes


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None) -> TensorRef:
    if not isinstance(storage, StorageRef) or dtype is None or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor is not described by storage, offset, shape and strides")
    counts = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > 64 or any(type(n) is not int or n < 0 for n in counts):
        raise ValueError("a tensor's offset, shape and strides do not fit together or are negative")
    return TensorRef(storage, dtype, offset, shape, stride)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = False, hooks: Any = None, flags: Any = None
) -> TensorRef:
    if flags:
        raise ValueError("a tensor that is a conjugate or negative view")
    return _tensor(storage, offset, shape, stride, getattr(storage, "dtype", None))


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> TensorRef:
    if flags or type(dtype) is not torch.dtype:
        raise ValueError("a tensor without a dtype, or that is a conjugate or negative view")
    return _tensor(storage, offset, shape, stride, dtype)


def _parameter(data: Any, requires_grad: Any = None, hooks: Any = None, state: Any = None) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise ValueError("a parameter that is not a tensor")
    return data


def _subclass(rebuild: Any, kind: Any, arguments: Any, state: Any) -> TensorRef:
    """A tensor of a subclass, or with attributes, as a plain tensor."""
    if rebuild not in _TENSORS or type(arguments) is not tuple:
        raise ValueError("a tensor of a subclass that is rebuilt by another function than a tensor")
    return rebuild.call(*arguments)


def _of_a_type(owner: Any, item: Any) -> Placeholder:
    """`typing.Optional[int]`: a placeholder indexed by anything is a placeholder."""
    if not isinstance(owner, Placeholder):
        raise ValueError("an item of something that is not a type")
    return Placeholder(owner.name)


def _size(shape: Any = ()) -> tuple[Any, ...]:
    if not isinstance(shape, tuple):
        raise ValueError("a shape that is not a tuple")
    return shape


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in pairs:
        put(result, key, value)
    return result


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes that are not written as Latin-1")
    return text.encode("latin1")


def _numpy_type(code: Any, *_: Any) -> np.dtype | Placeholder:
    return np.dtype(code) if type(code) is str and code in _NUMBERS else Placeholder("numpy.dtype")


def _numpy_scalar(dtype: Any, data: Any = None) -> int | float | Placeholder:
    data = data.encode("latin1") if type(data) is str else data
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        return Placeholder("numpy.generic")
    if len(data) != dtype.itemsize:
        raise ValueError("a numpy number of another size than its type")
    return np.frombuffer(data, dtype)[0].item()


_TENSORS = (Function(_tensor_v2), Function(_tensor_v3), Function(_parameter))
_KNOWN: dict[str, Any] = {
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": StorageType(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(None),
    **{str(dtype): dtype for dtype in _DTYPES},
    "torch._utils._rebuild_tensor": _TENSORS[0],
    "torch._utils._rebuild_tensor_v2": _TENSORS[0],
    "torch._utils._rebuild_tensor_v3": _TENSORS[1],
    "torch._utils._rebuild_parameter": _TENSORS[2],
    "torch._utils._rebuild_parameter_with_state": _TENSORS[2],
    "torch._tensor._rebuild_from_type_v2": Function(_subclass),
    "_operator.getitem": Function(_of_a_type),
    "torch.Size": Function(_size),
    "collections.OrderedDict": Function(_ordered),
    "collections.defaultdict": Function(lambda factory=None: {}),
    "_codecs.encode": Function(_encode),
    "numpy.dtype": Function(_numpy_type),
    "numpy.core.multiarray.scalar": Function(_numpy_scalar),
    "numpy._core.multiarray.scalar": Function(_numpy_scalar),
}


def put(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Set an entry of a dict.

    Raises ValueError for a duplicate key, or one of a type that may hash slowly. A tuple of plain
    values becomes a placeholder, which is not hashed by its content.
    """
    if isinstance(key, tuple) and all(v is None or isinstance(v, (str, int, float, bytes, Placeholder)) for v in key):
        key = Placeholder("builtins.tuple")
    plain = key is None or isinstance(key, (str, float, bytes, Placeholder, torch.dtype))
    if not plain and not (isinstance(key, int) and abs(key) < 2**60):
        raise ValueError(f"a key that is a {type(key).__name__}")
    if key in target:
        raise ValueError(f"the key {str(key)[:80]!r} twice")
    target[key] = value


def find(module: str, name: str) -> Any:
    """Inert counterpart of a global.

    Raises LookupError with its full name for one that weights never need.
    """
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    if full in _KNOWN:
        return _KNOWN[full]
    inert = module.split(".")[0] in PACKAGES or module in _VALUES or module.startswith(_WITHIN)
    if (inert and name.isidentifier()) or full in _EXTRA:
        return Placeholder(full)
    raise LookupError(full)
