"""A llama-server on a GPU whose memory the fake NVML library (`fake_nvml.c`) counts; it computes on the CPU.

gpu_memory_server.py LLAMA_SERVER FOLDER [llama-server's flags]

A model takes as many MiB as its id ends with (`big-20000`), whatever context it is given. If so much is not free, it
prints what llama.cpp's CUDA build prints, and exits. FOLDER has a file for each server, named by its pid, as the
library reads them.
"""

import os
import sys
from pathlib import Path

TOTAL_MIB, OTHERS_MIB = 23034, 1000
# By ggml-cuda.cu, ggml-alloc.c, llama-model.cpp and server.cpp.
OUT_OF_MEMORY = """\
ggml_backend_cuda_buffer_type_alloc_buffer: allocating {mib:.2f} MiB on device 0: cudaMalloc failed: out of memory
alloc_tensor_range: failed to allocate CUDA0 buffer of size {bytes}
llama_model_load: error loading model: unable to allocate CUDA0 buffer
llama_model_load_from_file_impl: failed to load model
main: exiting due to model loading error
"""


def main() -> None:
    real, folder, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if "-a" in flags:
        mib = int(flags[flags.index("-a") + 1].rpartition("-")[2])
        taken = sum(int(file.read_text()) for file in folder.iterdir() if is_running(int(file.name)))
        if OTHERS_MIB + taken + mib > TOTAL_MIB:
            sys.stderr.write(OUT_OF_MEMORY.format(mib=mib / 2, bytes=mib * 2**19))
            raise SystemExit(1)
        (folder / str(os.getpid())).write_text(str(mib))
        if "-c" in flags:
            flags[flags.index("-c") + 1] = "512"
    os.execv(real, [real, *flags])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()
