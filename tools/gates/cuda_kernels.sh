#!/usr/bin/env bash
# Compiles every CUDA kernel for the GPUs that are supported, without one: no warning, no register spilled to memory,
# and the PTX in the tree is that of the kernels in the tree. NVRTC comes from its wheel, for Linux on x86-64 and ARM.
source "$(dirname "$0")/common/gate.sh"
pip_into "$folder/nvrtc" nvidia-cuda-nvrtc-cu12==12.4.127
PYTHONPATH="$folder/nvrtc" python3 -B "$root/tools/cuda/ptx.py"
