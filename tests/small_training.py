"A small training for the guards of train/: drawings as records, a spec of the toy variant, and the parts of a run."
from types import SimpleNamespace

import keras
import numpy as np

from effdet_nb.data.convert import dataset_convert
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.train.checkpoints import MetricHistory
from effdet_nb.train.experiment import class_table, resolve_experiment
from effdet_nb.train.fit import Evaluator, TrainingLoop
from effdet_nb.train.spec import Spec
from effdet_nb.train.startup import read_initial_weights
from effdet_nb.train.trainer import STEP_METRICS, Trainer


def write_records(folder, num_train=12, num_val=4, num_shards=2):
    "Writes drawings and their records: `shapes/val.json`, `train-*` and `val-*`."
    make_toy_dataset(folder/'shapes', num_train=num_train, num_val=num_val, image_hw=(128, 128), seed=0)
    for split in ('train', 'val'):
        images, annotations = folder/'shapes'/split, folder/'shapes'/f'{split}.json'
        dataset_convert(images, annotations, folder, split, num_shards=num_shards, workers=1)
    return folder


def small_spec(folder, **training):
    "A spec of the toy variant on the records of a folder."
    return Spec().replace(
        model_config=dict(model_name='efficientdet-tiny'),
        dataset_config=dict(
            training_file_pattern=f'{folder}/train-*', validation_file_pattern=f'{folder}/val-*',
            validation_json_file=f'{folder}/shapes/val.json', num_classes=4, image_size='128,128',
            max_instances_per_image=20),
        training_config=dict(train_batch_size=4, num_examples_per_epoch=12, learning_rate=.05) | training)


def experiment_of(spec, model_dir=None):
    "The experiment of a spec and the files that it starts from."
    model_name = spec.model_config.model_name
    initial = read_initial_weights(spec.training_config, model_name, model_dir=model_dir)
    return resolve_experiment(spec, initial), initial


def new_trainer(spec, strategy=None):
    "A trainer of a spec, its weights as the seed makes them."
    experiment, _ = experiment_of(spec)
    keras.utils.set_random_seed(spec.training_config.tf_random_seed)
    return Trainer(experiment.arch, experiment.training, strategy)


class StubTrainer:
    "A trainer without a network, whose steps take no time: it shows what the loop and the callbacks do."
    num_replicas, ema, optimizer, strategy, arch = 1, None, None, None, None
    metric_names, gradient_group_names = list(STEP_METRICS), []

    def __init__(self, plan):
        self.plan, self.config, self.step = plan, plan.config, 0
        self.model = SimpleNamespace(stop_training=False)
        self.calls = []              # steps of each call of the compiled step

    def lr_schedule(self, step): return .1

    def train_step(self, batch):
        self.calls.append(1)
        return np.float32([1, 1, 1, 0, 1, 1])

    def train_steps(self, batches, n):
        self.calls.append(int(n))
        return np.float32([[1, 1, 1, 0, 1, 1]]*int(n))


class StubEvaluator(Evaluator):
    "Decides as an `Evaluator` when to evaluate, and finds AP 0.5 each time."
    def __init__(self, trainer, history, experiment):
        self.trainer, self.history = trainer, history
        self.data, self.evaluation = experiment.data, experiment.evaluation
        self.metrics, self.last_time = None, -np.inf
        self.epochs = []             # epochs evaluated, counted from 1

    def evaluate(self):
        self.epochs.append(len(self.history.epochs)+1)
        return {'AP': .5, 'AP50': .5}


def stub_loop(spec, make_callbacks=lambda trainer, history: ()):
    "A training loop over a `StubTrainer` and a `StubEvaluator`."
    experiment = resolve_experiment(spec)
    trainer = StubTrainer(experiment.training)
    history = MetricHistory(trainer.metric_names)
    evaluator = StubEvaluator(trainer, history, experiment)
    return TrainingLoop(trainer, history, make_callbacks(trainer, history), evaluator)


def run_stub(spec, make_callbacks=lambda trainer, history: ()):
    "Runs a loop of stubs to its end, on batches without images."
    loop = stub_loop(spec, make_callbacks)
    loop.run(iter(dict, None))
    return loop


def classes_of(spec): return class_table(resolve_experiment(spec).data)
