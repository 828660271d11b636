"""Runs notebooks as nbdev_test does, and fails too if a cell now gives other text than the notebook keeps.

    python tools/check_outputs.py [options of nbdev_test]

This is nbdev_test, with its options and its exit code; only the shell that runs the cells is another one, so comparing
costs no second run. Text is what a cell prints and the plain text of what it displays. Images, HTML and stderr are not
compared. A cell whose text depends on the machine, such as the result of a training, says so in its first lines:
`#| varies`."""
import difflib
import math
import os
import re

import nbdev.test
from execnb.shell import CaptureShell
from IPython.core.displayhook import DisplayHook


# A version of three parts is text. All else that looks like a number is one.
NUMBER = re.compile(r'(?<![\w.])([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?![\w]|\.\d)', re.I)
# Other processors add float32 numbers in another order. What that changes is far below 2 %, except near zero.
REL_TOL, ABS_TOL = .02, 1e-6
MAX_LINES = 12       # of a difference that is shown


class OutputDiffers(Exception): pass


def output_texts(outputs, is_quiet=False):
    "The text of a cell: everything that it printed, then each object that it displayed, unless a `;` ends the cell."
    printed = [''.join(o['text']) for o in outputs if o['output_type']=='stream' and o['name']=='stdout']
    displayed = [o for o in outputs if o['output_type']=='display_data' or 'data' in o and not is_quiet]
    shown = [''.join(o['data'].get('text/plain', '')) for o in displayed]
    texts = ['' if is_quiet else ''.join(printed), *filter(None, shown)]       # execnb drops what quiet cells print
    return list(map(comparable_text, texts))


def comparable_text(text):
    "A text without what depends on libraries: the class of a path, and the size of the images in HTML."
    return re.sub(r'Html\([\d,]+ characters\)', 'Html', text.replace('PosixPath(', 'Path('))


def is_close(kept, new):
    "Whether two numbers in a text are equal, or floats that differ by rounding."
    if kept.lstrip('+-').isdigit() and new.lstrip('+-').isdigit(): return int(kept)==int(new)
    return math.isclose(float(kept), float(new), rel_tol=REL_TOL, abs_tol=ABS_TOL)


def is_same_text(kept, new):
    "Whether two texts agree, apart from rounding and from the spaces that align columns."
    kept_parts, new_parts = NUMBER.split(kept), NUMBER.split(new)
    if len(kept_parts)!=len(new_parts): return False
    same_words = all(''.join(k.split())==''.join(n.split()) for k,n in zip(kept_parts[::2], new_parts[::2]))
    return same_words and all(map(is_close, kept_parts[1::2], new_parts[1::2]))


def is_same(kept, new): return len(kept)==len(new) and all(map(is_same_text, kept, new))


def difference(kept, new):
    "The lines that differ, as a diff of at most `MAX_LINES`."
    kept_lines, new_lines = ('\n'.join(filter(None, texts)).splitlines() for texts in (kept, new))
    lines = list(difflib.unified_diff(kept_lines, new_lines, lineterm='', n=0))[2:]
    lines = [f'    {line}' for line in lines if not line.startswith('@@')]
    more = [f'    and {len(lines)-MAX_LINES} more lines'] if len(lines)>MAX_LINES else []
    return '\n'.join(lines[:MAX_LINES] + more)


class ComparingShell(CaptureShell):
    "Runs the cells of a notebook, and fails after the last one if the text of any differs from the kept one."
    def cell(self, cell, **kwargs):
        if cell.cell_type!='code': return
        is_quiet = DisplayHook.semicolon_at_end_of_expression(cell.source)
        kept, cell.outputs = output_texts(cell.get('outputs', []), is_quiet), []
        super().cell(cell, **kwargs)
        new = output_texts(cell.outputs, is_quiet)
        if not self.exc and 'varies' not in cell.directives_ and not is_same(kept, new):
            self.differences.append(f'cell {cell.id} (- kept, + now):\n{difference(kept, new)}')

    def run_all(self, nb, **kwargs):
        self.differences = []
        super().run_all(nb, **kwargs)
        if not self.differences: return
        self._cell_idx = None
        self.exc = OutputDiffers('\n'.join([
            'the notebook keeps other text than its cells give. Run it again, look at its outputs, save; or begin a '
            'cell whose text depends on the machine with "#| varies".', *self.differences]))
        raise self.exc


nbdev.test.CaptureShell = ComparingShell     # at the top, because processes that are spawned import this file


if __name__ == '__main__':
    os.environ['COLUMNS'] = '80'             # as in the kernel of a notebook, whatever the width of this terminal
    nbdev.test.nbdev_test()
