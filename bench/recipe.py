"""What each setting of a short training run is worth, in AP on a few hundred images.

    python bench/recipe.py bench/recipe.json FOLDER

The JSON lists runs: a name, a spec file in FOLDER, and the fields to change, such as {"learning_rate": 0.1}. A run may
also have "bn_momentum", the part of the batch statistics that a step keeps, which is no field of a spec. Each is
trained to its end and evaluated on the validation images of its spec. Its row is appended to FOLDER/recipe.jsonl, so an
interrupted list continues, and a row that is there is not run again. The table of all rows is printed at the end.
The AP of one run varies by about 0.02 even with the same seed: repeat a run, under another name, before you believe
less than that.
"""
import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

COLUMNS = ('spec', 'name', 'steps', 'AP', 'AP50', 'CPU seconds')


def with_fields(spec, changes):
    "Returns a spec with fields changed, each found in its section by name."
    from effdet_nb.train.fields import SPEC_SECTIONS, section_fields
    for field, value in changes.items():
        section = next((name for name in SPEC_SECTIONS if field in section_fields(name)), None)
        if section is None: raise ValueError(f'{field}: no field of a spec')
        spec = spec.replace(**{section: {field: value}})
    return spec


def batch_statistics(momentum):
    "Within this context, new networks keep this part of their batch statistics in a step; None: what the rule says."
    from effdet_nb.detector import backbone
    if momentum is None: return contextlib.nullcontext()
    return mock.patch.object(backbone, 'bn_momentum', lambda *_: momentum)


def measure(run):
    "Trains one run in the current folder; returns its row of the table."
    import keras

    from effdet_nb.train.fit import train
    from effdet_nb.train.spec import Spec
    spec = with_fields(Spec.load(run['spec'], 'train'), run['set'])
    spec = spec.replace(training_config=dict(keep_checkpoint_max=1))
    keras.utils.clear_session()
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, batch_statistics(run.get('bn_momentum')):
        last = train(spec, folder)[-1]
    metrics = {key: round(last[key], 3) for key in ('AP', 'AP50')}
    seconds = round(time.process_time()-start)
    return dict(spec=run['spec'], name=run['name'], steps=last['step'], **metrics) | {'CPU seconds': seconds}


def markdown_table(rows):
    "Returns the rows as a Markdown table, those of one spec together, the best first."
    ordered = sorted(rows, key=lambda row: (row['spec'], -row['AP']))
    lines = [' | '.join(COLUMNS), ' | '.join('---' for _ in COLUMNS)]
    lines += [' | '.join(str(row[column]) for column in COLUMNS) for row in ordered]
    return '\n'.join(f'| {line} |' for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, help='JSON list of runs')
    parser.add_argument('folder', type=Path, help='folder of the spec files and of the results')
    args = parser.parse_args()
    runs = json.loads(args.runs.read_text())
    os.chdir(args.folder)
    results = Path('recipe.jsonl')
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row['spec'], row['name']) for row in rows}
    for run in runs:
        if (run['spec'], run['name']) in done: continue
        rows.append(measure(run))
        with results.open('a') as file: file.write(json.dumps(rows[-1])+'\n')
        print(rows[-1], flush=True)
    print(markdown_table(rows))


if __name__ == '__main__': main()
