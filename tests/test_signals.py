"Every signal ends a command with its exit code and one sentence, whatever the command is doing."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effdet_nb.core.signals import REPEAT_SECONDS, STOP_SIGNALS, StopSignal, StopSignalHandler

WORDS = {number: (128+number, words) for number, words in STOP_SIGNALS.items()}
ENV = os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parents[1]), TF_CPP_MIN_LOG_LEVEL='3')

COMMAND = '''
import sys, time
from effdet_nb.app.command import command
@command
def effdet_wait():
    print('ready', flush=True)
    {body}
effdet_wait()
'''
WAIT = 'time.sleep(60)'
DROP_ONE = '''
    try: time.sleep(60)
    except KeyboardInterrupt: print('dropped', flush=True)
    '''
DROP_ALL = '''
    while True:
        try: time.sleep(60)
        except BaseException: print('dropped', flush=True)
    '''
REPLACE = '''
    try: time.sleep(60)
    except KeyboardInterrupt: raise RuntimeError('a worker was lost') from None
    '''
IN_C = 'import hashlib; hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)'     # minutes inside one call


def default_signals():
    "Undoes what a shell does to background jobs, and so to their children: they ignore SIGINT."
    for number in STOP_SIGNALS: signal.signal(number, signal.SIG_DFL)


def start(folder, body, prepare=default_signals):
    "Starts a command with a body, and waits until it runs."
    script = folder/'effdet_wait'
    script.write_text(COMMAND.format(body=body))
    process = subprocess.Popen([sys.executable, script], cwd=folder, env=ENV, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=prepare)
    assert process.stdout.readline() == 'ready\n'
    time.sleep(.3)      # until it waits
    return process


def end_of(process):
    "Exit code and stderr."
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_a_signal_ends_a_command_with_its_code_and_one_sentence(number, tmp_path):
    process = start(tmp_path, WAIT)
    process.send_signal(number)
    code, words = WORDS[number]
    assert end_of(process) == (code, f'effdet_wait: {words}\n')


@pytest.mark.parametrize('body', [DROP_ONE, REPLACE], ids=['dropped', 'replaced'])
def test_a_signal_whose_exception_a_library_drops_or_replaces_is_reported_at_the_end(body, tmp_path):
    process = start(tmp_path, body)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, 'effdet_wait: terminated\n')


@pytest.mark.parametrize('body', [DROP_ALL, IN_C], ids=['dropped', 'in C'])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_that_does_not_react(body, number, tmp_path):
    process = start(tmp_path, body)
    process.send_signal(number)
    time.sleep(1.5*REPEAT_SECONDS)
    process.send_signal(number)
    code, words = WORDS[number]
    assert end_of(process) == (code, f'effdet_wait: {words} a second time, ended at once\n')


def test_a_command_that_stops_late_says_so(tmp_path):
    "As in a compilation, which is one call in C."
    body = f'import effdet_nb.core.signals as signals; signals.REMINDER_SECONDS = .2; {IN_C}'
    process = start(tmp_path, body)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == ('effdet_wait: stopping after the current operation; '
                                         'the same signal again ends the command at once\n')
    time.sleep(REPEAT_SECONDS)
    process.send_signal(signal.SIGINT)
    assert end_of(process) == (130, 'effdet_wait: interrupted a second time, ended at once\n')


def test_a_command_that_has_reported_its_end_prints_nothing_more(tmp_path):
    "Although it takes time to free its objects, such as a pool of workers."
    process = start(tmp_path, """
    import effdet_nb.core.signals as signals
    signals.REMINDER_SECONDS = .3
    class Pool:
        def __del__(self): time.sleep(1)
    pool = Pool()
    time.sleep(60)
    """)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (143, 'effdet_wait: terminated\n')


def test_a_signal_that_is_sent_twice_at_once_counts_as_one(tmp_path):
    "As `timeout` does, and a terminal that is closed."
    process = start(tmp_path, '''
    try: time.sleep(60)
    finally: time.sleep(1.5); print('saved', flush=True)
    ''')
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(.05)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, 'saved\n', 'effdet_wait: terminated\n')


def ignore_hangup():
    default_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_nohup_keeps_its_meaning(tmp_path):
    process = start(tmp_path, 'time.sleep(1.5)', ignore_hangup)
    process.send_signal(signal.SIGHUP)
    assert end_of(process) == (0, '')


@pytest.mark.parametrize('delay', [.1, .5, 1.2])
def test_a_signal_during_the_imports_ends_the_command_at_once(delay, tmp_path):
    "Modules of TensorFlow drop exceptions while they are imported."
    process = start(tmp_path, 'import effdet_nb.train.fit; time.sleep(60)')
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    code, text = end_of(process)
    assert code == 130 and text.removeprefix('loading TensorFlow ...\n') == 'effdet_wait: interrupted\n'


def test_a_closed_terminal_does_not_change_the_exit_code(tmp_path):
    process = start(tmp_path, WAIT)
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 129


@pytest.mark.parametrize('seed', [None, '7'])
def test_a_restarted_command_has_the_same_hashes_each_time_and_keeps_its_output(seed, tmp_path):
    script = tmp_path/'effdet_hash'
    script.write_text(COMMAND.format(body="""
    from effdet_nb.app.command import fix_hash_seed
    fix_hash_seed()
    return hash('a name'), sys.argv[1:]""").replace("    print('ready', flush=True)\n", ''))
    env = {k: v for k, v in ENV.items() if k != 'PYTHONHASHSEED'} | ({'PYTHONHASHSEED': seed} if seed else {})
    outputs = {subprocess.run([sys.executable, script], env=env, capture_output=True, text=True).stdout
               for _ in range(3)}
    assert len(outputs) == 1 and outputs.pop().count('\n') == 1


def test_in_a_shared_process_each_signal_raises():
    "As in a notebook, which a command must not end."
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        with pytest.raises(StopSignal) as e, StopSignalHandler('effdet_train'): signal.raise_signal(number)
        assert e.value.number == number
