#!/usr/bin/env python3
"""Tests the emulated driver, a libcuda.so.1 built with KERNELS=selftest_kernels: driver_test.py LIBRARY

Each test runs in a process of its own, since what a driver is told by its environment it is told once.
"""

import array
import ctypes
import os
import struct
import subprocess
import sys

OUT_OF_MEMORY, NOT_INITIALIZED, INVALID_CONTEXT, NOT_FOUND, NOT_READY = 2, 3, 201, 500, 600
INVALID_VALUE, NO_BINARY, ILLEGAL_ADDRESS, OUT_OF_RESOURCES = 1, 209, 700, 701
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
PTX = b".version 8.4\n.target sm_80\n.visible .entry scale_f32(\n.visible .entry mixed(\n"


class Driver:
    """The driver with a context, a stream and shorter ways to call it."""

    def __init__(self, start=True):
        self.lib = ctypes.CDLL(os.path.abspath(sys.argv[1]))
        if not start:
            return
        self.ok("cuInit", 0)
        context = self.handle("cuDevicePrimaryCtxRetain", 0)
        self.ok("cuCtxSetCurrent", context)
        self.stream = self.handle("cuStreamCreate", 1)
        self.module = self.handle("cuModuleLoadData", b"\x7fELF")

    def call(self, name, *arguments):
        return getattr(self.lib, name)(*arguments)

    def ok(self, name, *arguments):
        status = self.call(name, *arguments)
        assert status == 0, (name, status)

    def handle(self, name, *arguments):
        made = ctypes.c_void_p()
        self.ok(name, ctypes.byref(made), *arguments)
        return made

    def alloc(self, size):
        return ctypes.c_uint64(self.handle("cuMemAlloc_v2", ctypes.c_size_t(size)).value)

    def function(self, name):
        return self.handle("cuModuleGetFunction", self.module, name.encode())

    def try_launch(self, name, grid, block, shared, *arguments, stream=None):
        places = (ctypes.c_void_p * max(len(arguments), 1))(
            *[ctypes.cast(ctypes.pointer(x), ctypes.c_void_p) for x in arguments])
        return self.call("cuLaunchKernel", self.function(name), grid, 1, 1, block, 1, 1, shared,
                         stream or self.stream, places, None)

    def launch(self, *arguments, **more):
        status = self.try_launch(*arguments, **more)
        assert status == 0, (arguments[0], status)

    def put(self, at, data):
        self.ok("cuMemcpyHtoDAsync_v2", at, data, ctypes.c_size_t(len(data)), self.stream)

    def get(self, at, size):
        data = ctypes.create_string_buffer(size)
        self.ok("cuMemcpyDtoHAsync_v2", data, at, ctypes.c_size_t(size), self.stream)
        self.ok("cuStreamSynchronize", self.stream)
        return data.raw

    def floats(self, at, count):
        return list(struct.unpack(f"{count}f", self.get(at, 4 * count)))


def floats(*values):
    return array.array("f", values).tobytes()


def test_what_a_program_does_first():
    d = Driver(start=False)
    assert d.call("cuDeviceGet", ctypes.byref(ctypes.c_int()), 0) == NOT_INITIALIZED
    d.ok("cuInit", 0)
    size = ctypes.c_size_t(4)
    assert d.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), size) == INVALID_CONTEXT
    number = ctypes.c_int()
    for attribute, expected in ((75, 8), (76, 0), (97, 166912), (10, 32)):
        d.ok("cuDeviceGetAttribute", ctypes.byref(number), attribute, 0)
        assert number.value == expected, (attribute, number.value)
    name = ctypes.create_string_buffer(64)
    d.ok("cuDeviceGetName", name, 64, 0)
    assert name.value == b"Emulated device"


test_what_a_program_does_first.environment = {"LNV_EMULATOR_CAPABILITY": "8.0"}


def test_launches():
    d = Driver()
    x = d.alloc(400)
    assert d.get(x, 4) == b"\xff" * 4
    d.put(x, floats(*range(100)))
    d.launch("scale_f32", 4, 32, 0, x, ctypes.c_int(100), ctypes.c_float(2))
    assert d.floats(x, 100) == [2.0 * i for i in range(100)]
    d.put(x, b"\x80\x3f\x00\x40")  # 1 and 2 in bf16
    d.launch("scale_bf16", 1, 32, 0, x, ctypes.c_int(2), ctypes.c_float(3))
    assert d.get(x, 4) == b"\x40\x40\xc0\x40"
    out, more, flags = d.alloc(8), d.alloc(1024), d.alloc(2)
    d.ok("cuMemsetD8Async", out, 0, ctypes.c_size_t(8), d.stream)
    d.ok("cuMemsetD32Async", more, 5, ctypes.c_size_t(256), d.stream)
    arguments = (ctypes.c_uint64(1), out, ctypes.c_int(256), ctypes.c_float(2), more, flags)
    d.launch("mixed", 2, 256, 1024, *arguments)
    assert d.floats(out, 2) == [256 * 11.0] * 2 and d.get(flags, 2) == b"\7\7"
    packed = ctypes.create_string_buffer(struct.pack("QQifQQ", 1, out.value, 256, 2.0, more.value, flags.value), 40)
    size = ctypes.c_size_t(40)
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(packed), 2, ctypes.addressof(size), None)
    d.ok("cuLaunchKernel", d.function("mixed"), 2, 1, 1, 256, 1, 1, 1024, d.stream, None, extra)
    assert d.floats(out, 2) == [256 * 22.0] * 2
    for _ in range(2):  # twice: no kernel was changed by the first
        assert d.try_launch("mixed", 2, 1025, 1024, *arguments) == INVALID_VALUE
        assert d.try_launch("mixed", 0, 32, 1024, *arguments) == INVALID_VALUE
        assert d.try_launch("mixed", 2, 32, 50000, *arguments) == INVALID_VALUE
    assert d.call("cuFuncSetAttribute", d.function("mixed"), 8, 232449) == INVALID_VALUE
    d.ok("cuFuncSetAttribute", d.function("mixed"), 8, 50000)
    d.launch("mixed", 2, 256, 50000, *arguments)
    wild = ctypes.c_uint64(0x1234560)
    assert d.try_launch("scale_f32", 1, 32, 0, wild, ctypes.c_int(1), ctypes.c_float(1)) == ILLEGAL_ADDRESS


def test_modules():
    d = Driver()
    d.module = d.handle("cuModuleLoadDataEx", PTX, 0, None, None)
    d.function("mixed")
    made = ctypes.byref(ctypes.c_void_p())
    assert d.call("cuModuleGetFunction", made, d.module, b"nothing") == NOT_FOUND
    assert d.call("cuModuleGetFunction", made, d.module, b"scale_f16") == NOT_FOUND  # not in this PTX
    assert d.call("cuModuleLoadData", made, PTX.replace(b"sm_80", b"sm_100")) == NO_BINARY
    d.ok("cuModuleLoadData", made, PTX.replace(b"sm_80", b"sm_90a"))


def test_memory():
    d = Driver()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    first, half = d.alloc(1000), ctypes.c_size_t(1 << 19)
    d.ok("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    assert (total.value, free.value) == (1 << 20, (1 << 20) - 1000)
    large = d.alloc(half.value)
    assert d.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), half) == OUT_OF_MEMORY
    assert d.call("cuMemsetD8Async", first, 0, ctypes.c_size_t(1001), d.stream) == INVALID_VALUE
    d.ok("cuMemcpyDtoDAsync_v2", large, first, ctypes.c_size_t(1000), d.stream)
    d.ok("cuMemFree_v2", large)
    assert d.call("cuMemFree_v2", large) == INVALID_VALUE
    d.alloc(half.value)


test_memory.environment = {"LNV_EMULATOR_MEMORY": "1"}


def test_captures():
    d = Driver()
    x = d.alloc(4)
    d.put(x, floats(1))
    pinned = d.handle("cuMemHostAlloc", ctypes.c_size_t(4), 0)
    status = ctypes.c_int()
    d.ok("cuStreamBeginCapture_v2", d.stream, 1)
    d.ok("cuStreamIsCapturing", d.stream, ctypes.byref(status))
    assert status.value == 1
    count, by = ctypes.c_int(1), ctypes.c_float(3)
    d.launch("scale_f32", 1, 32, 0, x, count, by)
    by.value = 1000  # parameters were copied
    d.ok("cuMemcpyDtoHAsync_v2", pinned, x, ctypes.c_size_t(4), d.stream)
    graph = ctypes.c_void_p()
    d.ok("cuStreamEndCapture", d.stream, ctypes.byref(graph))
    assert d.floats(x, 1) == [1.0]  # nothing ran
    run = ctypes.c_void_p()
    d.ok("cuGraphInstantiateWithFlags", ctypes.byref(run), graph, ctypes.c_ulonglong(0))
    d.ok("cuGraphDestroy", graph)
    for expected in (3.0, 9.0, 27.0):
        d.ok("cuGraphLaunch", run, d.stream)
        d.ok("cuStreamSynchronize", d.stream)
        assert struct.unpack("f", ctypes.string_at(pinned.value, 4))[0] == expected
    d.ok("cuGraphExecDestroy", run)
    for forbidden in (
        lambda: d.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(4)),
        lambda: d.call("cuStreamSynchronize", d.stream),
        lambda: d.call("cuMemcpyHtoDAsync_v2", x, floats(1), ctypes.c_size_t(4), d.stream),
    ):
        d.ok("cuStreamBeginCapture_v2", d.stream, 0)
        assert forbidden() == CAPTURE_UNSUPPORTED
        assert d.call("cuStreamEndCapture", d.stream, ctypes.byref(graph)) == CAPTURE_INVALIDATED
    d.launch("scale_f32", 1, 32, 0, x, count, ctypes.c_float(1))


def test_events():
    d = Driver()
    x = d.alloc(4)
    begin, end = d.handle("cuEventCreate", 0), d.handle("cuEventCreate", 0)
    time = ctypes.c_float()
    assert d.call("cuEventElapsedTime", ctypes.byref(time), begin, end) == 400
    d.ok("cuEventRecord", begin, d.stream)
    d.launch("scale_f32", 1, 32, 0, x, ctypes.c_int(1), ctypes.c_float(1))
    d.ok("cuEventRecord", end, d.stream)
    d.ok("cuEventQuery", end)
    d.ok("cuStreamWaitEvent", d.stream, end, 0)
    d.ok("cuEventSynchronize", end)
    d.ok("cuEventElapsedTime", ctypes.byref(time), begin, end)
    assert time.value > 0


def test_lazily():
    d = Driver()
    x = d.alloc(4)
    pinned = d.handle("cuMemHostAlloc", ctypes.c_size_t(4), 0)
    size = ctypes.c_size_t(4)
    ctypes.memmove(pinned.value, floats(2), 4)
    d.ok("cuMemcpyHtoDAsync_v2", x, pinned, size, d.stream)
    ctypes.memmove(pinned.value, floats(5), 4)  # too early
    done = d.handle("cuEventCreate", 0)
    d.ok("cuEventRecord", done, d.stream)
    d.ok("cuMemcpyDtoHAsync_v2", pinned, x, size, d.stream)
    assert d.call("cuEventQuery", done) == NOT_READY
    assert struct.unpack("f", ctypes.string_at(pinned.value, 4))[0] == 5.0
    assert d.floats(x, 1) == [5.0]


test_lazily.environment = {"LNV_EMULATOR_LAZY": "1"}


def test_resources():
    d = Driver()
    x = d.alloc(4)
    arguments = (x, ctypes.c_int(1), ctypes.c_float(1))
    d.launch("scale_f32", 1, 256, 0, *arguments)
    assert d.try_launch("scale_f32", 1, 512, 0, *arguments) == OUT_OF_RESOURCES
    assert d.try_launch("scale_f16", 1, 32, 17000, *arguments) == INVALID_VALUE
    d.ok("cuFuncSetAttribute", d.function("scale_f16"), 8, 17000)
    assert d.try_launch("scale_f16", 1, 32, 17000, *arguments) == INVALID_VALUE
    d.ok("cuFuncSetAttribute", d.function("scale_f16"), 8, 60000)
    d.launch("scale_f16", 1, 32, 17000, *arguments)


test_resources.table = "scale_f32 sm_90a 160 0\nscale_f32 sm_80 16 0\nscale_f16 sm_90a 16 33000\n"


def crash_beyond_an_allocation():
    d = Driver()
    x, out = d.alloc(400), d.alloc(4)
    d.try_launch("peek", 1, 1, 0, x, ctypes.c_int(int(os.environ["AT"])), out)


def crash_by_a_write_behind_an_allocation():
    d = Driver()
    x = d.alloc(400)
    d.launch("poke", 1, 1, 0, x, ctypes.c_int(401))
    d.call("cuMemFree_v2", x)


CRASHES = [
    (crash_beyond_an_allocation, {"AT": "100", "LNV_EMULATOR_GUARD": "1"},
     "kernel peek, block (0,0,0), thread (0,0,0): an access to byte 400 of an allocation of 400 bytes"),
    (crash_beyond_an_allocation, {"AT": "2000"}, "an access to byte 8000 of an allocation of 400 bytes"),
    (crash_by_a_write_behind_an_allocation, {}, "somebody wrote 1 bytes behind an allocation of 400 bytes"),
]


def run(name, environment):
    ours = {key: value for key, value in os.environ.items() if not key.startswith("LNV_EMULATOR")}
    return subprocess.run([sys.executable, "-B", __file__, sys.argv[1], name], env=ours | environment,
                          capture_output=True, text=True, timeout=60)


def main():
    if len(sys.argv) == 3:
        globals()[sys.argv[2]]()
        return
    failed = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        environment = dict(getattr(test, "environment", {}))
        if hasattr(test, "table"):
            path = os.path.join(os.path.dirname(os.path.abspath(sys.argv[1])), "resources")
            with open(path, "w", encoding="utf-8") as file:
                file.write(test.table)
            environment["LNV_EMULATOR_RESOURCES"] = path
        done = run(name, environment)
        if done.returncode:
            print(f"{name} failed:\n{done.stdout}{done.stderr}")
            failed += 1
    for crash, environment, words in CRASHES:
        done = run(crash.__name__, environment)
        if done.returncode == 0 or words not in done.stderr:
            print(f"{crash.__name__}: {words!r} is not in:\n{done.stdout}{done.stderr}")
            failed += 1
    print("the emulated driver's tests passed" if not failed else f"{failed} tests failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
