"""python -m stages.runtime.host DESCRIPTOR MODULE...: import the modules, then fork what the socket asks for."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from contextlib import suppress

from stages.runtime.preloaded import serve
from stages.runtime.quiet import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that a library that asks for GPUs leaves CUDA alone
    for module in sys.argv[2:]:
        with suppress(Exception):  # the stage imports it too, and reports what is wrong with it
            importlib.import_module(module)
    serve(socket.socket(fileno=int(sys.argv[1])))
