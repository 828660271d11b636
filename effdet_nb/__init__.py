__version__ = "0.1.0"
import os
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')   # about half the time on an x86 CPU without AVX-512 (measured on AVX2), where TensorFlow leaves it off. See "What a CPU can do" in nbs/model/29_detect.ipynb
