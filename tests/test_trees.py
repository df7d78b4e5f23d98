import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from anchor_jax import trees

TREE = {"a": {"b": np.ones((2, 3), np.float32)}, "c": jnp.zeros(4, jnp.bfloat16)}


def test_sizes_are_those_of_arrays_and_of_shapes():
    shapes = jax.eval_shape(lambda: TREE)

    for tree in (TREE, shapes):
        assert trees.nbytes(tree) == 2 * 3 * 4 + 4 * 2
        assert trees.count(tree) == 10
        assert trees.shard_nbytes(tree) == trees.nbytes(tree)
    assert trees.itemsize("bfloat16") == 2 and trees.itemsize(np.float32) == 4
    assert trees.nbytes({}) == trees.count({}) == 0


def test_random_keys_have_no_size():
    assert trees.nbytes({"key": jax.random.key(0), "x": jnp.zeros(2)}) == 8


def test_a_split_array_has_its_part_on_each_device():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=place)

    assert trees.shard_nbytes([shape]) == 2 * 2 * 4


def test_names_and_trees_are_inverse():
    leaves = trees.flatten(TREE)

    assert list(leaves) == ["a/b", "c"]
    np.testing.assert_array_equal(trees.unflatten(leaves)["a"]["b"], TREE["a"]["b"])


def test_a_cast_changes_every_leaf():
    cast = trees.cast(TREE, jnp.float16)

    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype("float16")}
