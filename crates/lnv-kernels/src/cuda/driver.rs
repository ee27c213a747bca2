//! The driver: the part of CUDA that comes with the GPU's driver and not with the toolkit.
//!
//! Decision: the driver interface, not the runtime's, because it is there wherever a GPU works. Names are
//! the documentation's without `cu` and versions.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::library::{self, functions};

/// An address in the device's memory.
pub(crate) type DevicePtr = u64;
/// A handle: a context, a stream, a module, a function, a graph.
pub(crate) type Handle = *mut c_void;

functions! {
    /// The driver's functions.
    Driver {
        init = "cuInit"(c_uint);
        driver_get_version = "cuDriverGetVersion"(*mut c_int);
        device_get_count = "cuDeviceGetCount"(*mut c_int);
        device_get = "cuDeviceGet"(*mut c_int, c_int);
        device_get_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
        device_get_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
        primary_ctx_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
        primary_ctx_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
        ctx_set_current = "cuCtxSetCurrent"(Handle);
        mem_get_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
        mem_alloc = "cuMemAlloc_v2"(*mut DevicePtr, usize);
        mem_free = "cuMemFree_v2"(DevicePtr);
        mem_host_alloc = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
        mem_free_host = "cuMemFreeHost"(*mut c_void);
        memcpy_to_device = "cuMemcpyHtoDAsync_v2"(DevicePtr, *const c_void, usize, Handle);
        memcpy_to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, DevicePtr, usize, Handle);
        memcpy_on_device = "cuMemcpyDtoDAsync_v2"(DevicePtr, DevicePtr, usize, Handle);
        memset = "cuMemsetD8Async"(DevicePtr, u8, usize, Handle);
        stream_create = "cuStreamCreate"(*mut Handle, c_uint);
        stream_destroy = "cuStreamDestroy_v2"(Handle);
        stream_synchronize = "cuStreamSynchronize"(Handle);
        event_create = "cuEventCreate"(*mut Handle, c_uint);
        event_record = "cuEventRecord"(Handle, Handle);
        event_synchronize = "cuEventSynchronize"(Handle);
        event_destroy = "cuEventDestroy_v2"(Handle);
        module_load_data = "cuModuleLoadData"(*mut Handle, *const c_void);
        module_unload = "cuModuleUnload"(Handle);
        module_get_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
        func_set_attribute = "cuFuncSetAttribute"(Handle, c_int, c_int);
        func_get_attribute = "cuFuncGetAttribute"(*mut c_int, c_int, Handle);
        launch_kernel = "cuLaunchKernelEx"(
            *const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void,
        );
        get_error_string = "cuGetErrorString"(c_int, *mut *const c_char);
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared_bytes: c_uint,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) attribute_count: c_uint,
}

/// `CUlaunchAttribute` with a value of one number.
#[repr(C)]
pub(crate) struct LaunchAttribute {
    id: c_int,
    padding: c_int,
    value: c_int,
    rest: [c_int; 15],
}

impl LaunchAttribute {
    /// The kernel may begin while the one before it ends; it waits itself for what that has written
    /// (`CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`).
    pub(crate) const EARLY: LaunchAttribute = LaunchAttribute {
        id: 6,
        padding: 0,
        value: 1,
        rest: [0; 15],
    };
}

/// `CU_DEVICE_ATTRIBUTE_…`.
pub(crate) mod attribute {
    pub(crate) const MULTIPROCESSOR_COUNT: i32 = 16;
    pub(crate) const CAPABILITY_MAJOR: i32 = 75;
    pub(crate) const CAPABILITY_MINOR: i32 = 76;
    pub(crate) const MAX_SHARED_PER_BLOCK_OPTIN: i32 = 97;
}

/// `CU_FUNC_ATTRIBUTE_…`.
pub(crate) mod function_attribute {
    pub(crate) const SHARED_SIZE_BYTES: i32 = 1;
    pub(crate) const MAX_DYNAMIC_SHARED_SIZE_BYTES: i32 = 8;
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(crate) const OUT_OF_MEMORY: i32 = 2;

impl Driver {
    /// Finds the driver and starts it.
    ///
    /// # Errors
    /// There is none, or it finds no GPU that it can use: one sentence.
    #[allow(unsafe_code)]
    pub(crate) fn open() -> Result<Driver, String> {
        const NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
        const LACKING: &str = "install NVIDIA's driver, or use --device cpu";
        let library = library::open(&NAMES, "cuda_driver")
            .map_err(|e| format!("no NVIDIA driver is here ({e}); {LACKING}"))?;
        let driver = Driver::load(library)
            .map_err(|e| format!("the NVIDIA driver is too old ({e}); bring it up to date"))?;
        // SAFETY: the first call, as the driver asks for.
        let status = unsafe { (driver.init)(0) };
        driver.check(status).map_err(|e| {
            format!("the NVIDIA driver finds no GPU that it can use ({e}); {LACKING}")
        })?;
        Ok(driver)
    }

    /// The driver's words for a status that is not 0.
    #[allow(unsafe_code)]
    pub(crate) fn check(&self, status: i32) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: the driver writes the address of a constant string, or leaves null.
        let known = unsafe { (self.get_error_string)(status, &mut text) } == 0 && !text.is_null();
        if !known {
            return Err(format!("CUDA error {status}"));
        }
        // SAFETY: a constant of the driver, ended by a zero.
        let text = unsafe { CStr::from_ptr(text) };
        Err(format!(
            "CUDA error {status}: {}",
            text.to_string_lossy().trim_end_matches('.')
        ))
    }
}
