"""Functions on sharded arrays that split axes into pieces."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def across_shards(function: Callable, x: jax.Array, sizes: Mapping[int, int]) -> Any:
    """Calls a `function` that splits the axes in `sizes` into pieces of these sizes.

    If explicit shards cut a piece, the split array cannot keep their sharding, so the
    axes of the mesh are automatic inside of `function`. The result is sharded as `x`
    along all axes that the devices still divide.
    """
    sharding = jax.typeof(x).sharding
    devices = devices_along(sharding, x.ndim)
    if not any(x.shape[axis] // size % devices[axis] for axis, size in sizes.items()):
        return function(x)

    def spec(out):
        each = zip(sharding.spec, out.shape, devices)
        return P(*(None if length % count else name for name, length, count in each))

    like = jax.eval_shape(function, jax.ShapeDtypeStruct(x.shape, x.dtype))
    out = jax.tree.map(spec, like)
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        return jax.sharding.auto_axes(function, out_sharding=out)(x)


def replicated(x: jax.Array) -> jax.Array:
    """Returns an array whole on each device, if its shards are explicit."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*[None] * x.ndim)))


class Placement(NamedTuple):
    """How the devices of an automatic mesh divide an array, as its owner says.

    Attributes:
      shape: shape of the whole array.
      sharding: of that array.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding


class Shards(NamedTuple):
    """An array's sharding.

    Attributes:
      mesh: the devices.
      spec: how they divide the array.
      shape: shape of the part on one device.
    """

    mesh: Mesh | AbstractMesh
    spec: P
    shape: tuple[int, ...]

    def place(self, x: jax.Array, spec: P) -> jax.Array:
        """Returns `x` placed by `spec` on an explicit mesh; as it is on others."""
        if is_automatic(self.mesh):
            return x
        return jax.sharding.reshard(x, NamedSharding(self.mesh, spec))


def shards_of(
    x: jax.Array,
    pieces: Iterable[tuple[int, int]],
    placement: Placement | None = None,
) -> Shards | None:
    """Returns the shards of `x` if they keep all pieces whole, else None.

    Pieces are pairs of an axis and a length. If they are whole, a `shard_map` can
    process each of them. Explicit shards are known; on an automatic mesh the compiler
    knows them later, so that the `placement` has to say, of an array of this shape.
    """
    sharding, mesh = jax.typeof(x).sharding, jax.typeof(x).sharding.mesh
    if is_automatic(mesh):
        if placement is None or placement.shape != x.shape:
            return None
        sharding, mesh = placement.sharding, placement.sharding.mesh
    elif any(kind != AxisType.Explicit for kind in mesh.axis_types):
        return None
    devices = devices_along(sharding, x.ndim)
    shape = tuple(length // count for length, count in zip(x.shape, devices))
    if any(shape[axis] % size for axis, size in pieces):
        return None
    return Shards(mesh, sharding.spec, shape)


def is_automatic(mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether the compiler divides arrays over a mesh, or there is none."""
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def devices_along(sharding: NamedSharding, ndim: int) -> list[int]:
    """Returns the number of devices that split each axis."""
    names = [(n,) if isinstance(n, str) else n or () for n in sharding.spec]
    counts = [math.prod(sharding.mesh.shape[n] for n in each) for each in names]
    return counts + [1] * (ndim - len(counts))


def varying_alike(*arrays: jax.Array | None) -> list[Any]:
    """Marks all arrays in a `shard_map` as varying along every axis that one varies."""
    present = [array for array in arrays if array is not None]
    own = [jax.typeof(array).manual_axis_type.varying for array in present]
    every = frozenset().union(*own)
    cast = iter(
        lax.pcast(array, tuple(every - axes), to="varying") if every - axes else array
        for array, axes in zip(present, own)
    )
    return [None if array is None else next(cast) for array in arrays]
