//! The two products of an unfused loss, S = E Rᵀ and dE = S R, by cuBLAS on rows in a GPU's memory.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use ddtas::loss::{Batch, Embeddings};
use ddtas::{Error, Result};

/// Most bytes of S at a time; a larger S is computed in stripes.
const SIMILARITIES: usize = 8 << 30;

/// Rows, S and dE of one batch, all of one type.
pub(crate) struct Products {
    blas: CudaBlas,
    stream: Arc<CudaStream>,
    anchors: CudaSlice<u8>,
    /// None in the square form.
    references: Option<CudaSlice<u8>>,
    similarities: CudaSlice<u8>,
    gradient: CudaSlice<u8>,
    /// Anchors, references, dimensions, anchors in a stripe.
    shape: [usize; 4],
    element: Element,
}

/// A type of rows as cuBLAS calls it, and how it is to be multiplied.
#[derive(Clone, Copy)]
struct Element {
    name: sys::cudaDataType,
    bytes: usize,
    arithmetic: sys::cublasComputeType_t,
}

impl Element {
    fn new(rows: &Embeddings<'_>, tf32: bool) -> Self {
        use sys::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32};
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};
        let (name, bytes) = match rows {
            Embeddings::F32(_) => (CUDA_R_32F, 4),
            Embeddings::F16(_) => (CUDA_R_16F, 2),
            Embeddings::Bf16(_) => (CUDA_R_16BF, 2),
        };
        Self { name, bytes, arithmetic: if tf32 { CUBLAS_COMPUTE_32F_FAST_TF32 } else { CUBLAS_COMPUTE_32F } }
    }
}

impl Products {
    /// Copies the rows to GPU `ordinal`; none if cuBLAS is not found.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver or cuBLAS refuses a call, such as for lack of memory.
    pub(crate) fn new(ordinal: usize, batch: &Batch<'_>, tf32: bool) -> Result<Option<Self>> {
        // SAFETY: looks for the library and closes it again.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let rows = &batch.anchors.embeddings;
        let element = Element::new(rows, tf32);
        let (count, dim) = (rows.rows(), rows.dim());
        let against = batch.references.as_ref().map_or(count, |rows| rows.embeddings.rows());
        let stripe = (SIMILARITIES / element.bytes / against.max(1)).clamp(1, count.max(1));

        let stream = CudaContext::new(ordinal).map_err(refused)?.new_stream().map_err(refused)?;
        let brought = |rows: &Embeddings<'_>| stream.clone_htod(bytes_of(rows)?).map_err(refused);
        let room = |rows: usize, columns: usize| {
            stream.alloc_zeros::<u8>(rows * columns * element.bytes).map_err(refused)
        };
        Ok(Some(Self {
            anchors: brought(rows)?,
            references: batch.references.as_ref().map(|rows| brought(&rows.embeddings)).transpose()?,
            similarities: room(stripe, against)?,
            gradient: room(count, dim)?,
            blas: CudaBlas::new(stream.clone()).map_err(refused)?,
            shape: [count, against, dim, stripe],
            element,
            stream,
        }))
    }

    /// Computes both products and waits for them.
    ///
    /// # Errors
    /// As [`new`](Products::new).
    pub(crate) fn make(&mut self) -> Result<()> {
        use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        let [count, against, dim, stripe] = self.shape;
        let (anchors, _in_use) = self.anchors.device_ptr(&self.stream);
        let (references, _in_use) =
            self.references.as_ref().unwrap_or(&self.anchors).device_ptr(&self.stream);
        let (similarities, _in_use) = self.similarities.device_ptr_mut(&self.stream);
        let (gradient, _in_use) = self.gradient.device_ptr_mut(&self.stream);
        for first in (0..count).step_by(stripe) {
            let rows = stripe.min(count - first);
            let offset = (first * dim * self.element.bytes) as u64;
            // cuBLAS is column-major, so its products are Sᵀ [N, B] = R Eᵀ and dEᵀ [D, B] = Rᵀ Sᵀ.
            let s = Product {
                operations: [CUBLAS_OP_T, CUBLAS_OP_N],
                shape: [against, rows, dim],
                strides: [dim, dim, against],
            };
            let de = Product {
                operations: [CUBLAS_OP_N, CUBLAS_OP_N],
                shape: [dim, rows, against],
                strides: [dim, against, dim],
            };
            // SAFETY: the buffers hold [B, D], [N, D], [stripe, N] and [B, D] elements.
            unsafe {
                s.enqueue(&self.blas, self.element, references, anchors + offset, similarities)?;
                de.enqueue(&self.blas, self.element, references, similarities, gradient + offset)?;
            }
        }
        self.stream.synchronize().map_err(refused)
    }
}

/// C = op(A) op(B), column-major: C is [m, n], the inner dimension k.
struct Product {
    operations: [sys::cublasOperation_t; 2],
    shape: [usize; 3],
    strides: [usize; 3],
}

impl Product {
    /// # Safety
    /// `a`, `b` and `c` are addresses in the GPU's memory with room for their matrices.
    unsafe fn enqueue(&self, blas: &CudaBlas, element: Element, a: u64, b: u64, c: u64) -> Result<()> {
        let number = |value: usize| {
            c_int::try_from(value)
                .map_err(|_| Error::Unavailable(format!("cuBLAS counts to 2^31, not to {value}")))
        };
        let ([m, n, k], [lda, ldb, ldc]) = (self.shape, self.strides);
        let (one, zero) = (1.0f32, 0.0f32);
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the caller's promise; both scalars outlive the call.
        unsafe {
            result::gemm_ex(
                *blas.handle(),
                self.operations[0],
                self.operations[1],
                number(m)?,
                number(n)?,
                number(k)?,
                scalar(&one),
                a as *const c_void,
                element.name,
                number(lda)?,
                b as *const c_void,
                element.name,
                number(ldb)?,
                scalar(&zero),
                c as *mut c_void,
                element.name,
                number(ldc)?,
                element.arithmetic,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(refused)
    }
}

fn bytes_of<'a>(rows: &'a Embeddings<'_>) -> Result<&'a [u8]> {
    let bytes = match rows {
        Embeddings::F32(rows) => rows.as_slice().map(bytemuck::cast_slice),
        Embeddings::F16(rows) => rows.as_slice().map(bytemuck::cast_slice),
        Embeddings::Bf16(rows) => rows.as_slice().map(bytemuck::cast_slice),
    };
    bytes.ok_or(Error::NotContiguous { rows: "anchors" })
}

fn refused(error: impl std::fmt::Debug) -> Error {
    Error::Device { call: "two products by cuBLAS", code: format!("{error:?}") }
}
