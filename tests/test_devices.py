"Several machines: who am I?"
import json


def test_slurm_names_the_machine(monkeypatch):
    from effdet_nb.learn.step import machine
    assert machine() == (0, 1)
    for k, v in dict(SLURM_STEP_NUM_TASKS='4', SLURM_PROCID='2').items(): monkeypatch.setenv(k, v)
    assert machine() == (2, 4)
    monkeypatch.setenv('TF_CONFIG', json.dumps(dict(cluster=dict(chief=['a:1'], worker=['b:1']), task=dict(type='worker', index=0))))
    assert machine() == (1, 2)


def test_slurm_without_nvidia_smi_gives_the_addresses_and_leaves_gpus_alone(monkeypatch, tmp_path):
    import os
    import tensorflow as tf
    from effdet_nb.learn.step import cluster
    monkeypatch.setenv('PATH', str(tmp_path))                       # no nvidia-smi here
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', os.environ.get('CUDA_VISIBLE_DEVICES', ''))
    for k, v in dict(SLURM_STEP_NUM_TASKS='4', SLURM_PROCID='2', SLURM_STEP_NODELIST='node[03-04]', SLURM_STEP_TASKS_PER_NODE='2(x2)').items(): monkeypatch.setenv(k, v)
    before, found = dict(os.environ), cluster()
    assert found.cluster_spec().as_dict() == {'worker': ['node03:8888', 'node03:8889', 'node04:8888', 'node04:8889']}
    assert (found.task_type, found.task_id) == ('worker', 2)
    assert found.num_accelerators() == {'GPU': len(tf.config.list_physical_devices('GPU'))}
    assert dict(os.environ) == before
