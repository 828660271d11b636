"Encryption: bytes are read back as they were encrypted, or refused with a reason."

import io, os, sys, time, tracemalloc
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from zlib import crc32
from effdet_nb.weights import encryption as encryption
from effdet_nb.weights.encryption import (
    CHUNK_SIZE,
    DamagedFileError,
    HEADER_SIZE,
    HEADER_STRUCT,
    DecryptingReader,
    EncryptingWriter,
    ModelFileError,
    TAG_SIZE,
    WrongKeyError,
    chunk_nonce,
    resolve_key,
    encrypt,
    decrypt,
)

KEY = 'a secret that no message may show'
few_examples = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def cheap_scrypt(monkeypatch):
    "A quick scrypt that still depends on key, salt and parameters, for tests which open files by the hundred."
    real, cache = encryption.derive_key, {}

    def stretch(key, salt, log_n=15, r=8, p=1):
        if (key, salt, log_n, r, p) not in cache:
            cache[key, salt, log_n, r, p] = real(key, salt + bytes([log_n, r, p]), 10, 1, 1)
        return cache[key, salt, log_n, r, p]

    monkeypatch.setattr(encryption, 'derive_key', stretch)


def refused(read, kind=ModelFileError):
    "The error a reading must end in; it may not say the key."
    with pytest.raises(kind) as e:
        read()
    assert KEY not in str(e.value) and KEY not in repr(e.value)
    assert e.value.__suppress_context__ or e.value.__context__ is None  # nothing of ciphers and zips in the traceback
    return str(e.value)


# --- round trips


@few_examples
@given(st.binary(max_size=200), st.integers(16, 40), st.text(min_size=1))
def test_any_bytes_are_decrypted_as_they_were(cheap_scrypt, data, chunk, key):
    encrypted = encrypt(data, key, chunk)
    assert len(encrypted) == HEADER_SIZE + len(data) + TAG_SIZE * max(1, -(-len(data) // chunk))
    assert decrypt(encrypted, key) == data


@few_examples
@given(
    st.binary(max_size=300),
    st.lists(st.tuples(st.integers(0, 320), st.integers(0, 320))),
    st.lists(st.integers(1, 50)),
)
def test_the_reader_seeks_and_reads_like_a_file(cheap_scrypt, data, moves, cuts):
    out, rest = io.BytesIO(), data
    with EncryptingWriter(out, KEY, 32) as w:
        for n in cuts:
            w.write(rest[:n])
            rest = rest[n:]
        w.write(rest)
    ours, plain = io.BufferedReader(DecryptingReader(io.BytesIO(out.getvalue()), KEY)), io.BytesIO(data)
    for to, n in moves:
        ours.seek(to)
        plain.seek(to)
        assert ours.read(n) == plain.read(n)


# --- encryption under attack


def decrypting(encrypted):
    return lambda: decrypt(encrypted, KEY)


@pytest.fixture
def chunks(cheap_scrypt):
    good = encrypt(bytes(range(100)), KEY, 16)  # six full chunks and one of four bytes
    return good[:HEADER_SIZE], [good[i : i + 16 + TAG_SIZE] for i in range(HEADER_SIZE, len(good), 16 + TAG_SIZE)]


def test_every_flipped_bit_is_refused(chunks):
    good = chunks[0] + b''.join(chunks[1])
    assert decrypt(good, KEY) == bytes(range(100))
    for i in range(len(good)):
        for bit in (1, 128):
            refused(decrypting(good[:i] + bytes([good[i] ^ bit]) + good[i + 1 :]))


def test_every_truncation_and_appended_bytes_are_refused(chunks):
    good = chunks[0] + b''.join(chunks[1])
    for n in range(len(good)):
        refused(decrypting(good[:n]), DamagedFileError)
    for tail in (b'\0', b'!', bytes(15), bytes(16), bytes(32), good[-32:], good[HEADER_SIZE:], good):
        refused(decrypting(good + tail), DamagedFileError)


def test_chunks_are_bound_to_their_place(chunks):
    head, parts = chunks
    for i in range(len(parts)):
        for j in range(i):
            refused(
                decrypting(
                    head + b''.join(parts[k] if k not in (i, j) else parts[i + j - k] for k in range(len(parts)))
                ),
                DamagedFileError,
            )
        refused(decrypting(head + b''.join(parts[:i] + parts[i + 1 :])), DamagedFileError)
        refused(decrypting(head + b''.join(parts[:i] + [parts[i]] + parts[i:])), DamagedFileError)


def test_chunks_are_bound_to_their_file(chunks):
    head, parts = chunks
    other = encrypt(bytes(100), KEY, 16)
    refused(decrypting(other[:HEADER_SIZE] + b''.join(parts)), DamagedFileError)
    refused(decrypting(head + other[HEADER_SIZE : HEADER_SIZE + 32] + b''.join(parts[1:])), DamagedFileError)


@pytest.mark.parametrize(
    'field, value, kind',
    [
        (1, 2, ModelFileError),
        (2, 14, WrongKeyError),
        (2, 40, DamagedFileError),
        (3, 200, DamagedFileError),
        (4, 0, DamagedFileError),
        (4, 255, DamagedFileError),
        (5, 0, DamagedFileError),
        (5, 2**31, DamagedFileError),
        (5, 32, DamagedFileError),
        (6, bytes(16), WrongKeyError),
        (7, bytes(7), DamagedFileError),
        (8, bytes(16), WrongKeyError),
    ],
)
def test_a_forged_header_with_a_valid_checksum_is_refused(chunks, field, value, kind):
    fields = list(HEADER_STRUCT.unpack(chunks[0][:-4]))
    fields[field] = value
    body = HEADER_STRUCT.pack(*fields)
    refused(decrypting(body + crc32(body).to_bytes(4, 'little') + b''.join(chunks[1])), kind)


def test_every_changed_header_byte_is_refused_with_a_valid_checksum(chunks):
    head, parts = chunks
    for i in range(HEADER_SIZE - 4):
        body = head[:i] + bytes([head[i] ^ 1]) + head[i + 1 : HEADER_SIZE - 4]
        refused(decrypting(body + crc32(body).to_bytes(4, 'little') + b''.join(parts)))


def test_nonces_never_repeat():
    assert len({chunk_nonce(bytes(7), i, last) for i in range(1000) for last in (False, True)}) == 2000
    assert len({encrypt(b'', 'k')[18:41] for _ in range(5)}) == 5


def test_streams_need_little_memory(tmp_path):
    "64 MB pass through encryption in both directions with a few chunks in memory (scrypt's own 32 MB is not Python's)."
    block = os.urandom(2**20)
    tracemalloc.start()
    with open(tmp_path / 'big', 'wb') as f, EncryptingWriter(f, KEY) as w:
        for _ in range(64):
            w.write(block)
    with open(tmp_path / 'big', 'rb') as f:
        r = io.BufferedReader(DecryptingReader(f, KEY), CHUNK_SIZE)
        assert all(r.read(2**20) == block for _ in range(64)) and r.read() == b''
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_deriving_a_key_takes_neither_too_little_nor_too_much_time():
    start = time.process_time()
    encryption.derive_key(KEY, bytes(16))
    assert 0.005 < time.process_time() - start < 20


def test_the_key_comes_from_the_argument_or_the_environment(monkeypatch):
    monkeypatch.delenv('EFFDET_KEY', raising=False)
    assert resolve_key('') == resolve_key(None) == ''
    monkeypatch.setenv('EFFDET_KEY', 'from outside')
    assert resolve_key('') == resolve_key(None) == 'from outside' and resolve_key('typed') == 'typed'


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([1, 2, 8]))
def test_random_flipped_bits_in_chunks_of_real_size_are_refused(seed, whole, bits):
    "Bodies of chunks of the size we write, any few bits of them turned."
    rng = np.random.default_rng(seed)
    good = encrypt(rng.bytes(whole * CHUNK_SIZE + int(rng.integers(0, CHUNK_SIZE))), KEY)
    bad = bytearray(good)
    for i in rng.choice(np.arange(HEADER_SIZE, len(good)), bits, replace=False):
        bad[i] ^= 1 << int(rng.integers(8))
    refused(lambda: decrypt(bytes(bad), KEY), DamagedFileError)


@pytest.mark.parametrize('num_writes', [1, 2, 3])
def test_a_writer_whose_file_is_full_is_closed_and_writes_no_more(num_writes, cheap_scrypt, monkeypatch):
    "Python 3.13 prints the traceback of an error in `close` at the end of an object."
    class FullFile(io.BytesIO):
        num_left = num_writes
        def write(self, data):
            self.num_left -= 1
            if self.num_left<0: raise OSError(28, 'No space left on device')
            return super().write(data)
    ignored = []
    monkeypatch.setattr(sys, 'unraisablehook', ignored.append)
    with pytest.raises(OSError, match='No space left'):
        with EncryptingWriter(FullFile(), KEY, 16) as writer: writer.write(bytes(100))
    assert writer.closed
    del writer
    assert not ignored
