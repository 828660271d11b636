"Guards of the seal: bytes come back as they were sealed, or are refused with a sentence."
import io, os, time, tracemalloc
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from zlib import crc32
from effdet_nb.model import seal as seals
from effdet_nb.model.seal import CHUNK, DamagedFile, HEAD, HEADER, SealReader, SealWriter, StoreError, TAG, WrongKey, nonce, resolve_key, seal, unseal

KEY = 'a secret nobody may see'
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def cheap(monkeypatch):
    "A quick scrypt that still depends on key, salt and parameters, for the tests which open files by the hundred."
    real, cache = seals.stretch, {}
    def stretch(key, salt, log_n=15, r=8, p=1):
        if (key, salt, log_n, r, p) not in cache: cache[key, salt, log_n, r, p] = real(key, salt + bytes([log_n, r, p]), 10, 1, 1)
        return cache[key, salt, log_n, r, p]
    monkeypatch.setattr(seals, 'stretch', stretch)


def refused(read, kind=StoreError):
    "The error a reading must end in; it may not say the key."
    with pytest.raises(kind) as e: read()
    assert KEY not in str(e.value) and KEY not in repr(e.value)
    assert e.value.__suppress_context__ or e.value.__context__ is None   # nothing of ciphers and zips in the traceback
    return str(e.value)


# --- round trips

@quick
@given(st.binary(max_size=200), st.integers(16, 40), st.text(min_size=1))
def test_any_bytes_come_back_through_the_seal(cheap, data, chunk, key):
    sealed = seal(data, key, chunk)
    assert len(sealed)==HEAD + len(data) + TAG*max(1, -(-len(data)//chunk))
    assert unseal(sealed, key)==data


@quick
@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(0, 320), st.integers(0, 320))), st.lists(st.integers(1, 50)))
def test_the_stream_reads_like_a_file(cheap, data, moves, cuts):
    out, rest = io.BytesIO(), data
    with SealWriter(out, KEY, 32) as w:
        for n in cuts: w.write(rest[:n]); rest = rest[n:]
        w.write(rest)
    ours, plain = io.BufferedReader(SealReader(io.BytesIO(out.getvalue()), KEY)), io.BytesIO(data)
    for to,n in moves:
        ours.seek(to); plain.seek(to)
        assert ours.read(n)==plain.read(n)


# --- the seal under attack

def unsealed(sealed): return lambda: unseal(sealed, KEY)

@pytest.fixture
def chunks(cheap):
    good = seal(bytes(range(100)), KEY, 16)   # six full chunks and one of four bytes
    return good[:HEAD], [good[i:i+16+TAG] for i in range(HEAD, len(good), 16+TAG)]


def test_every_bit_of_header_and_body(chunks):
    good = chunks[0] + b''.join(chunks[1])
    assert unseal(good, KEY)==bytes(range(100))
    for i in range(len(good)):
        for bit in (1, 128): refused(unsealed(good[:i] + bytes([good[i]^bit]) + good[i+1:]))


def test_every_truncation_and_appending(chunks):
    good = chunks[0] + b''.join(chunks[1])
    for n in range(len(good)): refused(unsealed(good[:n]), DamagedFile)
    for tail in (b'\0', b'!', bytes(15), bytes(16), bytes(32), good[-32:], good[HEAD:], good): refused(unsealed(good + tail), DamagedFile)


def test_chunks_are_bound_to_their_place(chunks):
    head, parts = chunks
    for i in range(len(parts)):
        for j in range(i): refused(unsealed(head + b''.join(parts[k] if k not in (i,j) else parts[i+j-k] for k in range(len(parts)))), DamagedFile)
        refused(unsealed(head + b''.join(parts[:i] + parts[i+1:])), DamagedFile)
        refused(unsealed(head + b''.join(parts[:i] + [parts[i]] + parts[i:])), DamagedFile)


def test_chunks_are_bound_to_their_file(chunks):
    head, parts = chunks
    other = seal(bytes(100), KEY, 16)
    refused(unsealed(other[:HEAD] + b''.join(parts)), DamagedFile)
    refused(unsealed(head + other[HEAD:HEAD+32] + b''.join(parts[1:])), DamagedFile)


@pytest.mark.parametrize('field, value, kind', [(1, 2, StoreError), (2, 14, WrongKey), (2, 40, DamagedFile), (3, 200, DamagedFile), (4, 0, DamagedFile), (4, 255, DamagedFile),
    (5, 0, DamagedFile), (5, 2**31, DamagedFile), (5, 32, DamagedFile), (6, bytes(16), WrongKey), (7, bytes(7), DamagedFile), (8, bytes(16), WrongKey)])
def test_a_header_forged_with_its_checksum(chunks, field, value, kind):
    fields = list(HEADER.unpack(chunks[0][:-4]))
    fields[field] = value
    body = HEADER.pack(*fields)
    refused(unsealed(body + crc32(body).to_bytes(4, 'little') + b''.join(chunks[1])), kind)


def test_every_header_byte_even_with_its_checksum_corrected(chunks):
    head, parts = chunks
    for i in range(HEAD-4):
        body = head[:i] + bytes([head[i]^1]) + head[i+1:HEAD-4]
        refused(unsealed(body + crc32(body).to_bytes(4, 'little') + b''.join(parts)))


def test_nonces_never_repeat():
    assert len({nonce(bytes(7), i, last) for i in range(1000) for last in (False, True)})==2000
    assert len({seal(b'', 'k')[18:41] for _ in range(5)})==5


def test_memory_stays_bounded(tmp_path):
    "64 MB pass through the seal in both directions with a few chunks in memory (scrypt's own 32 MB is not Python's)."
    block = os.urandom(2**20)
    tracemalloc.start()
    with open(tmp_path/'big', 'wb') as f, SealWriter(f, KEY) as w:
        for _ in range(64): w.write(block)
    with open(tmp_path/'big', 'rb') as f:
        r = io.BufferedReader(SealReader(f, KEY), CHUNK)
        assert all(r.read(2**20)==block for _ in range(64)) and r.read()==b''
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8*2**20


def test_guessing_costs_but_opening_does_not():
    start = time.process_time()
    seals.stretch(KEY, bytes(16))
    assert .005 < time.process_time()-start < 2


def test_resolve_key(monkeypatch):
    monkeypatch.delenv('EFFDET_KEY', raising=False)
    assert resolve_key('')==resolve_key(None)==''
    monkeypatch.setenv('EFFDET_KEY', 'from outside')
    assert resolve_key('')==resolve_key(None)=='from outside' and resolve_key('typed')=='typed'


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([1, 2, 8]))
def test_random_bits_of_a_body_of_real_chunks(seed, whole, bits):
    "Bodies of chunks of the size we write, any few bits of them turned."
    rng = np.random.default_rng(seed)
    good = seal(rng.bytes(whole*CHUNK + int(rng.integers(0, CHUNK))), KEY)
    bad = bytearray(good)
    for i in rng.choice(np.arange(HEAD, len(good)), bits, replace=False): bad[i] ^= 1 << int(rng.integers(8))
    refused(lambda: unseal(bytes(bad), KEY), DamagedFile)
