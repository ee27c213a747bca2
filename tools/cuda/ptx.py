#!/usr/bin/env python3
"""Compiles the CUDA kernels with NVRTC, and keeps the PTX that is shipped in step with them.

    ptx.py            compiles every kernel for every GPU, prints what each needs, and fails on a warning, on
                      registers that spill, or if crates/lnv-kernels/src/cuda/ptx holds anything else than what
                      NVRTC gives now
    ptx.py --write    the same, and writes that folder

Options: --only NAME (files of kernels, by name), --arch sm_NN (may be repeated; the PTX of others is left alone),
--nvrtc DIR (a folder with libnvrtc.so.12; else the wheel nvidia-cuda-nvrtc-cu12 is looked for where Python
looks for packages), --table FILE (what each kernel needs, for the emulator's LNV_EMULATOR_RESOURCES).

Decision: PTX is committed, so that neither a build nor a user needs CUDA's compiler; the driver translates it. One
compiler makes it, 12.4.127, because others' output differs. NVRTC is given a kernel's text and no path, so its output
is the same everywhere. It is compiled to machine code too, for what only that shows: registers, spills, memory.
Refused: any compiler driver, and anything beyond the standard library.
"""

import argparse
import concurrent.futures
import ctypes
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "crates/lnv-kernels/src/cuda/kernels"
PTX = ROOT / "crates/lnv-kernels/src/cuda/ptx"
CHECKED = ["sm_80", "sm_89", "sm_90a"]
SHIPPED = ["sm_80", "sm_90a"]
VERSION = "12.4"


def find_nvrtc(given):
    """The folder that holds NVRTC's libraries."""
    places = [pathlib.Path(given)] if given else [
        pathlib.Path(entry) / "nvidia/cuda_nvrtc/lib" for entry in sys.path if entry]
    for place in places:
        if (place / "libnvrtc.so.12").exists():
            return place
    sys.exit("ptx.py: no NVRTC here; pip install nvidia-cuda-nvrtc-cu12==12.4.127, or say --nvrtc DIR")


def load_nvrtc(folder):
    ctypes.CDLL(str(folder / f"libnvrtc-builtins.so.{VERSION}"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


def output(nvrtc, what, program):
    """What NVRTC made: the log, the PTX or the machine code."""
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != 0:
        return b""
    text = ctypes.create_string_buffer(max(size.value, 1))
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.raw[: size.value]


def compile_one(folder, name, arch):
    """(status, log, PTX) of a file of kernels."""
    nvrtc = load_nvrtc(folder)
    # Lines are named for messages only: nothing of them is in the PTX.
    source = "".join(
        f'#line 1 "{file}"\n{(KERNELS / file).read_text()}' for file in ["prelude.cu", f"{name}.cu"])
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    log = output(nvrtc, "ProgramLog", program).rstrip(b"\0").decode()
    ptx = output(nvrtc, "PTX", program).rstrip(b"\0").decode() if status == 0 else ""
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log, ptx


def needs(log):
    """Of each entry point in a log: {name: {registers, shared, stack, spilled}}."""
    found, name = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry[1]
            found[name] = {"registers": 0, "shared": 0, "stack": 0, "spilled": 0}
        elif name is None:
            continue
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[name]["stack"] += int(frame[1])
            found[name]["spilled"] += int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            found[name]["registers"] = int(used[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                found[name]["shared"] = int(shared[1])
    return found


def complaints(status, log):
    """Lines of a log that are more than information."""
    if status != 0:
        return log.splitlines() or [f"NVRTC gives up with status {status}"]
    return [line for line in log.splitlines() if re.search(r"warning|error|advisory", line, re.IGNORECASE)]


def check_ptx(path, ptx, write):
    """What is wrong with a shipped file."""
    old = path.read_text() if path.exists() else None
    if old == ptx:
        return []
    if write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(ptx)
        print(f"wrote {path.relative_to(ROOT)}")
        return []
    return [f"{path.relative_to(ROOT)} is {'missing' if old is None else 'stale'}: run tools/cuda/ptx.py --write"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--arch", action="append", default=[])
    parser.add_argument("--nvrtc")
    parser.add_argument("--table")
    options = parser.parse_args()

    folder = find_nvrtc(options.nvrtc)
    names = sorted(file.stem for file in KERNELS.glob("*.cu") if file.stem != "prelude")
    wanted = options.only or names
    if unknown := sorted(set(wanted) - set(names)):
        sys.exit(f"ptx.py: no such file of kernels: {', '.join(unknown)}")
    archs = options.arch or CHECKED
    problems, rows = [], []
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        work = {(name, arch): pool.submit(compile_one, folder, name, arch) for name in wanted for arch in archs}
        for (name, arch), job in work.items():
            status, log, ptx = job.result()
            problems += [f"{name}.cu, {arch}: {line}" for line in complaints(status, log)]
            if status != 0:
                continue
            for kernel, use in needs(log).items():
                rows.append((kernel, arch, use))
                if use["spilled"]:
                    problems.append(f"{name}.cu, {arch}: {kernel} spills registers ({use['spilled']} bytes)")
            if arch in SHIPPED:
                problems += check_ptx(PTX / f"{name}.{arch}.ptx", ptx, options.write)
    # What no kernels belong to any more.
    shipped = {f"{name}.{arch}.ptx" for name in names for arch in SHIPPED}
    for file in sorted(PTX.glob("*.ptx")):
        if file.name not in shipped:
            if options.write:
                file.unlink()
            else:
                problems.append(f"{file.relative_to(ROOT)} belongs to no kernels: run tools/cuda/ptx.py --write")

    width = max((len(kernel) for kernel, _, _ in rows), default=6)
    print(f"{'kernel':{width}} arch    registers  shared  stack")
    for kernel, arch, use in rows:
        print(f"{kernel:{width}} {arch:7} {use['registers']:9} {use['shared']:7} {use['stack']:6}")
    if options.table:
        with open(options.table, "w", encoding="utf-8") as table:
            for kernel, arch, use in rows:
                table.write(f"{kernel} {arch} {use['registers']} {use['shared']}\n")
    for problem in problems:
        print(f"ptx.py: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
