"Files are complete or absent, no secret is written, and no line of status.json is damaged."
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from effdet_nb.core import console, files
from effdet_nb.core.console import Status, format_duration, log_message, printable, progress_bar, read_status
from effdet_nb.core.files import atomic_write, check_output_path, to_jsonable, write_json

ROOT = Path(__file__).resolve().parents[1]


class FakeTerminal(io.StringIO):
    def isatty(self): return True


def test_atomic_write_keeps_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path/'a.bin'
    path.write_bytes(b'old')
    with atomic_write(path) as f:
        f.write(b'new')
        f.flush()
        assert path.read_bytes() == b'old'
    assert path.read_bytes() == b'new' and os.listdir(tmp_path) == ['a.bin']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_atomic_write_leaves_nothing_behind_after_any_exception(tmp_path, error):
    with pytest.raises(error):
        with atomic_write(tmp_path/'x'/'y'/'a.bin') as f:
            f.write(b'half')
            raise error()
    assert os.listdir(tmp_path) == []


def test_atomic_write_keeps_folders_that_existed_or_are_in_use(tmp_path):
    (tmp_path/'x').mkdir()
    with pytest.raises(ValueError):
        with atomic_write(tmp_path/'x'/'y'/'a.bin'):
            (tmp_path/'x'/'y'/'other').write_text('kept')
            raise ValueError
    assert (tmp_path/'x'/'y'/'other').read_text() == 'kept'


def test_atomic_write_follows_a_link(tmp_path):
    (tmp_path/'real').write_text('old')
    (tmp_path/'link').symlink_to(tmp_path/'real')
    with atomic_write(tmp_path/'link', 'w') as f: f.write('new')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'real').read_text() == 'new'


def test_atomic_write_gives_ordinary_permissions(tmp_path):
    (tmp_path/'plain').write_text('')
    with atomic_write(tmp_path/'a', 'w') as f: f.write('')
    assert stat.S_IMODE((tmp_path/'a').stat().st_mode) == stat.S_IMODE((tmp_path/'plain').stat().st_mode)


def test_atomic_write_never_replaces_a_device():
    with pytest.raises(ValueError, match='device'):
        with atomic_write(os.devnull): pass
    assert not Path(os.devnull).is_file()


def test_atomic_write_accepts_long_names(tmp_path):
    name = 'ä'*125   # 250 bytes of the 255 a name may have
    with atomic_write(tmp_path/name, 'w') as f: f.write('x')
    assert (tmp_path/name).read_text() == 'x'


@pytest.mark.parametrize('call', ['mkdir', 'open'])
def test_the_error_names_the_file_when_the_folder_is_read_only(tmp_path, monkeypatch, call):
    def denied(*_, **__): raise PermissionError(13, 'Permission denied', 'something.part')
    if call=='mkdir': monkeypatch.setattr(Path, 'mkdir', denied)
    else: monkeypatch.setattr('effdet_nb.core.files.open', denied, raising=False)
    with pytest.raises(PermissionError, match=r'a.bin: cannot be written \(Permission denied\)') as e:
        with atomic_write(tmp_path/'a.bin'): pass
    assert 'part' not in str(e.value) and os.listdir(tmp_path)==[]


def test_impossible_paths_are_refused_before_anything_is_written(tmp_path):
    (tmp_path/'file').write_text('')
    for bad in (tmp_path, tmp_path/'file'/'a', tmp_path/'file'/'b'/'a'):
        with pytest.raises(ValueError, match='Give the name of a file|Choose a different folder'):
            check_output_path(bad)
    assert os.listdir(tmp_path) == ['file']


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    code = f'''
import time
from effdet_nb.core.files import atomic_write
with atomic_write({str(tmp_path/"a")!r}, "w") as f:
    f.write("new"*9999); f.flush(); print("ready", flush=True); time.sleep(60)'''
    (tmp_path/'a').write_text('old')
    run = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert run.stdout.readline() == 'ready\n'
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert (tmp_path/'a').read_text() == 'old'


def containers(x):
    "Lists, tuples and dicts of values drawn from `x`."
    return st.lists(x, max_size=3) | st.tuples(x) | st.dictionaries(st.text(max_size=4), x, max_size=3)


python_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
numpy_values = st.floats(width=32).map(np.float32) | st.lists(st.integers(0, 9)).map(np.array)
json_like = st.recursive(python_values | numpy_values, containers, max_leaves=10)


@given(json_like)
def test_any_value_becomes_strict_json(x):
    assert json.loads(json.dumps(to_jsonable(x), allow_nan=False)) == to_jsonable(x)


def test_write_json_writes_what_to_jsonable_gives(tmp_path):
    value = dict(loss=float('inf'), size=(np.int64(3), 4))
    write_json(tmp_path/'new'/'a.json', value, indent=1)
    assert json.loads((tmp_path/'new'/'a.json').read_text()) == to_jsonable(value)


@pytest.mark.parametrize('x', [float('nan'), float('inf'), np.float32('-inf'), np.float64('nan')])
def test_numbers_that_are_not_finite_become_null(x):
    assert to_jsonable(dict(kpi=[x])) == dict(kpi=[None])


@given(st.text(min_size=3, max_size=8).filter(lambda s: '*' not in s), json_like)
def test_secrets_are_masked_everywhere(secret, x):
    masked = to_jsonable([x, f'open {secret} now', {secret: [secret]}], secrets=[secret])
    assert not any(secret in s for s in strings_in(masked))


def strings_in(value):
    "All strings in nested lists and dicts, keys included."
    if isinstance(value, str): yield value
    children = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for child in children: yield from strings_in(child)


def test_status_has_the_shape_of_tao(tmp_path):
    with Status(tmp_path, 'prune') as status:
        status.log_progress('Pruned.', kpi=dict(param_count=np.int64(7)), layers=3)
    start,middle,end = read_status(tmp_path)
    assert start['status']=='STARTED' and start['message']=='Starting prune.' and start['verbosity']=='INFO'
    assert middle['kpi']==dict(param_count=7) and middle['layers']==3
    assert end['status']=='SUCCESS' and end['kpi']==dict(param_count=7) and 'layers' not in end
    month,day,year = map(int, start['date'].split('/'))
    assert 1<=month<=12 and 1<=day<=31 and year>2000 and len(start['time'].split(':'))==3


@pytest.mark.parametrize('error, state, words', [
    (ValueError('bad spec'), 'FAILURE', 'bad spec'),
    (KeyboardInterrupt(), 'FAILURE', 'interrupted'),
    (MemoryError(), 'FAILURE', 'MemoryError'),
    (SystemExit(1), 'FAILURE', '1'),
    (SystemExit(0), 'SUCCESS', 'finished'),
    (None, 'SUCCESS', 'finished')])
def test_the_last_event_says_how_the_run_ended(tmp_path, error, state, words):
    try:
        with Status(tmp_path, 'train'):
            if error is not None: raise error
    except BaseException as e: assert e is error
    last = read_status(tmp_path)[-1]
    assert last['status']==state and words in last['message']


def test_an_error_is_more_important_than_a_reported_failure(tmp_path):
    with Status(tmp_path/'a', 'inference') as status: status.fail('1 of 8 images')
    with pytest.raises(ValueError), Status(tmp_path/'b', 'inference') as status:
        status.fail('1 of 8 images')
        raise ValueError('no space')
    assert [read_status(tmp_path/name)[-1]['message'] for name in 'ab'] == ['1 of 8 images', 'no space']


def test_a_failing_disk_does_not_hide_the_first_error(tmp_path, monkeypatch):
    def disk_full(*_): raise OSError(28, 'No space left on device')
    with pytest.raises(ValueError, match='the real reason'):
        with Status(tmp_path, 'train'):
            monkeypatch.setattr('effdet_nb.core.console._append_line', disk_full)
            raise ValueError('the real reason')


def test_a_half_line_does_not_swallow_the_next(tmp_path):
    (tmp_path/'status.json').write_text('{"status": "SUCC')
    with Status(tmp_path, 'train'): pass
    assert [e['status'] for e in read_status(tmp_path)] == ['STARTED','SUCCESS']
    assert all(line.endswith('}') for line in (tmp_path/'status.json').read_text().splitlines()[1:])


def test_read_status_without_a_file_is_empty(tmp_path):
    assert read_status(tmp_path) == read_status(tmp_path/'absent') == []


def test_a_terminal_gets_a_bar_and_lines_beside_it():
    with redirect_stderr(FakeTerminal()) as err:
        for i in progress_bar(range(3), desc='boxes'): log_message(f'line {i}')
    text = err.getvalue()
    assert 'boxes' in text and '3/3' in text and all(f'line {i}\n' in text for i in range(3))


def test_a_log_gets_lines_only_when_they_are_due():
    with redirect_stderr(io.StringIO()) as err:
        for _ in progress_bar(range(20), desc='slow', interval=0.05): time.sleep(0.01)
    lines = err.getvalue().splitlines()
    assert 2 <= len(lines) <= 6 and lines[-1].startswith('slow: 20/20 (100%)') and '\r' not in err.getvalue()


def test_the_last_progress_line_is_written_once():
    with redirect_stderr(io.StringIO()) as err:
        list(progress_bar(range(3), interval=0))
    assert [line.split(' ')[0] for line in err.getvalue().splitlines()] == ['1/3','2/3','3/3']


@given(st.lists(st.integers(), max_size=5))
def test_a_progress_bar_passes_items_through(items):
    with redirect_stderr(io.StringIO()):
        assert list(progress_bar(iter(items), interval=0)) == items


def test_progress_writes_nothing_to_stdout(capsys):
    list(progress_bar(range(3), interval=0))
    log_message('hello')
    assert capsys.readouterr().out == ''


@given(st.floats(0, 1e7))
@example(216_000.)
def test_a_duration_never_shows_sixty_minutes_or_seconds(seconds):
    words = format_duration(seconds).split()                   # 60 h is a duration like any other
    assert all(int(number)<60 for number,unit in zip(words[::2], words[1::2]) if unit!='h')


def test_parallel_writers_do_not_mix_their_files(tmp_path):
    def write(i):
        for _ in range(20):
            with atomic_write(tmp_path/'same', 'w') as f: f.write(str(i)*1000)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    text = (tmp_path/'same').read_text()
    assert len(text)==1000 and len(set(text))==1 and os.listdir(tmp_path)==['same']


def test_importing_is_light():
    code = '''import sys, effdet_nb.core.console
print([m for m in ("tensorflow", "tqdm", "matplotlib") if m in sys.modules])'''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == '[]'


# --- locks, and files that killed processes have left ---

@pytest.mark.parametrize('name', ['.a.tlt.0123abcd.part', '.train_records.json.ffffffff.part', '.x.00000000.part'])
def test_the_next_write_deletes_temporary_files_of_killed_processes_only(tmp_path, name):
    (tmp_path/name).write_bytes(b'half')
    (tmp_path/'.train.part').mkdir()
    for kept in ('.mine.part', 'b.0123abcd.part', '.notes.0123abcz.part'): (tmp_path/kept).write_bytes(b'')
    with open(tmp_path/name, 'rb') as f:
        assert files._lock_file(f)
        with files.atomic_write(tmp_path/'a.tlt') as g: g.write(b'whole')
        assert (tmp_path/name).exists()
    files._remove_stale_parts_once.cache_clear()
    with files.atomic_write(tmp_path/'a.tlt') as g: g.write(b'whole')
    kept = {'.train.part', '.mine.part', 'b.0123abcd.part', '.notes.0123abcz.part', 'a.tlt'}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_a_lock_keeps_other_processes_out_and_ends_with_its_process(tmp_path):
    code = f'''
import time
from effdet_nb.core.files import exclusive_lock
with exclusive_lock({str(tmp_path/"new"/".lock")!r}, "busy"):
    print("ready", flush=True)
    time.sleep(60)
'''
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'ready\n'
    with pytest.raises(ValueError, match='busy'), files.exclusive_lock(tmp_path/'new'/'.lock', 'busy'): pass
    other.kill()
    other.wait()
    for _ in range(2):
        with files.exclusive_lock(tmp_path/'new'/'.lock', 'busy'): pass
    assert not (tmp_path/'new'/'.lock').exists()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes')
def test_only_ordinary_files_of_a_sensible_size_are_read(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with open(tmp_path/'sparse', 'wb') as f: f.truncate(2**40)
    for path, message in ((tmp_path/'pipe', 'not an ordinary file'), ('/dev/zero', 'not an ordinary file'),
                          (tmp_path, 'not an ordinary file'), (tmp_path/'sparse', 'at most')):
        with pytest.raises(ValueError, match=message): files.read_file(path)
    with pytest.raises(FileNotFoundError): files.read_file(tmp_path/'none')


def test_text_that_utf8_cannot_store_is_written_with_escapes(tmp_path):
    with files.atomic_write(tmp_path/'names.txt', 'w') as f: f.write('caf\udce9, \ud800, größe')
    assert (tmp_path/'names.txt').read_text(encoding='utf-8') == r'caf\udce9, \ud800, größe'


# --- terminals that cannot show everything, and closed streams ---

@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp437'])
def test_any_text_is_printed_on_any_terminal(encoding):
    code = 'from effdet_nb.core.console import log_message, prepare_streams; prepare_streams(); ' \
           'print("größe € 猫 \\udce9"); log_message("größe € 猫 \\udce9")'
    run = subprocess.run([sys.executable, '-c', code], env=os.environ | dict(PYTHONIOENCODING=encoding),
                         capture_output=True)
    assert run.returncode == 0 and run.stdout.decode(encoding) == run.stderr.decode(encoding)
    assert r'\udce9' in run.stdout.decode(encoding)


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a POSIX shell')
@pytest.mark.parametrize('closed', ['2>&-', '1>&- 2>&-', '0<&- 1>&- 2>&-', '1>&-'])
def test_no_message_is_written_into_a_file_if_a_stream_is_closed(tmp_path, closed):
    code = f'''
import os, sys
from effdet_nb.core.console import log_message, progress_bar, prepare_streams
prepare_streams()
with open({str(tmp_path/"data")!r}, 'wb') as f:
    assert f.fileno() > 2
    print('result'), log_message('note'), list(progress_bar(range(3)))
    os.write(2, b'message of a library')
    f.write(b'data')
'''
    (tmp_path/'run.py').write_text(code)
    run = subprocess.run(f'{sys.executable} {tmp_path}/run.py {closed}', shell=True, capture_output=True)
    assert run.returncode == 0 and (tmp_path/'data').read_bytes() == b'data'


@pytest.mark.parametrize('name', ['\x1b[2J', '\x1b]0;title\x07', '\r', '\x00', '\x9b31m', '\x7f', 'a\u202eb', '\x08'])
def test_control_characters_of_a_name_do_not_reach_the_terminal(name, capsys):
    log_message(f'warning: {name} is missing')
    out, err = capsys.readouterr()
    assert name not in err and '\\' in err and err.count('\n') == 1
    assert all(c.isprintable() or c == '\n' for c in err)


@pytest.mark.parametrize('text', ['caf\xe9', '\u767d\u8840', 'a\tb\nc', '\U0001f534', ''])
def test_other_text_is_printed_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize('seconds_of_items, left', [([60, 0, 0, 0], '1 min'), ([1, 1, 1, 1], '4 s'), ([8, 8], '48 s')])
def test_time_left_counts_every_item_of_loops_that_compile_nothing(monkeypatch, capsys, seconds_of_items, left):
    now = [0.]
    monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
    items = iter(console.progress_bar(range(8), desc='shards', interval=0))
    for seconds in seconds_of_items:
        next(items)
        now[0] += seconds
    next(items)
    assert f'{left}' in capsys.readouterr().err.splitlines()[-1]


def test_time_left_leaves_out_a_first_item_that_compiles(monkeypatch, capsys):
    now = [0.]
    monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
    items = iter(console.progress_bar(range(8), desc='evaluate', interval=0, skip_first=True))
    for seconds in (60, 1, 1):
        next(items)
        now[0] += seconds
    next(items)
    assert '5 s left' in capsys.readouterr().err.splitlines()[-1]
