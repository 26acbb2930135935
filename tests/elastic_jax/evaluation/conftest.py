import pytest
from tiny_items import write_items


@pytest.fixture(scope="session")
def item_folder(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("items"))
