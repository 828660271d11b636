"Several machines: who am I?"
import json


def test_slurm_names_the_machine(monkeypatch):
    from effdet_nb.learn.step import machine
    assert machine() == (0, 1)
    for k, v in dict(SLURM_STEP_NUM_TASKS='4', SLURM_PROCID='2').items(): monkeypatch.setenv(k, v)
    assert machine() == (2, 4)
    monkeypatch.setenv('TF_CONFIG', json.dumps(dict(cluster=dict(chief=['a:1'], worker=['b:1']), task=dict(type='worker', index=0))))
    assert machine() == (1, 2)
