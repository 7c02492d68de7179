//! The input of every pass: unit rows with labels, square or rectangular.

use half::{bf16, f16};
use ndarray::{Array2, ArrayView2, Axis};

use crate::{Error, Result};

/// Type of the entries of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum ElementType {
    /// Single precision.
    #[default]
    F32,
    /// IEEE half precision.
    F16,
    /// Brain floating point.
    Bf16,
}

impl ElementType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// As the programs and files spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of an entry.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// How far a row's norm may be from 1. The narrow types round each entry
    /// by up to half a unit in the last place, which moves the norm by as much.
    #[must_use]
    pub const fn norm_tolerance(self) -> f64 {
        match self {
            Self::F32 => 1e-3,
            Self::F16 => 2e-3,
            Self::Bf16 => 1e-2,
        }
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A borrowed matrix of embeddings, one row an image, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Embeddings<'a> {
    /// Single precision.
    F32(ArrayView2<'a, f32>),
    /// IEEE half precision.
    F16(ArrayView2<'a, f16>),
    /// Brain floating point.
    Bf16(ArrayView2<'a, bf16>),
}

impl<'a> From<ArrayView2<'a, f32>> for Embeddings<'a> {
    fn from(view: ArrayView2<'a, f32>) -> Self {
        Self::F32(view)
    }
}

impl<'a> From<ArrayView2<'a, f16>> for Embeddings<'a> {
    fn from(view: ArrayView2<'a, f16>) -> Self {
        Self::F16(view)
    }
}

impl<'a> From<ArrayView2<'a, bf16>> for Embeddings<'a> {
    fn from(view: ArrayView2<'a, bf16>) -> Self {
        Self::Bf16(view)
    }
}

impl Embeddings<'_> {
    /// Reborrows the matrix: views are invariant in their lifetime, so it cannot be shortened implicitly.
    #[must_use]
    pub fn view(&self) -> Embeddings<'_> {
        match self {
            Self::F32(m) => Embeddings::F32(m.view()),
            Self::F16(m) => Embeddings::F16(m.view()),
            Self::Bf16(m) => Embeddings::Bf16(m.view()),
        }
    }

    /// Number of rows (B or N).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape().0
    }

    /// Number of dimensions (D).
    #[must_use]
    pub fn dim(&self) -> usize {
        self.shape().1
    }

    fn shape(&self) -> (usize, usize) {
        match self {
            Self::F32(m) => m.dim(),
            Self::F16(m) => m.dim(),
            Self::Bf16(m) => m.dim(),
        }
    }

    fn is_contiguous(&self) -> bool {
        match self {
            Self::F32(m) => m.is_standard_layout(),
            Self::F16(m) => m.is_standard_layout(),
            Self::Bf16(m) => m.is_standard_layout(),
        }
    }

    /// Type of the entries.
    #[must_use]
    pub fn element_type(&self) -> ElementType {
        match self {
            Self::F32(_) => ElementType::F32,
            Self::F16(_) => ElementType::F16,
            Self::Bf16(_) => ElementType::Bf16,
        }
    }

    /// How far a row's norm may be from 1.
    #[must_use]
    pub fn norm_tolerance(&self) -> f64 {
        self.element_type().norm_tolerance()
    }

    /// Copies the rows with these numbers, in this order.
    pub(crate) fn select(&self, rows: &[usize]) -> OwnedEmbeddings {
        match self {
            Self::F32(m) => OwnedEmbeddings::F32(m.select(Axis(0), rows)),
            Self::F16(m) => OwnedEmbeddings::F16(m.select(Axis(0), rows)),
            Self::Bf16(m) => OwnedEmbeddings::Bf16(m.select(Axis(0), rows)),
        }
    }

    /// The same matrix in float64.
    #[must_use]
    pub fn to_f64(&self) -> Array2<f64> {
        match self {
            Self::F32(m) => m.mapv(f64::from),
            Self::F16(m) => m.mapv(f64::from),
            Self::Bf16(m) => m.mapv(f64::from),
        }
    }
}

/// A matrix of embeddings that owns its entries.
#[derive(Debug, Clone)]
pub enum OwnedEmbeddings {
    /// Single precision.
    F32(Array2<f32>),
    /// IEEE half precision.
    F16(Array2<f16>),
    /// Brain floating point.
    Bf16(Array2<bf16>),
}

impl OwnedEmbeddings {
    /// `rows` rounded to `dtype`.
    #[must_use]
    pub fn new(rows: &Array2<f32>, dtype: ElementType) -> Self {
        match dtype {
            ElementType::F32 => Self::F32(rows.clone()),
            ElementType::F16 => Self::F16(rows.mapv(f16::from_f32)),
            ElementType::Bf16 => Self::Bf16(rows.mapv(bf16::from_f32)),
        }
    }

    /// The matrix as a backend takes it.
    #[must_use]
    pub fn view(&self) -> Embeddings<'_> {
        match self {
            Self::F32(m) => Embeddings::F32(m.view()),
            Self::F16(m) => Embeddings::F16(m.view()),
            Self::Bf16(m) => Embeddings::Bf16(m.view()),
        }
    }
}

/// Embeddings with their labels. A negative label takes the row out of every pair. The check of a loss applies
/// to such rows too: fill them with a unit vector, any one, rather than zeros.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The matrix, `[rows, dim]`, rows of unit L2 norm.
    pub embeddings: Embeddings<'a>,
    /// One label a row.
    pub labels: &'a [i64],
}

impl<'a> Rows<'a> {
    /// Joins a matrix and its labels; lengths are checked by [`Batch::validate`].
    pub fn new(embeddings: impl Into<Embeddings<'a>>, labels: &'a [i64]) -> Self {
        Self { embeddings: embeddings.into(), labels }
    }

    /// Reborrows the rows.
    #[must_use]
    pub fn view(&self) -> Rows<'_> {
        Rows { embeddings: self.embeddings.view(), labels: self.labels }
    }
}

/// Whether rows are checked for NaN and unit norm before use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnitCheck {
    /// One pass over the rows; the default. Costs O(B D) beside O(B² D).
    #[default]
    Check,
    /// The caller vouches for the rows. Other rows give a meaningless loss, never undefined behaviour.
    Trust,
}

/// Says which reference of the rectangular form is the same row as an anchor; the two are never a pair.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Identity<'a> {
    /// Unknown: a row that is on both sides is recognised by its value, through SPEC 1's rule on exact
    /// duplicates.
    #[default]
    ByValue,
    /// Reference `first + i` is anchor i.
    From(usize),
    /// Reference `list[i]` is anchor i; [`Identity::ABSENT`] if anchor i is not among the references.
    List(&'a [u32]),
}

impl Identity<'_> {
    /// List entry of an anchor that is not among the references.
    pub const ABSENT: u32 = u32::MAX;

    /// The reference that is the same row as anchor `i`, if that is known.
    #[must_use]
    pub fn of(&self, i: usize) -> Option<usize> {
        match self {
            Self::ByValue => None,
            Self::From(first) => Some(first.saturating_add(i)),
            Self::List(list) => {
                list.get(i).filter(|entry| **entry != Self::ABSENT).map(|entry| *entry as usize)
            }
        }
    }
}

/// Anchors against references: the input of a loss evaluation.
///
/// The square form, [`Batch::square`], has the anchors themselves as references;
/// row i is never a pair of itself. The rectangular form has rows of its own on the
/// other side: a memory bank, or the batch gathered from many devices. There
/// [`Identity`] says which reference is an anchor itself.
///
/// A part of a batch, [`Batch::part`], is the rectangular form of some of its anchors against all of its
/// rows.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// The rows the loss is averaged over.
    pub anchors: Rows<'a>,
    /// The rows they are compared with; `None` means the anchors.
    pub references: Option<Rows<'a>>,
    /// Rectangular form only: which references are anchors.
    pub identity: Identity<'a>,
    /// Rectangular form only: also compute dL/d(references).
    pub reference_gradient: bool,
    /// B of the factor 1/B if these anchors are a part of a batch; `None`: the number of anchors. For the loss
    /// of a whole batch, square or not, it scales loss and gradients and changes nothing else.
    pub total: Option<usize>,
    /// Whether rows are checked first.
    pub check: UnitCheck,
}

impl<'a> Batch<'a> {
    /// Every row against every other row.
    pub fn square(embeddings: impl Into<Embeddings<'a>>, labels: &'a [i64]) -> Self {
        Self {
            anchors: Rows::new(embeddings, labels),
            references: None,
            identity: Identity::ByValue,
            reference_gradient: false,
            total: None,
            check: UnitCheck::Check,
        }
    }

    /// Anchors against references of their own.
    ///
    /// ```
    /// use ddtas::backend::{Backend, cpu::CpuBackend};
    /// use ddtas::loss::{Batch, Identity, LossOutput, LossSettings, Rows};
    /// use ddtas::ndarray::{array, s};
    ///
    /// // A bank whose last two rows are the batch itself.
    /// let bank = array![[0.6f32, 0.8], [0.0, 1.0], [1.0, 0.0], [0.8, 0.6]];
    /// let labels = [1, 1, 0, 0];
    /// let anchors = Rows::new(bank.slice(s![2.., ..]), &labels[2..]);
    /// let batch = Batch::rectangular(anchors, Rows::new(bank.view(), &labels))
    ///     .with_identity(Identity::From(2))
    ///     .with_reference_gradient();
    ///
    /// let mut output = LossOutput::default();
    /// CpuBackend::new().loss(&batch, &LossSettings::default(), &mut output)?;
    /// assert_eq!(output.total_pos, 2); // no row is a pair of itself
    /// assert_eq!(output.gradient.dim(), (2, 2));
    /// assert_eq!(output.reference_gradient.map(|rows| rows.dim()), Some((4, 2)));
    /// # Ok::<(), ddtas::Error>(())
    /// ```
    #[must_use]
    pub fn rectangular(anchors: Rows<'a>, references: Rows<'a>) -> Self {
        Self { references: Some(references), ..Self::square(anchors.embeddings, anchors.labels) }
    }

    /// Some anchors of a batch of `total` anchors against all its references: first the anchors of the whole
    /// batch, in the same order in every part, then any further references. `anchors` may be empty.
    ///
    /// A part's loss is evaluated in four steps, with an exchange between the parts after each:
    /// [`Backend::same_class`](crate::backend::Backend::same_class) and the three after it. For the gradient of
    /// references that are no anchors, they take the anchors' place in parts of their own (`docs/parts.md`).
    #[must_use]
    pub fn part(anchors: Rows<'a>, references: Rows<'a>, identity: Identity<'a>, total: usize) -> Self {
        Self { identity, total: Some(total), ..Self::rectangular(anchors, references) }
    }

    /// Says which references are anchors; without effect in the square form.
    #[must_use]
    pub fn with_identity(self, identity: Identity<'a>) -> Self {
        Self { identity, ..self }
    }

    /// Also asks for dL/d(references); without effect in the square form.
    #[must_use]
    pub fn with_reference_gradient(self) -> Self {
        Self { reference_gradient: true, ..self }
    }

    /// Skips the check for NaN and unit norm.
    #[must_use]
    pub fn trusted(self) -> Self {
        Self { check: UnitCheck::Trust, ..self }
    }

    /// The references, whichever form this is.
    #[must_use]
    pub fn reference_rows(&self) -> Rows<'a> {
        self.references.unwrap_or(self.anchors)
    }

    /// B of the factor 1/B.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total.unwrap_or(self.anchors.labels.len())
    }

    /// Whether both sides are the same rows.
    #[must_use]
    pub fn is_square(&self) -> bool {
        self.references.is_none()
    }

    /// Checks shapes and types: lengths, dimensions, layout. Contents (NaN, unit norm) are
    /// checked by the backends while they read the rows.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::LengthMismatch`], [`Error::TypeMismatch`], [`Error::NotContiguous`];
    /// [`Error::InvalidSetting`] for a total of 0, or an identity that names no reference or one of another
    /// label than its anchor's.
    pub fn validate(&self) -> Result<()> {
        // A part may have no anchors: a process can hold no row of the batch.
        let empty = self.anchors.labels.is_empty();
        if self.total.is_none() || !empty || self.references.is_none() {
            validate_rows("anchors", &self.anchors)?;
        }
        if let Some(references) = &self.references {
            validate_rows("references", references)?;
            validate_dims(self.anchors.embeddings.dim(), references.embeddings.dim())?;
            let types = [&self.anchors, references].map(|rows| rows.embeddings.element_type());
            if types[0] != types[1] {
                return Err(Error::TypeMismatch { anchors: types[0], references: types[1] });
            }
            validate_identity(&self.identity, self.anchors.labels, references.labels)?;
        }
        // It may be below the number of rows: those of a part may be references, to find their gradient.
        check_total(self.total)
    }
}

/// Checks that B of the factor 1/B, if given, is not 0.
pub(crate) fn check_total(total: Option<usize>) -> Result<()> {
    if total != Some(0) {
        return Ok(());
    }
    Err(Error::InvalidSetting { name: "total", value: "0".into(), range: "at least 1" })
}

/// Checks that the reference that `identity` names for each anchor exists and has the anchor's label.
///
/// # Errors
/// As [`Batch::validate`].
pub(crate) fn validate_identity(identity: &Identity<'_>, anchors: &[i64], references: &[i64]) -> Result<()> {
    if let Identity::List(list) = identity
        && list.len() != anchors.len()
    {
        let (expected, got) = (anchors.len(), list.len());
        return Err(Error::LengthMismatch { what: "list of the anchors' references", expected, got });
    }
    for (i, label) in anchors.iter().enumerate() {
        if let Some(reference) = identity.of(i)
            && references.get(reference) != Some(label)
        {
            return Err(Error::InvalidSetting {
                name: "identity",
                value: format!("reference {reference} for anchor {i}"),
                range: "a reference of the anchor's label",
            });
        }
    }
    Ok(())
}

/// Checks the shape of one side.
///
/// # Errors
/// As [`Batch::validate`].
pub(crate) fn validate_rows(name: &'static str, rows: &Rows<'_>) -> Result<()> {
    validate_shape(name, rows.embeddings.shape(), rows.labels)?;
    if !rows.embeddings.is_contiguous() {
        return Err(Error::NotContiguous { rows: name });
    }
    Ok(())
}

/// Checks that a side has rows and dimensions, and one label per row.
///
/// # Errors
/// [`Error::Empty`], [`Error::LengthMismatch`].
pub(crate) fn validate_shape(name: &'static str, (count, dim): (usize, usize), labels: &[i64]) -> Result<()> {
    has_entries(name, (count, dim))?;
    if labels.len() != count {
        let what = match name {
            "anchors" => "labels of the anchors",
            "queries" => "labels of the queries",
            _ => "labels of the references",
        };
        return Err(Error::LengthMismatch { what, expected: count, got: labels.len() });
    }
    Ok(())
}

/// Checks that a side has rows and dimensions.
///
/// # Errors
/// [`Error::Empty`].
pub(crate) fn has_entries(name: &'static str, (count, dim): (usize, usize)) -> Result<()> {
    if count == 0 || dim == 0 { Err(Error::Empty { rows: name }) } else { Ok(()) }
}

/// Checks that both sides have the same number of dimensions.
///
/// # Errors
/// [`Error::LengthMismatch`].
pub(crate) fn validate_dims(expected: usize, got: usize) -> Result<()> {
    same_length("dimension of the references", expected, got)
}

/// Checks that two lengths are equal.
///
/// # Errors
/// [`Error::LengthMismatch`].
pub(crate) fn same_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::LengthMismatch { what, expected, got }) }
}

/// Checks one row given the sum of its squares. Every backend applies this rule.
///
/// # Errors
/// [`Error::NotFinite`] or [`Error::NotUnit`], naming the row.
pub(crate) fn check_unit(rows: &'static str, row: usize, square_sum: f64, tolerance: f64) -> Result<()> {
    let passes = square_sum.is_finite() && (square_sum.sqrt() - 1.0).abs() <= tolerance;
    if passes { Ok(()) } else { Err(Error::bad_row(rows, row, square_sum)) }
}
