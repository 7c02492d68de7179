//! The scalars of a loss for kernels and C ABI. cbindgen copies the comments into `ddtas.h`.

use super::{LossOutput, Reference};

/// The scalars that ddtas_enqueue_loss writes to device memory, aligned to 8 bytes. The struct has no
/// struct_size and never grows: 120 bytes in every version of the interface.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct LossScalars {
    /// The loss L; NaN if a row is bad.
    pub loss: f64,
    /// dL/d(lambda_pos).
    pub dloss_dlambda_pos: f64,
    /// dL/d(lambda_neg).
    pub dloss_dlambda_neg: f64,
    /// Mean similarity over all positive pairs; NaN if there is none.
    pub mean_pos: f64,
    /// Mean similarity over all negative pairs; NaN if there is none.
    pub mean_neg: f64,
    /// The positive tolerance in force, after adaptation; +inf with DDTAS_MINING_MODE_NONE.
    pub gamma_pos: f64,
    /// The negative tolerance in force, likewise.
    pub gamma_neg: f64,
    /// Negatives that passed the probe.
    pub probe_neg: u64,
    /// Ordered positive pairs of the batch.
    pub total_pos: u64,
    /// Ordered negative pairs of the batch.
    pub total_neg: u64,
    /// Anchors that enter the loss.
    pub active: u64,
    /// Sum of the squares of the bad row's entries, if there is a bad row.
    pub bad_square_sum: f64,
    /// The first anchor that is not finite or not of unit length; DDTAS_ABSENT if there is none.
    pub bad_anchor: u32,
    /// The first reference that is not finite or not of unit length; DDTAS_ABSENT if there is none.
    pub bad_reference: u32,
    /// Positive pairs that were mined.
    pub mined_pos: u64,
    /// Negative pairs that were mined.
    pub mined_neg: u64,
}

const _: () = assert!(size_of::<LossScalars>() == 120, "kernels write so many bytes to programs' memory");

impl LossScalars {
    /// Value of `bad_anchor` and `bad_reference` if no row is bad.
    pub(crate) const NO_ROW: u32 = u32::MAX;
}

impl LossOutput {
    /// The scalars of this output, in which no row is bad.
    #[must_use]
    pub fn scalars(&self) -> LossScalars {
        let (mined_pos, mined_neg) = self.mined();
        LossScalars {
            loss: self.loss,
            dloss_dlambda_pos: self.dloss_dlambda_pos,
            dloss_dlambda_neg: self.dloss_dlambda_neg,
            mean_pos: self.mean_pos,
            mean_neg: self.mean_neg,
            gamma_pos: self.gamma_pos,
            gamma_neg: self.gamma_neg,
            probe_neg: self.probe_neg,
            total_pos: self.total_pos,
            total_neg: self.total_neg,
            active: self.active,
            bad_square_sum: 1.0,
            bad_anchor: LossScalars::NO_ROW,
            bad_reference: LossScalars::NO_ROW,
            mined_pos,
            mined_neg,
        }
    }

    /// Copies the scalars, except the numbers of mined pairs, which [`mined`](Self::mined) computes.
    pub fn set_scalars(&mut self, scalars: &LossScalars) {
        self.loss = scalars.loss;
        self.dloss_dlambda_pos = scalars.dloss_dlambda_pos;
        self.dloss_dlambda_neg = scalars.dloss_dlambda_neg;
        self.mean_pos = scalars.mean_pos;
        self.mean_neg = scalars.mean_neg;
        self.gamma_pos = scalars.gamma_pos;
        self.gamma_neg = scalars.gamma_neg;
        self.probe_neg = scalars.probe_neg;
        self.total_pos = scalars.total_pos;
        self.total_neg = scalars.total_neg;
        self.active = scalars.active;
    }
}

impl Reference {
    /// The scalars of this reference.
    #[must_use]
    pub fn scalars(&self) -> LossScalars {
        let (selection, weighted) = (&self.selection, &self.weighted);
        let (mined_pos, mined_neg) = selection.mined();
        LossScalars {
            loss: weighted.loss,
            dloss_dlambda_pos: weighted.dloss_dlambda_pos,
            dloss_dlambda_neg: weighted.dloss_dlambda_neg,
            mean_pos: self.mean_pos,
            mean_neg: self.mean_neg,
            gamma_pos: selection.tolerances.pos,
            gamma_neg: selection.tolerances.neg,
            probe_neg: selection.probe_neg,
            total_pos: selection.total_pos,
            total_neg: self.total_neg,
            active: self.active(),
            mined_pos,
            mined_neg,
            ..LossOutput::default().scalars()
        }
    }
}
