"Times several variants of one task, turn by turn, so that a busy machine slows all of them alike."
import statistics
import time


def time_call(function):
    "Seconds of one call."
    start = time.perf_counter()
    function()
    return time.perf_counter()-start


def time_interleaved(variants, rounds=15, warmup=2):
    "Calls each of `variants` (name → function without arguments) once a round; returns name → list of seconds."
    for _ in range(warmup):
        for variant in variants.values(): variant()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items(): seconds[name].append(time_call(variant))
    return seconds


def median_ratio(seconds, other_seconds):
    "How many times as fast as the other one: the median of the rounds' ratios."
    return statistics.median(other/own for own, other in zip(seconds, other_seconds))


def print_timings(title, seconds, baseline):
    "Prints a Markdown table: median, fastest, and how many times as fast as `baseline`."
    print(f'\n| {title} | median ms | fastest ms | times `{baseline}` |\n|---|---|---|---|')
    for name, mine in seconds.items():
        ratio = median_ratio(mine, seconds[baseline])
        print(f'| {name} | {1e3*statistics.median(mine):.1f} | {1e3*min(mine):.1f} | {ratio:.2f} |')
