//! Backends: the passes of the method, fused, on one kind of machine each.
//!
//! [`Backend`] is the only thing the rest of the library sees. Every
//! implementer is held to [`crate::loss::reference()`] by the same table of
//! cases: sets and counts exact, loss and gradient within the precision's bound.

use ndarray::{Array2, ArrayView2};

use crate::loss::{Batch, LossOutput, LossSettings, PairTotals, RowNumbers, Rows, ThresholdGradient};
use crate::{Error, Result};

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "kernels")]
pub mod device;
#[cfg(feature = "emulated")]
pub mod emulated;
mod open;
mod step;

pub use open::{AutoDevice, DeviceSpec, OpenOptions, auto, open, open_with};

/// One device with one workspace, which is allocated once and reused.
///
/// A backend remembers the pairs of its last [`loss`](Backend::loss), so that
/// [`threshold_gradient`](Backend::threshold_gradient) walks them without a second sweep (the CPU sweeps
/// again where their similarities exceeded its budget). Two batches at once, such as train and meta batch,
/// need two backends.
pub trait Backend: Send {
    /// The device's name: `cpu`, `cuda:0`, `emulated`.
    fn name(&self) -> String;

    /// Mines the batch, evaluates the loss and its gradient, and refills `output` (SPEC 1-4).
    ///
    /// # Errors
    /// Bad shapes ([`Batch::validate`]), settings ([`LossSettings::validate`]) or
    /// rows ([`Error::NotFinite`], [`Error::NotUnit`]).
    /// After an error `output` is unspecified and nothing is remembered.
    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()>;

    /// [`loss`](Backend::loss) of rows of any length but 0: they are scaled to unit length, and the gradients
    /// are with respect to the rows as given. No [`threshold_gradient`](Backend::threshold_gradient) can
    /// follow.
    ///
    /// # Errors
    /// As [`loss`](Backend::loss); [`Error::NotUnit`] for a row of zeros.
    fn normalized_loss(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()>;

    /// First step of the loss of a part of a batch ([`Batch::part`]): m+ and the positive pairs of its
    /// anchors.
    ///
    /// The four steps together do what [`loss`](Backend::loss) does. Each part of a batch has a backend of
    /// its own, and between the steps the caller exchanges what the parts found. From the numbers of its
    /// references a part sums its own rows of `(G + Gᵀ) E`, so no gradients are exchanged.
    ///
    /// | step | fills in | what the next step needs |
    /// | --- | --- | --- |
    /// | `same_class` | `min_pos`, `total_pos`, `total_neg`, means | `min_pos` of all anchors |
    /// | [`sweep`](Backend::sweep) | `max_neg`, `probe_neg` | `max_neg` of all anchors, sums of `probe_neg` and `total_pos` |
    /// | [`select`](Backend::select) | `count_pos`, `count_neg`, `gamma_pos`, `gamma_neg` | both counts of all anchors |
    /// | [`gradient`](Backend::gradient) | `loss`, `gradient`, `active`, derivatives by lambda | |
    ///
    /// Totals count the part's own pairs; [`LossOutput::add_part`] adds them up. All steps take the same
    /// rows. After a failed step, or a [`loss`](Backend::loss) in between, start again with `same_class`. On
    /// the CPU each row's numbers and gradient equal those of the whole batch bit for bit, however it is
    /// split; the loss agrees to rounding.
    ///
    /// # Errors
    /// As [`loss`](Backend::loss).
    fn same_class(
        &mut self,
        part: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()>;

    /// Second step: m-, the probe's count and the candidates, from m+ of the anchors and of the references.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] without the step before it, or if shape or labels are not those of that step;
    /// [`Error::LengthMismatch`] if numbers are missing or there are too many; as [`loss`](Backend::loss).
    fn sweep(
        &mut self,
        part: &Batch<'_>,
        min_pos: RowNumbers<'_, f32>,
        output: &mut LossOutput,
    ) -> Result<()>;

    /// Third step: |P_i| and |N_i|, from m- of the anchors and of the references and from the `totals` of all
    /// parts.
    ///
    /// # Errors
    /// As [`sweep`](Backend::sweep).
    fn select(
        &mut self,
        part: &Batch<'_>,
        max_neg: RowNumbers<'_, f32>,
        totals: PairTotals,
        output: &mut LossOutput,
    ) -> Result<()>;

    /// Last step: the part's share of the loss, and the whole gradient of its anchors, from the sizes of the
    /// sets of the anchors and of the references. [`threshold_gradient`](Backend::threshold_gradient) then
    /// returns the part's share: along the tangent of its anchors, and of references that are no anchors.
    ///
    /// # Errors
    /// As [`sweep`](Backend::sweep).
    fn gradient(
        &mut self,
        part: &Batch<'_>,
        count_pos: RowNumbers<'_, u32>,
        count_neg: RowNumbers<'_, u32>,
        output: &mut LossOutput,
    ) -> Result<()>;

    /// The two sums of SPEC 5 over the pairs of the last [`loss`](Backend::loss), at its thresholds.
    ///
    /// They are the derivatives by `lambda_pos` and `lambda_neg` of <dL/dE, tangent>, the change of the loss
    /// as the rows move along a tangent; the mined pairs stay. `tangent` `[B, D]` is the derivative of the
    /// anchors along a direction, the `edot` of SPEC 5, and `reference_tangent` `[N, D]` that of the
    /// references (zero if absent; unused in the square form). `batch` must be the batch of that call.
    ///
    /// To learn a threshold, take the tangent of the embeddings along the gradient of a meta loss with
    /// respect to the network's weights. A step of rate eta goes against the loss's gradient, so `-eta` times
    /// a sum is the meta loss's derivative by that threshold, which the threshold descends:
    /// `lambda -= lambda_rate * -eta * sum`.
    ///
    /// ```
    /// use ddtas::backend::{Backend, cpu::CpuBackend};
    /// use ddtas::loss::{Batch, LossOutput, LossSettings};
    /// use ddtas::ndarray::array;
    ///
    /// let embeddings = array![[1.0f32, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]];
    /// let tangent = array![[0.0f32, 0.0], [-0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]; // the second row turns
    /// let labels = [0, 0, 1, 1];
    /// let batch = Batch::square(embeddings.view(), &labels);
    /// let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
    ///
    /// // The change along the tangent at one threshold.
    /// let mut change = |lambda_pos| {
    ///     let settings = LossSettings { lambda_pos, ..LossSettings::default() };
    ///     backend.loss(&batch, &settings, &mut output)?;
    ///     Ok::<f64, ddtas::Error>((&output.gradient * &tangent).mapv(f64::from).sum())
    /// };
    /// let quotient = (change(0.71)? - change(0.69)?) / 0.02;
    ///
    /// backend.loss(&batch, &LossSettings::default(), &mut output)?;
    /// let sums = backend.threshold_gradient(&batch, tangent.view(), None)?;
    /// assert!(sums.pos > 0.1 && (sums.pos - quotient).abs() < 1e-3);
    /// # Ok::<(), ddtas::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] without a loss before it;
    /// [`Error::LengthMismatch`] if shapes differ from it;
    /// [`Error::NotFinite`] if a tangent is not finite.
    fn threshold_gradient(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<ThresholdGradient>;

    /// The `k` most similar references of every query, for Recall@K, without the Q x N matrix.
    ///
    /// `references = None` searches the queries among themselves and leaves each out of its own list. Labels
    /// are ignored. Equal similarities are ordered by index, so the result is unique.
    ///
    /// # Errors
    /// As [`loss`](Backend::loss); [`Error::InvalidSetting`] if `k` is 0, or more than both
    /// the number of references and [`Nearest::LONGEST`]; [`Error::OutOfMemory`] if memory
    /// cannot hold the lists.
    fn nearest(&mut self, queries: &Rows<'_>, references: Option<&Rows<'_>>, k: usize) -> Result<Nearest>;

    /// Checks and prepares a gallery once for all searches that `work` makes in it, so that a GPU backend
    /// copies it once. The default implementation prepares nothing: each search reads the gallery anew.
    ///
    /// # Errors
    /// As [`nearest`](Backend::nearest), and the errors of `work`.
    fn search(
        &mut self,
        gallery: &Rows<'_>,
        work: &mut dyn FnMut(&mut dyn PreparedGallery) -> Result<()>,
    ) -> Result<()> {
        work(&mut Unprepared { backend: self, gallery: gallery.view() })
    }

    /// Bytes the workspace holds now. Except for kept pairs, it stays as large as the largest batch so far needed
    /// it: to free it, drop the backend and make another.
    fn workspace_bytes(&self) -> usize;
}

/// A gallery that [`Backend::search`] has prepared.
pub trait PreparedGallery {
    /// The `k` most similar rows of the gallery for every query, as [`Backend::nearest`] returns them.
    ///
    /// # Errors
    /// As [`Backend::nearest`].
    fn nearest(&mut self, queries: &Rows<'_>, k: usize) -> Result<Nearest>;
}

/// Queries and gallery of a search within one set of rows, given as row numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Picked<'a> {
    /// The rows used as queries.
    pub queries: &'a [u32],
    /// The rows to search, which may include the queries; `None`: the whole set.
    pub gallery: Option<&'a [u32]>,
}

struct Unprepared<'a, 'g, B: ?Sized> {
    backend: &'a mut B,
    gallery: Rows<'g>,
}

impl<B: Backend + ?Sized> PreparedGallery for Unprepared<'_, '_, B> {
    fn nearest(&mut self, queries: &Rows<'_>, k: usize) -> Result<Nearest> {
        self.backend.nearest(queries, Some(&self.gallery), k)
    }
}

/// Most similar references of each query, most similar first.
///
/// With fewer than `k` references the rest of a row is [`Nearest::NONE`] and `-inf`.
#[derive(Debug, Clone, PartialEq)]
pub struct Nearest {
    /// Indices of references, `[Q, k]`.
    pub indices: Array2<u32>,
    /// Their similarities, `[Q, k]`.
    pub similarities: Array2<f32>,
}

impl Nearest {
    /// Index that stands for "no reference left".
    pub const NONE: u32 = u32::MAX;

    /// `k` may be up to the number of references, or up to this if there are fewer references.
    pub const LONGEST: usize = 1 << 16;

    /// Lists of length `k` for `queries` queries, nothing found yet.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if memory cannot hold them.
    pub fn none(queries: usize, k: usize) -> Result<Self> {
        Ok(Self {
            indices: matrix(queries, k, Self::NONE)?,
            similarities: matrix(queries, k, f32::NEG_INFINITY)?,
        })
    }

    /// As [`none`](Self::none) for a search among `references` rows, with `k` checked.
    pub(crate) fn of_search(queries: usize, references: usize, k: usize) -> Result<Self> {
        if k == 0 || k > references.max(Self::LONGEST) {
            let range = "1 to the number of references, or to 65,536 where there are fewer";
            return Err(Error::InvalidSetting { name: "k", value: k.to_string(), range });
        }
        Self::none(queries, k)
    }
}

fn matrix<T: Copy>(rows: usize, columns: usize, value: T) -> Result<Array2<T>> {
    let length = rows.saturating_mul(columns);
    let refused = Error::OutOfMemory {
        what: "lists of nearest references",
        bytes: length.saturating_mul(size_of::<T>()),
    };
    let mut values = Vec::new();
    if values.try_reserve_exact(length).is_err() {
        return Err(refused);
    }
    values.resize(length, value);
    Array2::from_shape_vec((rows, columns), values).map_err(|_| refused)
}
