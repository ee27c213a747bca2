"""What a reader must know of the machine, from /proc and the programs themselves."""

import os
import platform
import re
from pathlib import Path

# What decides the speed of matrix products on x86-64.
FLAGS = ["avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"]


def field(text, name):
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def facts(threads):
    """Pairs of name and value."""
    cpu = Path("/proc/cpuinfo").read_text()
    memory = field(Path("/proc/meminfo").read_text(), "MemTotal")
    flags = set(field(cpu, "flags").split())
    family = "/".join(field(cpu, name) for name in ("cpu family", "model", "stepping"))
    return [
        ("processor", f"{field(cpu, 'model name')} (family/model/stepping {family})"),
        ("cores", f"{os.cpu_count()}, of which {threads} are used"),
        ("of its instructions", " ".join(flag for flag in FLAGS if flag in flags)),
        ("cache", field(cpu, "cache size")),
        ("memory", f"{int(memory.split()[0]) / 1024**2:.1f} GiB"),
        ("system", f"{platform.system()} {platform.release()}, {'virtual' if 'hypervisor' in flags else 'bare'} machine"),
        ("load before the run", " ".join(f"{load:.2f}" for load in os.getloadavg())),
    ]
