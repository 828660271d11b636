__version__ = "0.1.0"
import os

# TensorFlow reads this when it is imported. On x86 CPUs without AVX-512 it leaves oneDNN off, and a step or a pass then
# takes about twice the time (measured on AVX2): see "The oneDNN kernels" in nbs/accel/05_cpu_session.ipynb.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
