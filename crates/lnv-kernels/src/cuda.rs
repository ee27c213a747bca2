//! The operations on an NVIDIA GPU.
//!
//! Decision: kernels are CUDA C without headers (`cuda/kernels`), compiled by NVRTC ahead of time to
//! PTX (`cuda/ptx`), which the driver makes machine code of: neither building nor running needs the
//! toolkit. One stream runs everything, in order; nothing waits for it but reading results back.
//! Matrices that live long are f32, scratch has the model's type (`Half`), and sums are in f32. Every
//! size is a parameter of a launch, small tables of numbers are uploaded once per content ([`Cuda::table`]).
//!
//! The guarantee of bits does not hold across batches here, because a product of one row and one of many
//! run different kernels; it does from run to run.
//!
//! Refused: unified memory, several GPUs for one model, and a GPU older than capability 8.0, which lacks
//! bf16.

pub(crate) mod attention;
mod blaslt;
pub(crate) mod driver;
pub(crate) mod library;
pub(crate) mod linear;
pub(crate) mod memory;
pub(crate) mod probe;
mod rows;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_char, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use blaslt::BlasLt;
use driver::{
    DevicePtr, Driver, Handle, LaunchAttribute, LaunchConfig, attribute, function_attribute,
};
use half::{bf16, f16};
use memory::{Memory, Pool, Staging};

use crate::KernelError;
use crate::kv_cache::KvDtype;
use crate::weight::WeightDtype;

/// The type of scratch, and of weights that are not quantised: T of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Half {
    F32,
    Bf16,
    F16,
}

impl Half {
    /// The type for a model whose matrices are of this type.
    pub(crate) fn of(dtype: WeightDtype) -> Half {
        match dtype {
            WeightDtype::F32 => Half::F32,
            WeightDtype::F16 => Half::F16,
            _ => Half::Bf16,
        }
    }

    /// What the names of its kernels end with.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Half::F32 => "f32",
            Half::Bf16 => "bf16",
            Half::F16 => "f16",
        }
    }

    /// Bytes of a value.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Half::F32 => 4,
            Half::Bf16 | Half::F16 => 2,
        }
    }

    /// Values of a 16-bit type as f32.
    pub(crate) fn widen(self, bits: &[u16], out: &mut [f32]) {
        let values = out.iter_mut().zip(bits);
        match self {
            Half::F16 => values.for_each(|(o, b)| *o = f16::from_bits(*b).to_f32()),
            _ => values.for_each(|(o, b)| *o = bf16::from_bits(*b).to_f32()),
        }
    }

    /// Values in a 16-bit type.
    pub(crate) fn narrow(self, values: &[f32]) -> Vec<u16> {
        let values = values.iter();
        match self {
            Half::F16 => values.map(|v| f16::from_f32(*v).to_bits()).collect(),
            _ => values.map(|v| bf16::from_f32(*v).to_bits()).collect(),
        }
    }
}

/// Whether a matrix is f32, or of the type that the device was opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    F32,
    Half,
}

/// A matrix in the device's memory, `[rows, cols]`, row-major.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub(crate) ptr: DevicePtr,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) kind: Kind,
}

impl View {
    /// The kernels' flag.
    fn half(&self) -> Arg {
        Arg::Int(u32::from(self.kind == Kind::Half))
    }
}

/// A weight `[n, k]` in the device's memory: floats row-major in T, quantised ones in panels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceWeight {
    pub(crate) ptr: DevicePtr,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) dtype: WeightDtype,
}

/// Keys and values of a layer in the device's memory: for each block and key/value head the keys, then
/// the values, as rows `[64][head_dim]`; `Bf16` means T, and `Int8` is followed by 64 scales of keys and
/// 64 of values in f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceLayer {
    pub(crate) ptr: DevicePtr,
    pub(crate) kind: KvDtype,
    pub(crate) head_dim: usize,
}

/// A parameter of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Arg {
    Ptr(DevicePtr),
    /// `size_t`.
    Size(usize),
    Int(u32),
    Float(f32),
}

impl Arg {
    /// A count, which kernels take as `int`.
    ///
    /// # Panics
    /// It is no `int`.
    pub(crate) fn count(n: usize) -> Arg {
        let n = i32::try_from(n).unwrap_or_else(|_| panic!("a count of {n}. This is a bug."));
        Arg::Int(n as u32)
    }

    fn cell(self) -> u64 {
        match self {
            Arg::Ptr(ptr) => ptr,
            Arg::Size(n) => n as u64,
            Arg::Int(n) => u64::from(n),
            Arg::Float(x) => u64::from(x.to_bits()),
        }
    }
}

/// A kernel, ready to be launched.
#[derive(Clone, Copy)]
struct Function {
    handle: Handle,
}

/// A GPU and what its kernels need; one for each GPU and type, shared by all who ask for it.
pub(crate) struct Cuda {
    driver: Driver,
    context: Handle,
    stream: Handle,
    device: usize,
    half: Half,
    name: String,
    capability: (usize, usize),
    sms: usize,
    /// Most bytes of shared memory that a block may have.
    shared: usize,
    /// [`may_begin_early`].
    early: bool,
    pool: Pool,
    staging: Mutex<Option<Staging>>,
    modules: [OnceLock<Result<usize, String>>; MODULES.len()],
    functions: Mutex<HashMap<String, Function>>,
    /// Counters of attention's blocks, which are zero between kernels.
    arrivals: OnceLock<Memory>,
    blaslt: OnceLock<Option<BlasLt>>,
    /// Of products of few rows: see linear.rs.
    counters: OnceLock<Memory>,
}

// SAFETY: handles of the driver, which any thread may use once the context is current there
// (`Cuda::enter`); everything that changes is under a lock.
#[allow(unsafe_code)]
unsafe impl Send for Cuda {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Cuda {}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (cuda:{})", self.name, self.device)
    }
}

/// The kernels as PTX: for GPUs from capability 8.0 on, and for that of 9.0.
const MODULES: [(&str, &str, &str); 8] = [
    (
        "rows",
        include_str!("cuda/ptx/rows.sm_80.ptx"),
        include_str!("cuda/ptx/rows.sm_90a.ptx"),
    ),
    (
        "linear",
        include_str!("cuda/ptx/linear.sm_80.ptx"),
        include_str!("cuda/ptx/linear.sm_90a.ptx"),
    ),
    (
        "panels",
        include_str!("cuda/ptx/panels.sm_80.ptx"),
        include_str!("cuda/ptx/panels.sm_90a.ptx"),
    ),
    (
        "gemm",
        include_str!("cuda/ptx/gemm.sm_80.ptx"),
        include_str!("cuda/ptx/gemm.sm_90a.ptx"),
    ),
    (
        "attention",
        include_str!("cuda/ptx/attention.sm_80.ptx"),
        include_str!("cuda/ptx/attention.sm_90a.ptx"),
    ),
    (
        "flash_attention",
        include_str!("cuda/ptx/flash_attention.sm_80.ptx"),
        include_str!("cuda/ptx/flash_attention.sm_90a.ptx"),
    ),
    (
        "decode_attention",
        include_str!("cuda/ptx/decode_attention.sm_80.ptx"),
        include_str!("cuda/ptx/decode_attention.sm_90a.ptx"),
    ),
    (
        "single_attention",
        include_str!("cuda/ptx/single_attention.sm_80.ptx"),
        include_str!("cuda/ptx/single_attention.sm_90a.ptx"),
    ),
];

/// Parameters that a kernel may have.
const MOST_ARGS: usize = 24;

/// Whether a kernel may begin while the one before it ends: it then finds its table filled and its first weights
/// on the way when that has ended. All kernels wait for the one before where they begin to read
/// (`wait_for_previous` in prelude.cu). Measured on an H200, 32 layers of a 7B, a token: bf16 4.09 ms where 4.63
/// one by one, q8 3.32 where 3.88, NF4 2.47 where 2.94.
fn may_begin_early(capability: (usize, usize)) -> bool {
    const SINCE: (usize, usize) = (9, 0);
    capability >= SINCE && std::env::var_os("LNV_CUDA_ONE_BY_ONE").is_none()
}

/// Counters of [`Cuda::arrivals`]: more than there are pairs of a sequence and a head where it pays to split
/// them.
const ARRIVALS: usize = 4096;

/// The tables that are kept; more than a pass has.
const TABLES: usize = 256;
/// Those that are kept when they are forgotten: more than an operation asks for before its kernel is begun.
const RETIRED: usize = 16;

type Opened = HashMap<(usize, Half), Arc<Cuda>>;

impl Cuda {
    /// A GPU by its number, for models of this type.
    ///
    /// # Errors
    /// There is no driver, no such GPU, or it is too old: one sentence.
    pub(crate) fn open(device: usize, half: Half) -> Result<Arc<Cuda>, KernelError> {
        static OPENED: Mutex<Option<Opened>> = Mutex::new(None);
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = opened.get_or_insert_default();
        if let Some(cuda) = opened.get(&(device, half)) {
            return Ok(Arc::clone(cuda));
        }
        let cuda = Arc::new(Cuda::start(device, half).map_err(KernelError::Cuda)?);
        opened.insert((device, half), Arc::clone(&cuda));
        Ok(cuda)
    }

    #[allow(unsafe_code)]
    fn start(device: usize, half: Half) -> Result<Cuda, String> {
        let driver = Driver::open()?;
        let (mut count, mut version, mut handle) = (0, 0, 0);
        // SAFETY: each call writes one number.
        unsafe {
            driver.check((driver.driver_get_version)(&mut version))?;
            driver.check((driver.device_get_count)(&mut count))?;
        }
        if device >= count as usize {
            return Err(format!(
                "there is no GPU cuda:{device}; the driver knows {count}, counted from 0"
            ));
        }
        if version < 12040 {
            return Err(format!(
                "the NVIDIA driver is for CUDA {}.{}; 12.4 is needed: bring the driver up to date (550 \
                 or later), or use --device cpu",
                version / 1000,
                version % 1000 / 10
            ));
        }
        // SAFETY: the device was counted above; `name` has as many bytes as are said.
        let (name, context) = unsafe {
            driver.check((driver.device_get)(&mut handle, device as i32))?;
            let mut name = [0u8; 128];
            driver.check((driver.device_get_name)(
                name.as_mut_ptr().cast::<c_char>(),
                name.len() as i32,
                handle,
            ))?;
            let mut context = std::ptr::null_mut();
            driver.check((driver.primary_ctx_retain)(&mut context, handle))?;
            driver.check((driver.ctx_set_current)(context))?;
            let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
            (String::from_utf8_lossy(&name[..end]).into_owned(), context)
        };
        let attribute = |which: i32| -> Result<usize, String> {
            let mut value = 0;
            // SAFETY: writes one number.
            driver.check(unsafe { (driver.device_get_attribute)(&mut value, which, handle) })?;
            Ok(value.max(0) as usize)
        };
        let capability = (
            attribute(attribute::CAPABILITY_MAJOR)?,
            attribute(attribute::CAPABILITY_MINOR)?,
        );
        if capability < (8, 0) {
            return Err(format!(
                "{name} has compute capability {}.{}; 8.0 is needed (an A100, an RTX 30 or newer): use \
                 --device cpu",
                capability.0, capability.1
            ));
        }
        let (sms, shared) = (
            attribute(attribute::MULTIPROCESSOR_COUNT)?,
            attribute(attribute::MAX_SHARED_PER_BLOCK_OPTIN)?,
        );
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle; 1 is CU_STREAM_NON_BLOCKING.
        driver.check(unsafe { (driver.stream_create)(&mut stream, 1) })?;
        Ok(Cuda {
            driver,
            context,
            stream,
            device,
            half,
            name,
            capability,
            sms,
            shared,
            early: may_begin_early(capability),
            pool: Pool::default(),
            staging: Mutex::default(),
            modules: [const { OnceLock::new() }; MODULES.len()],
            functions: Mutex::default(),
            arrivals: OnceLock::new(),
            blaslt: OnceLock::new(),
            counters: OnceLock::new(),
        })
    }

    /// T of the kernels.
    pub(crate) fn half(&self) -> Half {
        self.half
    }

    /// Multiprocessors.
    pub(crate) fn sms(&self) -> usize {
        self.sms
    }

    /// Compute capability, major and minor.
    pub(crate) fn capability(&self) -> (usize, usize) {
        self.capability
    }

    /// What the driver calls the GPU.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// cuBLASLt, looked for the first time that it is asked for.
    fn blaslt(&self) -> Option<&BlasLt> {
        let open = || {
            self.enter();
            BlasLt::open()
        };
        self.blaslt.get_or_init(open).as_ref()
    }

    /// Makes the calling thread use this GPU.
    #[allow(unsafe_code)]
    fn enter(&self) {
        thread_local! {
            static CURRENT: Cell<usize> = const { Cell::new(0) };
        }
        if CURRENT.get() != self.context as usize {
            // SAFETY: the context lives as long as the program.
            self.done(unsafe { (self.driver.ctx_set_current)(self.context) });
            CURRENT.set(self.context as usize);
        }
    }

    /// Waits for all that was begun.
    #[allow(unsafe_code)]
    pub(crate) fn wait(&self) {
        self.enter();
        // SAFETY: the stream lives as long as the program.
        self.done(unsafe { (self.driver.stream_synchronize)(self.stream) });
    }

    fn sentence(&self, status: i32) -> String {
        let words = self.driver.check(status).err().unwrap_or_default();
        format!("{} (cuda:{}): {words}", self.name, self.device)
    }

    /// # Panics
    /// The status is an error: the GPU failed, or a launch is wrong.
    #[track_caller]
    fn done(&self, status: i32) {
        assert!(status == 0, "{}", self.sentence(status));
    }

    /// Runs a kernel, after all that was begun before. `shared` is its dynamic shared memory, in bytes.
    ///
    /// # Panics
    /// There is no such kernel, or the driver refuses the launch.
    #[track_caller]
    #[allow(unsafe_code)]
    pub(crate) fn launch(
        &self,
        kernel: &str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        args: &[Arg],
    ) {
        if grid.contains(&0) {
            return;
        }
        self.enter();
        let function = self.function(kernel);
        assert!(args.len() <= MOST_ARGS, "{kernel}: too many parameters");
        let mut cells = [0; MOST_ARGS];
        let mut pointers = [std::ptr::null_mut::<c_void>(); MOST_ARGS];
        for (i, arg) in args.iter().enumerate() {
            cells[i] = arg.cell();
            pointers[i] = (&raw mut cells[i]).cast();
        }
        let early = LaunchAttribute::EARLY;
        let config = LaunchConfig {
            grid: grid.map(|n| n as u32),
            block: [block as u32, 1, 1],
            shared_bytes: shared as u32,
            stream: self.stream,
            attributes: &raw const early,
            attribute_count: u32::from(self.early),
        };
        // SAFETY: as many parameters as the kernel takes, each in a cell of 8 bytes of which the driver
        // reads the first ones; they are copied before the call returns. What the kernel reads and
        // writes was checked by the operation.
        let status = unsafe {
            (self.driver.launch_kernel)(
                &raw const config,
                function.handle,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        assert!(
            status == 0,
            "{kernel} with a grid of {grid:?}, {block} threads and {shared} bytes: {}",
            self.sentence(status)
        );
    }

    fn function(&self, kernel: &str) -> Function {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(kernel) {
            return *function;
        }
        let function = self
            .find(kernel)
            .unwrap_or_else(|e| panic!("{kernel}: {e}. This is a bug."));
        functions.insert(kernel.to_owned(), function);
        function
    }

    /// Looks for a kernel, and loads the module that has it.
    #[allow(unsafe_code)]
    fn find(&self, kernel: &str) -> Result<Function, String> {
        let name = CString::new(kernel).map_err(|e| e.to_string())?;
        let entry = format!(".entry {kernel}(");
        for (index, (_, ptx, _)) in MODULES.iter().enumerate() {
            if !ptx.contains(&entry) {
                continue;
            }
            let module = self.module(index)?;
            let mut handle = std::ptr::null_mut();
            // SAFETY: a loaded module and a name that ends with a zero.
            let status =
                unsafe { (self.driver.module_get_function)(&mut handle, module, name.as_ptr()) };
            self.driver.check(status)?;
            let mut fixed = 0;
            // SAFETY: a function of a loaded module.
            unsafe {
                let shared = function_attribute::SHARED_SIZE_BYTES;
                self.done((self.driver.func_get_attribute)(&mut fixed, shared, handle));
                let most = function_attribute::MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let room = self.shared as i32 - fixed;
                self.done((self.driver.func_set_attribute)(handle, most, room));
            }
            return Ok(Function { handle });
        }
        Err("no module has this kernel".to_owned())
    }

    /// A module, loaded the first time: the driver compiles it then, and remembers that on disk.
    fn module(&self, index: usize) -> Result<Handle, String> {
        let loaded = self.modules[index].get_or_init(|| self.load(index));
        loaded.clone().map(|handle| handle as Handle)
    }

    #[allow(unsafe_code)]
    fn load(&self, index: usize) -> Result<usize, String> {
        let (name, any, hopper) = MODULES[index];
        let ptx = if self.capability == (9, 0) {
            hopper
        } else {
            any
        };
        let image = CString::new(ptx).map_err(|e| e.to_string())?;
        let mut handle = std::ptr::null_mut();
        self.enter();
        // SAFETY: PTX that ends with a zero.
        let status = unsafe { (self.driver.module_load_data)(&mut handle, image.as_ptr().cast()) };
        self.driver
            .check(status)
            .map_err(|e| format!("the driver does not take the kernels of {name}: {e}"))?;
        Ok(handle as usize)
    }

    /// Loads all kernels at once, which the driver compiles on a machine's first run: meant to go on
    /// while weights are read.
    ///
    /// # Errors
    /// The driver does not take them.
    pub(crate) fn prepare(&self) -> Result<(), KernelError> {
        std::thread::scope(|scope| {
            let load = |index| scope.spawn(move || self.module(index).map(|_| ()));
            let threads: Vec<_> = (0..MODULES.len()).map(load).collect();
            threads.into_iter().try_for_each(|thread| {
                let loaded = thread
                    .join()
                    .unwrap_or_else(|_| Err("a thread died".into()));
                loaded.map_err(KernelError::Cuda)
            })
        })
    }

    /// [`ARRIVALS`] counters for a kernel that leaves them as they are: zero.
    fn arrivals(self: &Arc<Cuda>) -> DevicePtr {
        let memory = self.arrivals.get_or_init(|| {
            let memory = self.alloc(ARRIVALS * size_of::<u32>());
            self.zero(&memory);
            memory
        });
        memory.ptr()
    }

    /// Numbers in the device's memory, uploaded the first time that this thread asks for them. They stay until
    /// it has asked for [`TABLES`] others: no other thread can take them away before the kernel that reads
    /// them is begun.
    pub(crate) fn table(self: &Arc<Cuda>, numbers: &[u32]) -> DevicePtr {
        thread_local! {
            static KEPT: RefCell<HashMap<usize, Tables>> = RefCell::default();
        }
        KEPT.with_borrow_mut(|kept| {
            let tables = kept.entry(Arc::as_ptr(self) as usize).or_default();
            if let Some(memory) = tables.known.get(numbers) {
                return memory.ptr();
            }
            if tables.order.len() >= TABLES
                && let Some(oldest) = tables.order.pop_front()
            {
                tables.retired.extend(tables.known.remove(&oldest));
            }
            if tables.retired.len() > RETIRED {
                tables.retired.pop_front();
            }
            let memory = self.alloc(size_of_val(numbers).max(4));
            self.write(&memory, 0, bytemuck::cast_slice(numbers));
            let ptr = memory.ptr();
            let numbers: Arc<[u32]> = numbers.into();
            tables.order.push_back(Arc::clone(&numbers));
            tables.known.insert(numbers, memory);
            ptr
        })
    }
}

/// Numbers in the device's memory, and in which order they came.
#[derive(Default)]
struct Tables {
    known: HashMap<Arc<[u32]>, Memory>,
    order: VecDeque<Arc<[u32]>>,
    /// Forgotten, but perhaps just found by the operation that asks for another.
    retired: VecDeque<Memory>,
}

impl Drop for Cuda {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        self.wait();
        drop(self.blaslt.take());
        self.pool.clear(&self.driver);
        let staging = self
            .staging
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(staging) = staging {
            staging.free(&self.driver);
        }
        for module in self.modules.iter().filter_map(OnceLock::get).flatten() {
            // SAFETY: loaded by `load`, and nothing runs any more.
            unsafe { (self.driver.module_unload)(*module as Handle) };
        }
        // SAFETY: made by `start`, and nothing runs any more.
        unsafe {
            (self.driver.stream_destroy)(self.stream);
            (self.driver.primary_ctx_release)(self.device as i32);
        }
    }
}
