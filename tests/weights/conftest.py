import pytest
from ported import SMALL_VAE, draw_items, write


@pytest.fixture(scope="session")
def ported(tmp_path_factory):
    """Returns the folder of tiny ported weights, for tests that only read it."""
    folder = tmp_path_factory.mktemp("weights") / "ported"
    write(folder, draw_items(SMALL_VAE), vae=SMALL_VAE)
    return folder
