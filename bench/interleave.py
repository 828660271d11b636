"Times several ways of doing one thing, turn by turn, so that a busy machine is unkind to all of them alike."
import statistics
import time


def time_interleaved(ways, rounds=15, warmup=2):
    "Calls each of `ways` (name → function without arguments) once a round and returns name → list of seconds."
    for _ in range(warmup):
        for way in ways.values(): way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter()-start)
    return seconds


def print_timings(title, seconds, base):
    "Prints a markdown table: median, fastest, and how many times as fast as `base`, as the median of the rounds' ratios."
    print(f'\n| {title} | median ms | fastest ms | times `{base}` |\n|---|---|---|---|')
    for name, mine in seconds.items():
        ratio = statistics.median(theirs/own for theirs, own in zip(seconds[base], mine))
        print(f'| {name} | {1e3*statistics.median(mine):.1f} | {1e3*min(mine):.1f} | {ratio:.2f} |')
