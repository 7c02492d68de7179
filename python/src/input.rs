//! Matrices and labels in Python's memory; a matrix is never copied.
//!
//! NumPy arrays come in through NumPy's own interface, which serves read-only arrays and bfloat16; everything
//! else through DLPack. Labels of another width than int64 are converted: they are small.

use ddtas::Error;
use ddtas::loss::{Embeddings, Identity};
use dlpark::DlpackElement;
use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDeviceType};
use dlpark::python::{ImportedDlpack, from_dlpack};
use dlpark::tensor::TensorRef;
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use ndarray::ArrayView2;
use numpy::{Element, PyArray1, PyArray2, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray2};
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::raise;

/// Rows of one side, kept alive while they are read.
pub struct Matrix<'py> {
    name: &'static str,
    owner: Owner<'py>,
}

enum Owner<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    F64(PyReadonlyArray2<'py, f64>),
    F16(PyReadonlyArray2<'py, f16>),
    /// NumPy has no bfloat16 of its own: the bits of `ml_dtypes.bfloat16`.
    Bf16(PyReadonlyArray2<'py, u16>),
    Dlpack(Tensor),
}

/// A matrix as the library takes it.
pub enum View<'a> {
    /// A type that the backends take.
    Single(Embeddings<'a>),
    /// The type that the scalar reference takes.
    Double(ArrayView2<'a, f64>),
}

impl<'py> Matrix<'py> {
    /// Borrows `object`; `name` is what messages call it.
    ///
    /// # Errors
    /// `TypeError` for something else than a matrix of float32, float16, bfloat16 or float64 in the host's
    /// memory; `ValueError` for one that is not 2-D or not row-major without gaps.
    pub fn new(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let owner = match object.cast::<PyUntypedArray>() {
            Ok(array) => Owner::of_array(name, array)?,
            Err(_) => Owner::Dlpack(Tensor::new(name, object)?),
        };
        let matrix = Self { name, owner };
        matrix.view()?;
        Ok(matrix)
    }

    /// # Errors
    /// As [`Matrix::new`], which has called it once.
    pub fn view(&self) -> PyResult<View<'_>> {
        let name = self.name;
        Ok(match &self.owner {
            Owner::F32(array) => View::Single(Embeddings::F32(rows_of(name, array)?)),
            Owner::F64(array) => View::Double(rows_of(name, array)?),
            Owner::F16(array) => View::Single(Embeddings::F16(rows_of(name, array)?)),
            Owner::Bf16(array) => {
                let bits = rows_of(name, array)?;
                let (shape, bits) = (bits.dim(), bits.to_slice().unwrap_or_default());
                View::Single(Embeddings::Bf16(matrix_of(name, shape, bits.reinterpret_cast::<bf16>())?))
            }
            Owner::Dlpack(tensor) => tensor.view(name)?,
        })
    }

    /// The matrix as a backend takes it.
    ///
    /// # Errors
    /// `TypeError` for float64.
    pub fn single(&self) -> PyResult<Embeddings<'_>> {
        match self.view()? {
            View::Single(embeddings) => Ok(embeddings),
            View::Double(_) => Err(self.other_type("float32, float16 or bfloat16", "float64")),
        }
    }

    /// The matrix in float64.
    ///
    /// # Errors
    /// `TypeError` for any other type.
    pub fn double(&self) -> PyResult<ArrayView2<'_, f64>> {
        match self.view()? {
            View::Double(rows) => Ok(rows),
            View::Single(_) => Err(self.other_type("float64, as the anchors are", "a narrower type")),
        }
    }

    /// The matrix in float32, as the tangents are.
    ///
    /// # Errors
    /// `TypeError` for any other type.
    pub fn float(&self) -> PyResult<ArrayView2<'_, f32>> {
        match self.view()? {
            View::Single(Embeddings::F32(rows)) => Ok(rows),
            View::Double(_) => Err(self.other_type("float32", "float64")),
            View::Single(_) => Err(self.other_type("float32", "a narrower type")),
        }
    }

    /// Whether the matrix is float64.
    pub fn is_double(&self) -> bool {
        matches!(self.view(), Ok(View::Double(_)))
    }

    /// Address of the first entry.
    pub fn address(&self) -> usize {
        match self.view() {
            Ok(View::Single(Embeddings::F32(rows))) => rows.as_ptr().addr(),
            Ok(View::Single(Embeddings::F16(rows))) => rows.as_ptr().addr(),
            Ok(View::Single(Embeddings::Bf16(rows))) => rows.as_ptr().addr(),
            Ok(View::Double(rows)) => rows.as_ptr().addr(),
            Err(_) => 0,
        }
    }

    fn other_type(&self, wanted: &str, got: &str) -> PyErr {
        PyTypeError::new_err(format!("the {} must be {wanted}, not {got}", self.name))
    }
}

impl<'py> Owner<'py> {
    fn of_array(name: &'static str, array: &Bound<'py, PyUntypedArray>) -> PyResult<Self> {
        two_dimensional(name, array.ndim())?;
        if let Ok(array) = array.cast::<PyArray2<f32>>() {
            return Ok(Self::F32(array.try_readonly()?));
        }
        if let Ok(array) = array.cast::<PyArray2<f64>>() {
            return Ok(Self::F64(array.try_readonly()?));
        }
        if let Ok(array) = array.cast::<PyArray2<f16>>() {
            return Ok(Self::F16(array.try_readonly()?));
        }
        let dtype = array.dtype();
        if dtype.typeobj().name()? == "bfloat16" && dtype.itemsize() == 2 {
            let bits = array.call_method1("view", ("uint16",))?;
            return Ok(Self::Bf16(bits.cast::<PyArray2<u16>>()?.try_readonly()?));
        }
        Err(wrong_dtype(name, &dtype.str()?.to_string()))
    }
}

/// A borrowed DLPack tensor.
struct Tensor(ImportedDlpack);

impl Tensor {
    fn new(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        if !object.hasattr("__dlpack__")? {
            let kind = object.get_type().name()?;
            let message = format!("the {name} must be a NumPy array or have __dlpack__, not {kind}");
            return Err(PyTypeError::new_err(message));
        }
        let imported = match from_dlpack(object.as_borrowed(), None, None) {
            // Producers from before DLPack 1.0 know no keywords.
            Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
                from_dlpack(object.call_method0("__dlpack__")?.as_borrowed(), None, None)?
            }
            other => other?,
        };
        let tensor = Self(imported);
        let device = tensor.valid()?.device().device_type;
        if device != DLDeviceType::CPU {
            let message =
                format!("the {name} are not in the host's memory: the GPU's is served by ddtas.torch");
            return Err(PyValueError::new_err(message));
        }
        Ok(tensor)
    }

    fn valid(&self) -> PyResult<TensorRef<'_>> {
        self.0.validate().map_err(|error| PyValueError::new_err(error.to_string()))
    }

    fn view(&self, name: &'static str) -> PyResult<View<'_>> {
        let tensor = self.valid()?;
        let dtype = tensor.dtype();
        two_dimensional(name, tensor.ndim())?;
        Ok(match () {
            () if dtype.is::<f32>() => View::Single(Embeddings::F32(typed_rows(name, &tensor)?)),
            () if dtype.is::<f16>() => View::Single(Embeddings::F16(typed_rows(name, &tensor)?)),
            () if dtype.is::<bf16>() => View::Single(Embeddings::Bf16(typed_rows(name, &tensor)?)),
            () if dtype.is::<f64>() => View::Double(typed_rows(name, &tensor)?),
            () => return Err(wrong_dtype(name, &dtype_name(dtype))),
        })
    }
}

fn typed_rows<'a, T: DlpackElement>(
    name: &'static str,
    tensor: &TensorRef<'a>,
) -> PyResult<ArrayView2<'a, T>> {
    let shape = tensor.shape();
    matrix_of(name, (shape[0] as usize, shape[1] as usize), slice_of(name, tensor)?)
}

fn slice_of<'a, T: DlpackElement>(name: &'static str, tensor: &TensorRef<'a>) -> PyResult<&'a [T]> {
    if !tensor.is_compact().unwrap_or(false) {
        return Err(raise(Error::NotContiguous { rows: name }));
    }
    // SAFETY: the producer vouches for as many values as the shape says, while the tensor is held. Device,
    // type, layout and alignment are checked by the call. A program that writes to its own tensor from
    // another thread meanwhile gets a meaningless loss, as with every library that computes outside the
    // interpreter's lock.
    unsafe { tensor.cpu_slice() }.map_err(|error| PyValueError::new_err(error.to_string()))
}

fn rows_of<'a, T: Element>(
    name: &'static str,
    array: &'a PyReadonlyArray2<'_, T>,
) -> PyResult<ArrayView2<'a, T>> {
    if !array.is_c_contiguous() {
        return Err(raise(Error::NotContiguous { rows: name }));
    }
    let shape = (array.shape()[0], array.shape()[1]);
    // Refuses an array that is not aligned to its type.
    matrix_of(name, shape, array.as_slice().map_err(|_| raise(Error::NotContiguous { rows: name }))?)
}

fn matrix_of<'a, T>(
    name: &'static str,
    shape: (usize, usize),
    values: &'a [T],
) -> PyResult<ArrayView2<'a, T>> {
    ArrayView2::from_shape(shape, values).map_err(|_| raise(Error::NotContiguous { rows: name }))
}

fn two_dimensional(name: &str, got: usize) -> PyResult<()> {
    if got == 2 {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("the {name} must have 2 dimensions, rows and entries, not {got}")))
}

fn wrong_dtype(name: &str, got: &str) -> PyErr {
    PyTypeError::new_err(format!("the {name} must be float32, float16, bfloat16 or float64, not {got}"))
}

/// NumPy's name of a type.
pub fn dtype_name(dtype: DLDataType) -> String {
    let bits = dtype.bits;
    match dtype.code {
        DLDataTypeCode::BOOL => "bool".to_owned(),
        DLDataTypeCode::INT => format!("int{bits}"),
        DLDataTypeCode::UINT => format!("uint{bits}"),
        DLDataTypeCode::FLOAT => format!("float{bits}"),
        DLDataTypeCode::BFLOAT => format!("bfloat{bits}"),
        DLDataTypeCode::COMPLEX => format!("complex{bits}"),
        other => format!("{other:?} of {bits} bits"),
    }
}

/// One label a row, as int64: borrowed where they are that already.
pub enum Labels<'py> {
    /// NumPy's own.
    Array(numpy::PyReadonlyArray1<'py, i64>),
    /// A tensor's own.
    Dlpack(LabelTensor),
    /// Converted from another width.
    Converted(Vec<i64>),
}

/// A borrowed tensor of int64.
pub struct LabelTensor(Tensor);

impl<'py> Labels<'py> {
    /// Borrows or converts `object`; `name` is what messages call it.
    ///
    /// # Errors
    /// `TypeError` for labels that are not integers, `ValueError` for more than one dimension, gaps, or a
    /// label beyond int64.
    pub fn new(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            one_dimensional(name, array.ndim())?;
            if let Ok(array) = array.cast::<PyArray1<i64>>()
                && array.is_c_contiguous()
            {
                return Ok(Self::Array(array.try_readonly()?));
            }
            return of_other_array(name, array).map(Self::Converted);
        }
        let tensor = Tensor::new(name, object)?;
        one_dimensional(name, tensor.valid()?.ndim())?;
        if tensor.valid()?.dtype().is::<i64>() && tensor.valid()?.is_compact().unwrap_or(false) {
            return Ok(Self::Dlpack(LabelTensor(tensor)));
        }
        of_other_tensor(name, &tensor.valid()?).map(Self::Converted)
    }

    /// The labels.
    ///
    /// # Errors
    /// `ValueError` if the memory is not aligned to int64.
    pub fn as_slice(&self) -> PyResult<&[i64]> {
        match self {
            Self::Array(array) => Ok(array.as_slice()?),
            Self::Dlpack(tensor) => slice_of("labels", &tensor.0.valid()?),
            Self::Converted(labels) => Ok(labels),
        }
    }
}

/// Which reference is the same row as an anchor.
pub enum Known {
    ByValue,
    From(usize),
    List(Vec<u32>),
}

impl Known {
    /// Reads `None`, the number of the reference that is anchor 0, or a number for each anchor, -1 for one
    /// that is not among the references.
    ///
    /// # Errors
    /// `TypeError` for anything else, `ValueError` for what is no number of a row.
    pub fn new(object: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(object) = object else { return Ok(Self::ByValue) };
        let is_array = object.cast::<PyUntypedArray>().is_ok() || object.hasattr("__dlpack__")?;
        if !is_array && object.hasattr("__index__")? {
            let refused = |_| {
                let message = format!("identity = {object} is out of range: the reference that is anchor 0");
                PyValueError::new_err(message)
            };
            return object.extract().map(Self::From).map_err(refused);
        }
        Self::list(Labels::new("identity", object)?.as_slice()?)
    }

    /// A number for each anchor, -1 for one that is not among the references.
    pub fn list(rows: &[i64]) -> PyResult<Self> {
        let absent = |row: &i64| if *row == -1 { Ok(Identity::ABSENT) } else { row_number("identity", *row) };
        rows.iter().map(absent).collect::<PyResult<_>>().map(Self::List)
    }

    /// The same in the library's type.
    pub fn as_library(&self) -> Identity<'_> {
        match self {
            Self::ByValue => Identity::ByValue,
            Self::From(first) => Identity::From(*first),
            Self::List(list) => Identity::List(list),
        }
    }
}

fn row_number(name: &str, value: i64) -> PyResult<u32> {
    let refused = |_| PyValueError::new_err(format!("{name} holds {value}: it must be 0 to 2^32 - 1"));
    u32::try_from(value).map_err(refused)
}

/// Similarities of rows that a step has found; empty for `None`.
///
/// # Errors
/// `TypeError` for anything but a 1-D NumPy array of float32, whose bits must not change on the way.
pub fn similarities(name: &str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<f32>> {
    let Some(object) = object else { return Ok(Vec::new()) };
    let refused = |_| {
        let got = object.getattr("dtype").and_then(|dtype| dtype.str()).or_else(|_| object.get_type().str());
        let got = got.map_or_else(|_| "another type".to_owned(), |got| got.to_string());
        PyTypeError::new_err(format!("{name} must be a NumPy array of float32 in 1 dimension, not {got}"))
    };
    let array = object.cast::<PyArray1<f32>>().map_err(refused)?;
    Ok(array.try_readonly()?.as_array().to_vec())
}

/// Sizes of sets that a step has found; empty for `None`.
///
/// # Errors
/// `TypeError` for other values than integers, `ValueError` for one that is out of range.
pub fn sizes(name: &'static str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<u32>> {
    let Some(object) = object else { return Ok(Vec::new()) };
    Labels::new(name, object)?.as_slice()?.iter().map(|size| row_number(name, *size)).collect()
}

fn one_dimensional(name: &str, got: usize) -> PyResult<()> {
    if got == 1 {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("the {name} must have 1 dimension, not {got}")))
}

/// Labels converted by NumPy, which refuses what it cannot convert.
fn of_other_array(name: &str, array: &Bound<'_, PyUntypedArray>) -> PyResult<Vec<i64>> {
    let dtype = array.dtype();
    if !matches!(dtype.kind(), b'i' | b'u') {
        let message = format!("the {name} must be integers, not {}", dtype.str()?);
        return Err(PyTypeError::new_err(message));
    }
    if dtype.kind() == b'u' && dtype.itemsize() == 8 {
        let native = array.call_method1("astype", ("uint64",))?;
        let wide = native.cast::<PyArray1<u64>>()?.try_readonly()?;
        return wide.as_array().iter().map(|&label| within_range(name, label)).collect();
    }
    let native = array.call_method1("astype", ("int64",))?;
    Ok(native.cast::<PyArray1<i64>>()?.try_readonly()?.as_array().to_vec())
}

fn of_other_tensor(name: &'static str, tensor: &TensorRef<'_>) -> PyResult<Vec<i64>> {
    fn widen<T: DlpackElement + Copy + Into<i64>>(
        name: &'static str,
        tensor: &TensorRef<'_>,
    ) -> PyResult<Vec<i64>> {
        Ok(slice_of::<T>(name, tensor)?.iter().map(|&label| label.into()).collect())
    }
    let dtype = tensor.dtype();
    match () {
        () if dtype.is::<i64>() => slice_of::<i64>(name, tensor).map(<[i64]>::to_vec),
        () if dtype.is::<i32>() => widen::<i32>(name, tensor),
        () if dtype.is::<i16>() => widen::<i16>(name, tensor),
        () if dtype.is::<i8>() => widen::<i8>(name, tensor),
        () if dtype.is::<u32>() => widen::<u32>(name, tensor),
        () if dtype.is::<u16>() => widen::<u16>(name, tensor),
        () if dtype.is::<u8>() => widen::<u8>(name, tensor),
        () if dtype.is::<u64>() => {
            slice_of::<u64>(name, tensor)?.iter().map(|&label| within_range(name, label)).collect()
        }
        () => {
            let message = format!("the {name} must be integers, not {}", dtype_name(dtype));
            Err(PyTypeError::new_err(message))
        }
    }
}

fn within_range(name: &str, label: u64) -> PyResult<i64> {
    let message = || format!("label {label} of the {name} is beyond int64");
    i64::try_from(label).map_err(|_| PyValueError::new_err(message()))
}

/// A non-negative integer that fits `usize`.
///
/// # Errors
/// `TypeError` for other values than integers, `ValueError` for one that is out of range.
pub fn whole(value: &Bound<'_, PyAny>, name: &str, range: &str) -> PyResult<usize> {
    let refused = |error: PyErr| match error.is_instance_of::<PyTypeError>(value.py()) {
        true => PyTypeError::new_err(format!("{name} = {value:?} must be an integer")),
        false => PyValueError::new_err(format!("{name} = {value} is out of range: {range}")),
    };
    value.extract::<usize>().map_err(refused)
}
