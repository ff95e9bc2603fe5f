"""Give every tutorial the same fresh torch: seeds, precision, threads, compiler.

Sphinx-Gallery runs all scripts in one process and calls ``reset`` (named in
``conf.py``) before and after each of them. What it needs of torch's private ways
stands here alone.
"""

import gc
import os
import random
import sys
import tempfile
import types

import numpy as np
import torch

# Each switch with the value that it has in a fresh process.
_SWITCHES = [
    (owner, name, getattr(owner, name))
    for owner, name in [
        (torch.backends.cudnn.conv, "fp32_precision"),
        (torch.backends.cudnn.rnn, "fp32_precision"),
        (torch.backends.cuda.matmul, "fp32_precision"),
        (torch.backends.mkldnn.conv, "fp32_precision"),
        (torch.backends.mkldnn.matmul, "fp32_precision"),
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "enabled"),
    ]
]
_NUM_THREADS = torch.get_num_threads()
_compiled = None  # the folder in which the compiler keeps what it made for this page


def reset(gallery_conf, fname):
    """Put back every global state of torch that a tutorial may have changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_num_threads(_NUM_THREADS)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")  # first: it changes a switch below
    for owner, name, value in _SWITCHES:
        setattr(owner, name, value)
    forget_compiled()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def forget_compiled():
    """The first call of a page is a first call: nothing compiled before is left."""
    global _compiled
    _compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name
    os.environ.pop("TRITON_CACHE_DIR", None)
    if "torch._inductor.utils" in sys.modules:  # not imported before the first compile
        torch._inductor.utils.clear_caches()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        # It keeps the first __main__ that it met. Every script has one of its own.
        torch._dynamo.symbolic_convert._import_module.cache_clear()
        for module in list(sys.modules.values()):
            if isinstance(module, types.ModuleType):
                vars(module).pop("__import___main__", None)
