"Fixtures and rules that every test file may use."
import os
import signal
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from hypothesis import HealthCheck, settings

import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets

settings.register_profile('busy machine', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('busy machine')
signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell ignores it in background jobs, and so would ours
if hasattr(signal, 'SIGHUP'): signal.signal(signal.SIGHUP, signal.SIG_DFL)      # nohup ignores it

SHARED_DIR = Path(__file__).resolve().parents[2] / 'shared'
# The files that take longest come first, or one worker would run the last of them while the other has nothing to do.
SLOW_TEST_FILES = ('cli', 'quickstart', 'devices', 'train', 'resume', 'fields', 'export', 'prune', 'import_weights',
                   'backends', 'peer', 'site')
DEADLINE = float(os.environ.get('EFFDET_TEST_DEADLINE', 'inf'))   # seconds since 1970; .ci/run sets it
LEFT_OUT = 'left out for want of time'


def pytest_collection_modifyitems(items):
    "Puts the longest files first."
    rank = {f'test_{name}': i for i, name in enumerate(SLOW_TEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW_TEST_FILES)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    "Starts no test after the deadline."
    if time.time() > DEADLINE: pytest.skip(LEFT_OUT)


def pytest_terminal_summary(terminalreporter):
    "Lists by name every test that was left out because of the deadline."
    skipped = terminalreporter.stats.get('skipped', [])
    names = sorted({report.nodeid for report in skipped if LEFT_OUT in str(report.longrepr)})
    if not names: return
    terminalreporter.section(f'{len(names)} tests were {LEFT_OUT}', red=True, bold=True)
    for name in names: terminalreporter.line(f'LEFT OUT {name}')


def skip_missing(requirement, hint):
    "Skips a test that lacks a requirement; in CI, where everything has to be there, fails it."
    assert os.environ.get('CI', '').lower() != 'true', f'CI must have {requirement}: {hint}'
    pytest.skip(f'no {requirement}: {hint}')


@pytest.fixture(scope='session')
def shared_dir():
    "The folder with reference numbers and photographs beside a development checkout."
    hint = 'it belongs into a folder beside the checkout; the product itself does not need it'
    if not SHARED_DIR.is_dir(): skip_missing('reference data (oracle/, data/)', hint)
    return SHARED_DIR


@pytest.fixture(scope='session')
def browser(tmp_path_factory):
    "A headless chromium for all tests that open pages."
    if not CHROMIUM: skip_missing('chromium', 'on Debian: apt-get install chromium')
    with Browser(tmp_path_factory.mktemp('browser')/'profile') as b: yield b
