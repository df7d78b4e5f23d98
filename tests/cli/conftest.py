import bundles
import pytest


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a small bundle of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    bundles.save(folder)
    return folder
