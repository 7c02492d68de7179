//! `CudaContext`: the loss and Recall@K on tensors in the GPU's memory, without copies.
//!
//! Everything is ordered on the caller's stream: torch's current one.

use std::ffi::c_void;

use ddtas::backend::device::{ElementType, Options, ResidentBatch, ResidentOutput, ResidentRows};
use ddtas::loss;
use ddtas::retrieval::recall_by;
use dlpark::DlpackFlags;
use dlpark::ffi::{DLDataType, DLDevice, DLDeviceType};
use dlpark::python::consumer::stream::cuda as stream_argument;
use dlpark::python::{DlpackStream, ImportRequest, ImportedDlpack, StreamArg};
use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::context::{Found, QueryMetrics, depths, found, metrics_of_queries};
use crate::error::raise;
use crate::input::dtype_name;
use crate::resident::{CudaBackend, Target, Where, Workspaces, part_of, settings_of};
use crate::settings::Settings;
use crate::sides::{SEARCH, Sides, unit_check};

/// Workspaces on GPUs. `budget`: bytes for the candidates of all tiles, the library's if left out;
/// `allow_tf32`: float32 rows may be multiplied to TF32's precision.
#[pyclass(frozen, module = "ddtas")]
pub struct CudaContext(Workspaces);

/// The stream that the tensors must be ready on.
struct Stream(usize);

// SAFETY: the address is that of a live stream of the tensors' device, by the caller's word; null is the
// default stream.
unsafe impl DlpackStream for Stream {
    fn as_python_arg(&self, _py: Python<'_>, _device: DLDevice) -> PyResult<StreamArg> {
        Ok(stream_argument(self.0 as *mut c_void))
    }

    unsafe fn wait_for_producer(&self, _device: DLDevice, producer: *mut c_void) -> PyResult<bool> {
        // On the same stream no wait is needed; otherwise the producer synchronises.
        Ok(producer.addr() == self.0)
    }
}

/// A tensor held while the GPU reads it.
struct Resident {
    name: &'static str,
    tensor: ImportedDlpack,
    device: DLDevice,
    dtype: DLDataType,
    shape: Vec<i64>,
    address: u64,
}

impl Resident {
    fn new(name: &'static str, object: &Bound<'_, PyAny>, stream: &Stream) -> PyResult<Self> {
        let refuse = |message: String| PyValueError::new_err(message);
        let tensor = ImportRequest::new(object.as_borrowed())?.import(Some(stream), None)?;
        let (device, dtype, shape, address) = {
            let valid = tensor.validate().map_err(|error| refuse(error.to_string()))?;
            if valid.device().device_type != DLDeviceType::CUDA {
                return Err(refuse(format!(
                    "the {name} are not in the memory of a GPU, and the anchors are"
                )));
            }
            if !valid.is_compact().unwrap_or(false) {
                return Err(refuse(format!("the {name} must be in row-major order without gaps")));
            }
            // SAFETY: the address is only computed, and the producer vouches that it lies in its allocation.
            let address = unsafe { valid.offset_bytes_ptr() }.map_err(|error| refuse(error.to_string()))?;
            (valid.device(), valid.dtype(), valid.shape().to_vec(), address.addr() as u64)
        };
        Ok(Self { name, tensor, device, dtype, shape, address })
    }

    fn expect(&self, dtype: DLDataType, shape: &[i64]) -> PyResult<()> {
        let name = self.name;
        if !self.dtype.matches(dtype) {
            let (wanted, got) = (dtype_name(dtype), dtype_name(self.dtype));
            return Err(PyTypeError::new_err(format!("the {name} must be {wanted}, not {got}")));
        }
        if self.shape != shape {
            return Err(PyValueError::new_err(format!(
                "the {name}: expected {shape:?}, got {:?}",
                self.shape
            )));
        }
        Ok(())
    }
}

/// Rows, labels and gradient of one side.
struct Side {
    rows: Resident,
    labels: Resident,
    gradient: Option<Resident>,
}

/// Rows, int64 labels and the float32 gradient to be written, if one is wanted.
type PythonSide<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>);

impl Side {
    fn new(name: &'static str, (rows, labels, gradient): &PythonSide<'_>, stream: &Stream) -> PyResult<Self> {
        let rows = Resident::new(name, rows, stream)?;
        let &[count, _] = rows.shape.as_slice() else {
            return Err(PyValueError::new_err(format!(
                "the {name} must have 2 dimensions, rows and entries"
            )));
        };
        let labels = Resident::new("labels", labels, stream)?;
        labels.expect(DLDataType::I64, &[count])?;
        let gradient =
            gradient.as_ref().map(|object| Resident::new("gradient", object, stream)).transpose()?;
        if let Some(gradient) = &gradient {
            gradient.expect(DLDataType::F32, &rows.shape)?;
            if gradient.tensor.flags().contains(DlpackFlags::READ_ONLY) {
                return Err(PyValueError::new_err("the gradient is read-only"));
            }
        }
        let side = Self { rows, labels, gradient };
        let others = [Some(&side.labels), side.gradient.as_ref()];
        if others.into_iter().flatten().any(|other| other.device != side.rows.device) {
            return Err(PyValueError::new_err(format!(
                "the {name}, their labels and gradient are on different GPUs"
            )));
        }
        Ok(side)
    }

    fn resident(&self) -> ResidentRows {
        ResidentRows {
            count: self.rows.shape[0] as usize,
            embeddings: self.rows.address,
            labels: self.labels.address,
            gradient: self.gradient.as_ref().map_or(0, |gradient| gradient.address),
        }
    }
}

fn resident_type(rows: &Resident) -> PyResult<ElementType> {
    let dtype = rows.dtype;
    match () {
        () if dtype.is::<f32>() => Ok(ElementType::F32),
        () if dtype.is::<f16>() => Ok(ElementType::F16),
        () if dtype.is::<bf16>() => Ok(ElementType::Bf16),
        () => Err(PyTypeError::new_err("embeddings on a GPU must be float32, float16 or bfloat16")),
    }
}

fn batch_of(sides: &[Side], check: bool) -> PyResult<ResidentBatch> {
    let (anchors, references) = match sides {
        [anchors] => (anchors, None),
        [anchors, references] => (anchors, Some(references)),
        _ => return Err(PyValueError::new_err("one side or two")),
    };
    let dim = anchors.rows.shape[1];
    if let Some(references) = references {
        references.rows.expect(anchors.rows.dtype, &[references.rows.shape[0], dim])?;
        if references.rows.device != anchors.rows.device {
            return Err(PyValueError::new_err("the anchors and the references are on different GPUs"));
        }
    }
    Ok(ResidentBatch {
        dim: dim as usize,
        dtype: resident_type(&anchors.rows)?,
        anchors: anchors.resident(),
        references: references.map(Side::resident),
        check: unit_check(check),
    })
}

impl CudaContext {
    /// Runs `work` in the workspace of that GPU and stream, with the interpreter detached.
    pub fn compute<T: Send>(
        &self,
        py: Python<'_>,
        place: Where,
        work: impl FnOnce(&mut CudaBackend) -> ddtas::Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| self.0.compute(place, work)).map_err(raise)
    }
}

#[pymethods]
impl CudaContext {
    #[new]
    #[pyo3(signature = (budget = None, allow_tf32 = false))]
    fn new(budget: Option<usize>, allow_tf32: bool) -> Self {
        Self(Workspaces::new(Options { budget, tf32: allow_tf32 }))
    }

    /// Issues the loss of one side, or of the first side against the second, without waiting: gradients and
    /// scalars are written to the given addresses. Only `ddtas.torch` calls it, see `resident.rs`.
    #[pyo3(signature = (place, sides, identity, lambdas, mining, numbers, check, output, normalize = false))]
    #[allow(clippy::too_many_arguments)]
    fn enqueue_loss(
        &self,
        py: Python<'_>,
        place: Where,
        sides: Vec<Target>,
        identity: usize,
        lambdas: usize,
        mining: &str,
        numbers: [f64; 8],
        check: bool,
        output: (usize, usize),
        normalize: bool,
    ) -> PyResult<()> {
        let total = sides.first().map_or(0, |anchors| anchors.2);
        let part = part_of(&sides, (None, identity), total, (check, normalize))?;
        let settings = settings_of(mining, numbers, lambdas)?;
        let output = ResidentOutput { scalars: output.0 as u64, loss: output.1 as u64 };
        // SAFETY: `ddtas.torch` has checked the tensors and holds them until everything is issued; torch does
        // not reuse their memory before this stream has finished.
        self.compute(py, place, |backend| unsafe { backend.enqueue_loss(&part, &settings, output) })
    }

    /// Both sums of the threshold gradient along tangents, `[B, D]` and perhaps `[N, D]`, in float32.
    fn threshold_gradient(
        &self,
        py: Python<'_>,
        sides: Vec<PythonSide<'_>>,
        tangents: (Bound<'_, PyAny>, Option<Bound<'_, PyAny>>),
        settings: Settings,
        check: bool,
        stream: usize,
    ) -> PyResult<(f64, f64)> {
        let settings = settings.to_library()?;
        let on = Stream(stream);
        let sides: Vec<Side> = sides
            .iter()
            .zip(["anchors", "references"])
            .map(|(side, name)| Side::new(name, side, &on))
            .collect::<PyResult<_>>()?;
        let batch = batch_of(&sides, check)?;
        let given = [Some(&tangents.0), tangents.1.as_ref()];
        let mut held = Vec::new();
        let mut addresses = [0; 2];
        for ((tangent, side), address) in given.into_iter().zip(&sides).zip(&mut addresses) {
            if let Some(tangent) = tangent {
                let tangent = Resident::new("tangent", tangent, &on)?;
                tangent.expect(DLDataType::F32, &side.rows.shape)?;
                *address = tangent.address;
                held.push(tangent);
            }
        }
        let ordinal = sides[0].rows.device.device_id as usize;
        let sums = self.compute(py, (ordinal, stream), |backend| {
            let mut output = loss::LossOutput::default();
            // SAFETY: types, shapes and device of every tensor were checked above; `sides` and `held` hold
            // them until the call has waited for the GPU; the protocol made them ready on this stream; the
            // gradient is a fresh tensor.
            unsafe { backend.loss_resident(&batch, &settings, &mut output) }?;
            // SAFETY: as above.
            unsafe { backend.threshold_gradient_resident(&batch, addresses) }
        })?;
        drop((sides, held));
        Ok((sums.pos, sums.neg))
    }

    /// As `Context.query_metrics`, on rows in the host's memory that are copied to the GPU in blocks.
    #[pyo3(signature = (place, queries, labels, gallery, gallery_labels, identity, ks))]
    #[allow(clippy::too_many_arguments)]
    fn query_metrics<'py>(
        &self,
        py: Python<'py>,
        place: Where,
        queries: &Bound<'py, PyAny>,
        labels: &Bound<'py, PyAny>,
        gallery: Option<&Bound<'py, PyAny>>,
        gallery_labels: Option<&Bound<'py, PyAny>>,
        identity: Option<&Bound<'py, PyAny>>,
        ks: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<QueryMetrics> {
        let ks = depths(&ks)?;
        let sides = Sides::new(&SEARCH, (queries, labels), (gallery, gallery_labels), identity)?;
        let batch = sides.batch(false, unit_check(true))?;
        let metrics = self.compute(py, place, |backend| metrics_of_queries(backend, &batch, &ks))?;
        Ok(metrics.into_python(py))
    }

    /// Recall@K of rows in the GPU's memory among themselves; labels and lists are copied to the host.
    fn recall_at_k(
        &self,
        py: Python<'_>,
        rows: PythonSide<'_>,
        ks: Vec<Bound<'_, PyAny>>,
        stream: usize,
    ) -> PyResult<Found> {
        let ks = depths(&ks)?;
        let side = Side::new("queries", &rows, &Stream(stream))?;
        let batch = batch_of(std::slice::from_ref(&side), true)?;
        let ordinal = side.rows.device.device_id as usize;
        let recall = self.compute(py, (ordinal, stream), |backend| {
            // SAFETY: as in `threshold_gradient`; `side` holds the tensors.
            let labels = unsafe { backend.labels_resident(&batch.anchors) }?;
            recall_by(&labels, &ks, &mut |picked, k| {
                // SAFETY: as above.
                unsafe { backend.nearest_resident(&batch, Some(picked), k) }
            })
        })?;
        drop(side);
        Ok(found(recall))
    }
}
