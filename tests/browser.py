"One browser for many pages: chromium, asked through the pipe of its DevTools protocol. No driver and no port are needed."
import base64
import json
import os
import shutil
import subprocess
import sys
import time

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHROMIUM_FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--hide-scrollbars', '--remote-debugging-pipe']

PIPE_LAUNCHER = 'import fcntl, os, sys; ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 50) for n in sys.argv[1:3]]; os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[3], sys.argv[3:])' # it hears at 3, speaks at 4


class Browser:
    "A headless chromium with one tab. `asked` lists the addresses a page wanted, `said` what it complained about."
    def __init__(self, profile, timeout=60):
        ours_out, theirs_in = os.pipe(), os.pipe()        # what it says; what it hears
        self.timeout, self.count, self.said, self.asked, self.events, self.partial_line = timeout, 0, [], [], [], b''
        self.process = subprocess.Popen([sys.executable, '-c', PIPE_LAUNCHER, str(theirs_in[0]), str(ours_out[1]), CHROMIUM, *CHROMIUM_FLAGS, f'--user-data-dir={profile}', 'about:blank'],
                                        pass_fds=(theirs_in[0], ours_out[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in[0]); os.close(ours_out[1])
        self.reads, self.writes, self.session = ours_out[0], theirs_in[1], None
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self.session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self.send(f'{domain}.enable')

    def __enter__(self): return self
    def __exit__(self, *error):
        os.close(self.writes)                             # it ends when nobody is there to ask
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        os.close(self.reads)

    def message(self):
        "The next thing the browser says."
        end = time.monotonic()+self.timeout
        while b'\0' not in self.partial_line:
            data = os.read(self.reads, 2**16)
            if not data or time.monotonic()>end: raise RuntimeError('the browser ended, or says nothing')
            self.partial_line += data
        one, _, self.partial_line = self.partial_line.partition(b'\0')
        return self.note(json.loads(one))

    def note(self, m):
        "Keeps what may matter of an event."
        kind, p = m.get('method', ''), m.get('params', {})
        if kind=='Network.requestWillBeSent': self.asked.append(p['request']['url'])
        if kind=='Network.loadingFailed' and not p.get('canceled'): self.said.append(f'not loaded: {p["type"]} {p["errorText"]}')
        if kind=='Log.entryAdded' and p['entry']['level']=='error': self.said.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
        if kind=='Runtime.exceptionThrown': self.said.append(p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text']))
        if kind=='Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'): self.said.append(' '.join(str(a.get('value', a.get('description'))) for a in p['args']))
        if kind: self.events.append(kind)
        return m

    def send(self, method, **params):
        "Asks something and waits for the answer."
        self.count += 1
        message = dict(id=self.count, method=method, params=params) | ({'sessionId': self.session} if self.session else {})
        os.write(self.writes, json.dumps(message).encode()+b'\0')
        while (m := self.message()).get('id')!=self.count: pass
        if 'error' in m: raise RuntimeError(f'{method}: {m["error"]["message"]}')
        return m['result']

    def open(self, url):
        "Goes to a page; returns when it and all it needs are loaded."
        self.events.clear()
        self.send('Page.navigate', url=url)
        while 'Page.loadEventFired' not in self.events: self.message()

    def run(self, script):
        "The value of a JavaScript expression, a promise's when it is kept."
        out = self.send('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in out: raise RuntimeError(f'{script}: {out["exceptionDetails"]["exception"]["description"]}')
        return out['result'].get('value')

    def until(self, script, seconds=15):
        "Waits until an expression is true; says whether it became so."
        end = time.monotonic()+seconds
        while not (true := self.run(script)) and time.monotonic()<end: time.sleep(.1)
        return true

    def size(self, width, height, dark=False, mobile=False):
        "Sets the window and the wish for a dark page."
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.send('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])

    def shot(self, path):
        "Draws the window into a PNG file, with everything that slides at its place."
        self.run('document.body.offsetWidth; for (const a of document.getAnimations()) try { a.finish() } catch (e) {}')
        path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot', format='png', optimizeForSpeed=True)['data']))
