"Fixtures every guard may use."
import os
from pathlib import Path

import effdet_nb   # before TensorFlow, whose switches it sets
import pytest
from browser import CHROMIUM, Browser
from hypothesis import HealthCheck, settings

settings.register_profile('busy machine', deadline=None, suppress_health_check=[HealthCheck.too_slow]) # a slow machine is no fault
settings.load_profile('busy machine')
SHARED_DIR = Path(__file__).resolve().parents[2] / 'shared'
SLOW_TEST_FILES = ('quickstart', 'devices', 'export', 'train', 'cli', 'fields', 'resume', 'prune', 'weights_in', 'site')     # files that take minutes, the longest first


def pytest_collection_modifyitems(items):
    "Long files begin, or one worker would sit over the last of them while the other has nothing to do."
    rank = {f'test_{name}': i for i, name in enumerate(SLOW_TEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW_TEST_FILES)))


def skip_missing(what, cure):
    "Skips for want of something, except in CI, where it has to be there."
    assert os.environ.get('CI', '').lower() != 'true', f'CI must have {what}: {cure}'
    pytest.skip(f'no {what}: {cure}')


@pytest.fixture(scope='session')
def shared_dir():
    "The folder with reference numbers and real pictures that stands beside a development checkout."
    if not SHARED_DIR.is_dir(): skip_missing('reference data (oracle/, data/)', 'it belongs into a folder beside the checkout; the product itself does not need it')
    return SHARED_DIR


@pytest.fixture(scope='session')
def browser(tmp_path_factory):
    "A headless chromium, for all tests that open pages."
    if not CHROMIUM: skip_missing('chromium', 'on Debian: apt-get install chromium')
    with Browser(tmp_path_factory.mktemp('browser')/'profile') as b: yield b
