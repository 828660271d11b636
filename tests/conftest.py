"Fixtures every guard may use."
import os
from pathlib import Path

import effdet_nb   # before TensorFlow, whose switches it sets
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile('busy machine', deadline=None, suppress_health_check=[HealthCheck.too_slow]) # a slow machine is no fault
settings.load_profile('busy machine')
SHARED = Path(__file__).resolve().parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared():
    "The folder with reference numbers and real pictures that stands beside a development checkout."
    if not SHARED.is_dir():
        assert os.environ.get('CI', '').lower() != 'true', 'CI must check out the reference data beside the project'
        pytest.skip('needs the reference data (oracle/, data/) beside the checkout; the product itself does not')
    return SHARED
