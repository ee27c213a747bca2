//! cuBLASLt: products of many rows, where NVIDIA's library is installed.
//!
//! Decision: the library is opened like the driver, by eleven functions of its C interface, and never needed:
//! whatever it lacks or refuses, our own kernel does. Row-major `x·Wᵀ` is, in its column-major words,
//! `op(W)·x` with W transposed, so nothing is copied. What it chose for a shape is kept, because choosing takes
//! tens of microseconds. Reductions over parts of k are in f32, in the order of the parts.
//!
//! Refused: its GELU, which is the tanh form only, and tf32.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{DevicePtr, Handle};
use super::library::{self, functions};
use super::{Cuda, Half, Kind};

functions! {
    /// cuBLASLt's functions.
    Functions {
        create = "cublasLtCreate"(*mut Handle);
        destroy = "cublasLtDestroy"(Handle);
        operation_create = "cublasLtMatmulDescCreate"(*mut Handle, c_int, c_int);
        operation_destroy = "cublasLtMatmulDescDestroy"(Handle);
        operation_set = "cublasLtMatmulDescSetAttribute"(Handle, c_int, *const c_void, usize);
        layout_create = "cublasLtMatrixLayoutCreate"(*mut Handle, c_int, u64, u64, i64);
        layout_destroy = "cublasLtMatrixLayoutDestroy"(Handle);
        preference_create = "cublasLtMatmulPreferenceCreate"(*mut Handle);
        preference_destroy = "cublasLtMatmulPreferenceDestroy"(Handle);
        preference_set = "cublasLtMatmulPreferenceSetAttribute"(Handle, c_int, *const c_void, usize);
        choose = "cublasLtMatmulAlgoGetHeuristic"(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Choice, *mut c_int,
        );
        multiply = "cublasLtMatmul"(
            Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void,
            *const c_void, Handle, *mut c_void, Handle, *const [u64; 8], *mut c_void, usize, Handle,
        );
    }
}

/// `CUBLAS_COMPUTE_32F`.
const COMPUTE_F32: c_int = 68;
/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

/// `CUBLASLT_MATMUL_DESC_…`.
mod operation {
    pub(super) const TRANSPOSE_A: i32 = 3;
    pub(super) const EPILOGUE: i32 = 7;
    pub(super) const BIAS_POINTER: i32 = 8;
}

/// `CUBLASLT_MATMUL_PREF_…`.
mod preference {
    pub(super) const WORKSPACE: i32 = 1;
    pub(super) const REDUCTIONS: i32 = 3;
    pub(super) const ALIGNMENTS: [i32; 4] = [5, 6, 7, 8];
}

/// `CUBLASLT_EPILOGUE_…`, which add up.
mod epilogue {
    pub(super) const NONE: u32 = 1;
    pub(super) const RELU: u32 = 2;
    pub(super) const BIAS: u32 = 4;
}

/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: sums of parts are added in f32.
const REDUCE_IN_F32: u32 = 2;
/// Memory that a product may use meanwhile: what NVIDIA asks for on Hopper.
const WORKSPACE: usize = 32 << 20;
/// Shapes that are remembered.
const PLANS: usize = 512;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    status: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Choice>() == 96);

/// `out = x·Wᵀ` or `out += x·Wᵀ`, then a bias of out's type and ReLU: x `[rows, k]`, W `[n, k]` of T.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) x: DevicePtr,
    pub(super) w: DevicePtr,
    pub(super) out: DevicePtr,
    pub(super) rows: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) kind: Kind,
    pub(super) add: bool,
    pub(super) bias: Option<DevicePtr>,
    pub(super) relu: bool,
}

/// What the library's choice depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    rows: usize,
    n: usize,
    k: usize,
    kind: Kind,
    add: bool,
    epilogue: u32,
    /// A power of two that divides all addresses.
    alignment: u32,
}

impl Product {
    fn key(&self) -> Key {
        let epilogue = match (self.bias, self.relu) {
            (None, false) => epilogue::NONE,
            (None, true) => epilogue::RELU,
            (Some(_), false) => epilogue::BIAS,
            (Some(_), true) => epilogue::BIAS | epilogue::RELU,
        };
        let bits = self.x | self.w | self.out | self.bias.unwrap_or(0) | 256;
        Key {
            rows: self.rows,
            n: self.n,
            k: self.k,
            kind: self.kind,
            add: self.add,
            epilogue,
            alignment: 1 << bits.trailing_zeros(),
        }
    }
}

/// How a shape is multiplied.
struct Plan {
    operation: Handle,
    w: Handle,
    x: Handle,
    out: Handle,
    algorithm: [u64; 8],
}

/// The library, opened for a GPU.
pub(super) struct BlasLt {
    functions: Functions,
    handle: Handle,
    plans: Mutex<HashMap<Key, Option<Plan>>>,
}

/// `cudaDataType_t`.
fn data_type(half: Half) -> c_int {
    match half {
        Half::F32 => 0,
        Half::F16 => 2,
        Half::Bf16 => 14,
    }
}

impl BlasLt {
    /// Opens the library, if it is there; the GPU is the calling thread's.
    #[allow(unsafe_code)]
    pub(super) fn open() -> Option<BlasLt> {
        const NAMES: [&str; 5] = [
            "libcublasLt.so.13",
            "libcublasLt.so.12",
            "libcublasLt.so",
            "cublasLt64_13.dll",
            "cublasLt64_12.dll",
        ];
        let functions = Functions::load(library::open(&NAMES, "cublas").ok()?).ok()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let status = unsafe { (functions.create)(&mut handle) };
        (status == 0).then(|| BlasLt {
            functions,
            handle,
            plans: Mutex::default(),
        })
    }

    /// Begins a product; `false` if the library cannot do it, and nothing was begun then.
    #[allow(unsafe_code)]
    pub(super) fn multiply(&self, cuda: &Arc<Cuda>, product: &Product) -> bool {
        cuda.enter();
        let key = product.key();
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() >= PLANS && !plans.contains_key(&key) {
            self.forget(&mut plans);
        }
        let plan = plans
            .entry(key)
            .or_insert_with(|| self.plan(cuda.half(), &key));
        let Some(plan) = plan else { return false };
        let Ok(workspace) = cuda.try_alloc(WORKSPACE) else {
            return false;
        };
        if let Some(bias) = product.bias {
            // The address changes from call to call, the choice does not depend on it.
            if !self.set(plan.operation, operation::BIAS_POINTER, &bias) {
                return false;
            }
        }
        let (alpha, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        let out = product.out as *mut c_void;
        // SAFETY: handles of this library; addresses of matrices of the shapes that the plan was made for,
        // and as much workspace as is said. Both factors are read before the call returns.
        let status = unsafe {
            (self.functions.multiply)(
                self.handle,
                plan.operation,
                (&raw const alpha).cast(),
                product.w as *const c_void,
                plan.w,
                product.x as *const c_void,
                plan.x,
                (&raw const beta).cast(),
                out,
                plan.out,
                out,
                plan.out,
                &plan.algorithm,
                workspace.ptr() as *mut c_void,
                WORKSPACE,
                cuda.stream,
            )
        };
        status == 0
    }

    #[allow(unsafe_code)]
    fn set<V>(&self, operation: Handle, which: i32, value: &V) -> bool {
        let value: *const V = value;
        // SAFETY: reads as many bytes as the value has.
        let status = unsafe {
            (self.functions.operation_set)(operation, which, value.cast(), size_of::<V>())
        };
        status == 0
    }

    /// Lets the library choose for a shape; `None` if it knows nothing.
    fn plan(&self, half: Half, key: &Key) -> Option<Plan> {
        let out_type = match key.kind {
            Kind::F32 => Half::F32,
            Kind::Half => half,
        };
        let (rows, n, k) = (key.rows, key.n, key.k);
        let mut plan = Plan {
            operation: std::ptr::null_mut(),
            w: self.layout(half, k, n)?,
            x: self.layout(half, k, rows)?,
            out: self.layout(out_type, n, rows)?,
            algorithm: [0; 8],
        };
        let algorithm = self.operation(key).and_then(|operation| {
            plan.operation = operation;
            self.choose(&plan, key)
        });
        match algorithm {
            Some(algorithm) => {
                plan.algorithm = algorithm;
                Some(plan)
            }
            None => {
                self.destroy(&plan);
                None
            }
        }
    }

    /// A matrix of columns that follow one another.
    #[allow(unsafe_code)]
    fn layout(&self, of: Half, rows: usize, cols: usize) -> Option<Handle> {
        let mut layout = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let status = unsafe {
            (self.functions.layout_create)(
                &mut layout,
                data_type(of),
                rows as u64,
                cols as u64,
                rows as i64,
            )
        };
        (status == 0).then_some(layout)
    }

    #[allow(unsafe_code)]
    fn operation(&self, key: &Key) -> Option<Handle> {
        let mut operation = std::ptr::null_mut();
        let factors = data_type(Half::F32);
        // SAFETY: writes one handle.
        let status =
            unsafe { (self.functions.operation_create)(&mut operation, COMPUTE_F32, factors) };
        if status != 0 {
            return None;
        }
        // Its address decides nothing but alignment, which is the key's.
        let bias = u64::from(key.alignment);
        let has_bias = key.epilogue & epilogue::BIAS != 0;
        let done = self.set(operation, operation::TRANSPOSE_A, &TRANSPOSED)
            && self.set(operation, operation::EPILOGUE, &key.epilogue)
            && (!has_bias || self.set(operation, operation::BIAS_POINTER, &bias));
        if done {
            return Some(operation);
        }
        // SAFETY: made above, and in nobody else's hands.
        unsafe { (self.functions.operation_destroy)(operation) };
        None
    }

    #[allow(unsafe_code)]
    fn choose(&self, plan: &Plan, key: &Key) -> Option<[u64; 8]> {
        let mut preference = std::ptr::null_mut();
        // SAFETY: writes one handle.
        if unsafe { (self.functions.preference_create)(&mut preference) } != 0 {
            return None;
        }
        let set = |which: i32, value: *const c_void, size: usize| {
            // SAFETY: reads as many bytes as are said.
            unsafe { (self.functions.preference_set)(preference, which, value, size) == 0 }
        };
        let (workspace, reductions) = (WORKSPACE as u64, REDUCE_IN_F32);
        let mut good = set(
            preference::WORKSPACE,
            (&raw const workspace).cast(),
            size_of::<u64>(),
        );
        good &= set(
            preference::REDUCTIONS,
            (&raw const reductions).cast(),
            size_of::<u32>(),
        );
        for which in preference::ALIGNMENTS {
            good &= set(which, (&raw const key.alignment).cast(), size_of::<u32>());
        }
        let (mut choice, mut found) = (Choice::default(), 0);
        // SAFETY: handles of this library; writes at most one choice, and their number.
        let status = unsafe {
            (self.functions.choose)(
                self.handle,
                plan.operation,
                plan.w,
                plan.x,
                plan.out,
                plan.out,
                preference,
                1,
                &mut choice,
                &mut found,
            )
        };
        // SAFETY: made above, and in nobody else's hands.
        unsafe { (self.functions.preference_destroy)(preference) };
        let usable = good && status == 0 && found > 0 && choice.status == 0;
        usable.then_some(choice.algorithm)
    }

    fn forget(&self, plans: &mut HashMap<Key, Option<Plan>>) {
        for plan in plans.drain().filter_map(|(_, plan)| plan) {
            self.destroy(&plan);
        }
    }

    #[allow(unsafe_code)]
    fn destroy(&self, plan: &Plan) {
        // SAFETY: made by `plan`, and in nobody else's hands; what was begun does not need them.
        unsafe {
            if !plan.operation.is_null() {
                (self.functions.operation_destroy)(plan.operation);
            }
            for layout in [plan.w, plan.x, plan.out] {
                (self.functions.layout_destroy)(layout);
            }
        }
    }
}

impl Drop for BlasLt {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let mut plans =
            std::mem::take(&mut *self.plans.lock().unwrap_or_else(PoisonError::into_inner));
        self.forget(&mut plans);
        // SAFETY: made by `open`; the GPU's context is still there.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}
