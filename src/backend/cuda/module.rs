//! The kernels inside this binary, loaded into a context, and found by name.

use std::collections::HashMap;
use std::ffi::CStr;

use cudarc::driver::{result, sys};

use super::driver::{Primary, check};
use crate::{Error, Result};

/// Images that the build script made of the .cu files of kernels/.
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
    images: Vec<sys::CUmodule>,
    /// Every kernel of every image, by name.
    functions: HashMap<String, Function>,
    context: Primary,
}

impl Module {
    /// Loads every embedded image; the driver picks the GPU's machine code from
    /// each, or compiles its PTX for a GPU newer than this build.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver refuses an image.
    pub(super) fn load(context: Primary) -> Result<Self> {
        let _kept = context.enter()?;
        let mut module = Self { images: Vec::new(), functions: HashMap::new(), context };
        for (_, image) in embedded::IMAGES {
            // SAFETY: nvcc wrote the image, whose header carries its own length.
            let loaded = unsafe { result::module::load_data(image.as_ptr().cast()) };
            let image = check("cuModuleLoadData", loaded)?;
            module.images.push(image);
            for raw in functions(image)? {
                module.functions.insert(name(raw)?, Function { raw, shared_bytes: DEFAULT_SHARED_BYTES });
            }
        }
        Ok(module)
    }

    /// The kernel called `name`, granted at least `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`Error::Device`] if no image has it, or the GPU does not have that much.
    pub(super) fn function(&mut self, name: &'static str, shared_bytes: u32) -> Result<sys::CUfunction> {
        let function = self.functions.get_mut(name).ok_or_else(|| Error::Device {
            call: "cuModuleEnumerateFunctions",
            code: format!("no image has the kernel {name}"),
        })?;
        if shared_bytes > function.shared_bytes {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
            // SAFETY: the function belongs to an image that stays loaded as long as `self`.
            let granted = unsafe { result::function::set_function_attribute(function.raw, attribute, bytes) };
            check("cuFuncSetAttribute", granted)?;
            function.shared_bytes = shared_bytes;
        }
        Ok(function.raw)
    }
}

/// The kernels of a loaded image. Asking each image for each name would make the driver report an error for
/// all but one.
fn functions(image: sys::CUmodule) -> Result<Vec<sys::CUfunction>> {
    let mut count = 0;
    // SAFETY: `count` outlives the call, which writes one integer.
    let answer = unsafe { sys::cuModuleGetFunctionCount(&raw mut count, image) };
    check("cuModuleGetFunctionCount", answer.result())?;
    let mut functions = vec![std::ptr::null_mut(); count as usize];
    // SAFETY: room for as many as the driver has counted.
    let answer = unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, image) };
    check("cuModuleEnumerateFunctions", answer.result())?;
    Ok(functions)
}

fn name(function: sys::CUfunction) -> Result<String> {
    let mut name = std::ptr::null();
    // SAFETY: `name` outlives the call, which writes one pointer.
    let answer = unsafe { sys::cuFuncGetName(&raw mut name, function) };
    check("cuFuncGetName", answer.result())?;
    // SAFETY: a NUL-terminated string, which the driver keeps as long as the image.
    Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
}

impl Drop for Module {
    fn drop(&mut self) {
        let Ok(_kept) = self.context.enter() else { return };
        for &image in &self.images {
            // SAFETY: loaded in `load`, unloaded only here.
            let _ = unsafe { result::module::unload(image) };
        }
    }
}
