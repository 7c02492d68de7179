//! The kernels inside this binary, loaded into a context, and found by file and name.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::driver::check;
use crate::backend::device::Kernel;
use crate::{Error, Result};

/// Images the build script made of kernels/*.cu.
mod embedded {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// Shared memory a block may use without asking for more (every GPU since Maxwell).
const DEFAULT_SHARED_BYTES: u32 = 48 * 1024;

/// A kernel, and how much dynamic shared memory it has been granted.
#[derive(Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    shared_bytes: u32,
}

/// The loaded kernels of one context.
pub(super) struct Module {
    /// By the name of their file.
    images: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
    context: Arc<CudaContext>,
}

impl Module {
    /// Loads every embedded image; the driver picks the GPU's machine code from
    /// each, or compiles its PTX for a GPU newer than this build.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver refuses an image.
    pub(super) fn load(context: Arc<CudaContext>) -> Result<Self> {
        check("cuCtxSetCurrent", context.bind_to_thread())?;
        let mut module = Self { images: HashMap::new(), functions: HashMap::new(), context };
        for (name, image) in embedded::IMAGES {
            // SAFETY: nvcc wrote the image, whose header carries its own length.
            let loaded = unsafe { result::module::load_data(image.as_ptr().cast()) };
            module.images.insert(name, check("cuModuleLoadData", loaded)?);
        }
        Ok(module)
    }

    /// A kernel, granted at least `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`Error::Device`] if its image does not have it, or the GPU does not have that much.
    pub(super) fn function(&mut self, kernel: Kernel, shared_bytes: u32) -> Result<sys::CUfunction> {
        let name = kernel.name();
        let mut function = match self.functions.get(name) {
            Some(known) => *known,
            None => Function { raw: self.find(kernel)?, shared_bytes: DEFAULT_SHARED_BYTES },
        };
        if shared_bytes > function.shared_bytes {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
            // SAFETY: the function belongs to an image that stays loaded as long as `self`.
            let granted = unsafe { result::function::set_function_attribute(function.raw, attribute, bytes) };
            check("cuFuncSetAttribute", granted)?;
            function.shared_bytes = shared_bytes;
        }
        self.functions.insert(name, function);
        Ok(function.raw)
    }

    /// Looked for in its own image alone: compute-sanitizer counts a look that fails as an error.
    fn find(&self, kernel: Kernel) -> Result<sys::CUfunction> {
        let name = kernel.name();
        let missing = || Error::Device { call: "cuModuleGetFunction", code: format!("no kernel {name}") };
        let symbol = CString::new(name).map_err(|_| missing())?;
        let image = *self.images.get(kernel.file()).ok_or_else(missing)?;
        // SAFETY: the image stays loaded as long as `self`.
        unsafe { result::module::get_function(image, symbol) }.map_err(|_| missing())
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        for &image in self.images.values() {
            // SAFETY: loaded in `load`, unloaded only here.
            let _ = unsafe { result::module::unload(image) };
        }
    }
}
