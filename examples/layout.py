"""Shardings of parameters and batches on a mesh of devices.

The mesh has two axes. "data" splits the batch and each matrix (fully sharded data
parallel). "model" splits the products (tensor parallel): the outputs of layers that
read the residual stream, and the inputs of layers that write to it.

Along "data" a matrix is split by columns, not by rows as usual: a column has one scale
and is rotated as a whole, so quantization and CAGE need no communication.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Specs of a parameter's last axes, by path; axes of stacked layers are not split.
_SPECS = (
    (r"layers/(output|down)/kernel", ("model", "data")),
    (r"kernel", (None, ("model", "data"))),
    (r"embedding/embedding", (None, ("model", "data"))),
)


def mesh_of(devices: list[jax.Device], model: int = 1) -> Mesh:
    """Makes a mesh of all devices, with `model` of them along "model".

    Raises:
      ValueError: if the number of devices is not a multiple of `model`.
    """
    if len(devices) % model:
        raise ValueError(
            f"`--model-devices` must divide the number of devices; got {model} of "
            f"{len(devices)}. Use a divisor."
        )
    # Makes neighbours on the mesh neighbours in the pod.
    shape = (len(devices) // model, model)
    grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "model"))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array of parameters, or of a state like them.

    Arrays without a spec, or that the mesh does not divide, are on every device.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh)), tree
    )


def placed(tree: Any, mesh: Mesh) -> Any:
    """Returns abstract arrays with shardings, to compile for devices elsewhere."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        tree,
        shardings(tree, mesh),
    )


def shardings_of(tree: Any) -> Any:
    """Returns the sharding of each array, abstract or not."""
    return jax.tree.map(lambda array: array.sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of windows, (batch, length)."""
    return NamedSharding(mesh, P("data"))


def check_batch(batch: int, microbatch: int, mesh: Mesh) -> None:
    """Checks that the mesh divides batches.

    Raises:
      ValueError: if not, with the number of devices and the nearest size that fits.
    """
    along = mesh.shape["data"]
    for flag, windows in (("batch", batch), ("microbatch", microbatch)):
        if windows % along:
            raise ValueError(
                f'`--{flag}` must be a multiple of the {along} devices along "data"; '
                f"got {windows}. Use {-(-windows // along) * along}, fewer --devices, "
                f"or more --model-devices."
            )


def everywhere(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on all devices."""
    return NamedSharding(mesh, P())


def _spec(path, shape, mesh):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next((axes for rule, axes in _SPECS if re.search(rule, name)), ())
    if len(shape) < len(axes):
        return P()
    spec = [None] * (len(shape) - len(axes)) + list(axes)
    for place, axis in enumerate(spec):
        names = (axis,) if isinstance(axis, str) else axis or ()
        if shape[place] % int(np.prod([mesh.shape[each] for each in names])):
            spec[place] = None
    return P(*spec)
