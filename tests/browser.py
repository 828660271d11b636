"One browser for many pages: chromium, driven through the pipe of its DevTools protocol, without a driver or a port."
import base64
import json
import os
import shutil
import subprocess
import sys
import time

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHROMIUM_FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
                  '--disable-background-networking', '--disable-component-update', '--hide-scrollbars',
                  '--remote-debugging-pipe']

# Chromium reads commands from file descriptor 3 and writes messages to 4.
PIPE_LAUNCHER = '''
import fcntl, os, sys
ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 50) for n in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
'''


def start_chromium(profile):
    "Starts chromium; returns its process, the file descriptor of its messages and that of its commands."
    message_read, message_write = os.pipe()
    command_read, command_write = os.pipe()
    theirs = (command_read, message_write)
    command = [sys.executable, '-c', PIPE_LAUNCHER, *map(str, theirs), CHROMIUM, *CHROMIUM_FLAGS,
               f'--user-data-dir={profile}', 'about:blank']
    process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for fd in theirs: os.close(fd)
    return process, message_read, command_write


class Browser:
    "A headless chromium with one tab. `requested_urls` and `errors` collect what pages request and complain about."
    def __init__(self, profile, timeout=60):
        self.timeout = timeout
        self.message_id, self.session_id, self.buffer = 0, None, b''
        self.errors, self.requested_urls, self.events = [], [], []
        self.process, self.read_fd, self.write_fd = start_chromium(profile)
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self.session_id = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self.send(f'{domain}.enable')

    def __enter__(self): return self

    def __exit__(self, *error):
        os.close(self.write_fd)                           # chromium ends with its pipe
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        os.close(self.read_fd)

    def read_message(self):
        "Returns the next message of the browser."
        end = time.monotonic()+self.timeout
        while b'\0' not in self.buffer:
            data = os.read(self.read_fd, 2**16)
            if not data or time.monotonic()>end: raise RuntimeError('the browser ended or sent no message in time')
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b'\0')
        message = json.loads(text)
        self.handle_event(message.get('method', ''), message.get('params', {}))
        return message

    def handle_event(self, kind, params):
        "Keeps requests and errors of an event."
        if kind=='Network.requestWillBeSent': self.requested_urls.append(params['request']['url'])
        error = event_error(kind, params)
        if error: self.errors.append(error)
        if kind: self.events.append(kind)

    def send(self, method, **params):
        "Sends a command and returns its result."
        self.message_id += 1
        command = dict(id=self.message_id, method=method, params=params)
        if self.session_id: command['sessionId'] = self.session_id
        os.write(self.write_fd, json.dumps(command).encode()+b'\0')
        while True:
            message = self.read_message()
            if message.get('id')==self.message_id: break
        if 'error' in message: raise RuntimeError(f'{method}: {message["error"]["message"]}')
        return message['result']

    def goto(self, url):
        "Opens a page; returns when it and everything on it is loaded."
        self.events.clear()
        self.send('Page.navigate', url=url)
        while 'Page.loadEventFired' not in self.events: self.read_message()

    def evaluate_js(self, script):
        "Returns the value of a JavaScript expression, awaited if it is a promise."
        out = self.send('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in out:
            raise RuntimeError(f'{script}: {out["exceptionDetails"]["exception"]["description"]}')
        return out['result'].get('value')

    def wait_for(self, script, timeout=15):
        "Waits until a JavaScript expression is true; returns its last value."
        end = time.monotonic()+timeout
        while True:
            value = self.evaluate_js(script)
            if value or time.monotonic()>end: return value
            time.sleep(.1)

    def set_viewport(self, width, height, dark=False, mobile=False):
        "Sets the size of the window and the preferred colour scheme."
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
        self.send('Emulation.setEmulatedMedia', features=[scheme])

    def screenshot(self, path):
        "Writes the window to a PNG file after finishing all animations."
        self.evaluate_js('document.body.offsetWidth; '
                         'for (const a of document.getAnimations()) try { a.finish() } catch (e) {}')
        data = self.send('Page.captureScreenshot', format='png', optimizeForSpeed=True)['data']
        path.write_bytes(base64.b64decode(data))


def event_error(kind, params):
    "Returns the complaint in a DevTools event, or None."
    if kind=='Network.loadingFailed' and not params.get('canceled'):
        return f'not loaded: {params["type"]} {params["errorText"]}'
    if kind=='Log.entryAdded' and params['entry']['level']=='error':
        return f"{params['entry']['text']} {params['entry'].get('url', '')}"
    if kind=='Runtime.exceptionThrown':
        details = params['exceptionDetails']
        return details.get('exception', {}).get('description', details['text'])
    if kind=='Runtime.consoleAPICalled' and params['type'] in ('error', 'assert'):
        return ' '.join(str(a.get('value', a.get('description'))) for a in params['args'])
    return None
