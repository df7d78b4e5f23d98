from anchor_jax import extras


def test_a_missing_package_of_an_extra_is_explained():
    error = ModuleNotFoundError(name="tensorflow_datasets.core")

    message = extras.explain(error)

    assert "the package tensorflow_datasets is missing" in message
    assert "pip install 'anchor_jax[train]'" in message


def test_any_other_missing_module_is_not():
    assert extras.explain(ModuleNotFoundError(name="anchor_jax.nothing")) is None
