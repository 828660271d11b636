__version__ = "0.1.0"
import os
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')   # half the time on any x86 CPU; TensorFlow leaves it off on most without AVX-512. See "What a CPU can do" in nbs/model/27_detect.ipynb
