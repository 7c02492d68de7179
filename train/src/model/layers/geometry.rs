//! Shape of a convolution on the CPU, and where its inputs lie in memory.

use super::ConvolutionOptions;
use super::taps::STEP;

/// Shape of a convolution with a square kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Number of images.
    pub images: usize,
    /// Input channels.
    pub channels_in: usize,
    /// Output channels.
    pub channels_out: usize,
    /// Input height and width.
    pub input: [usize; 2],
    /// Side of the kernel.
    pub kernel: usize,
    /// Input positions from one output position to the next.
    pub stride: usize,
    /// Zeros before and after the height, and before and after the width.
    pub padding: [[usize; 2]; 2],
}

impl Geometry {
    /// Output height and width.
    pub fn output(&self) -> [usize; 2] {
        let options = ConvolutionOptions { stride: self.stride, padding: self.padding, depthwise: false };
        options.output(self.input, self.kernel)
    }

    /// Zeros above and to the left.
    pub fn before(&self) -> [usize; 2] {
        self.padding.map(|[before, _]| before)
    }

    /// Largest offset of a tap within its phase, in positions of the phase.
    pub fn reach(&self) -> usize {
        (self.kernel - 1) / self.stride
    }

    /// Rows and columns of an input plane of one phase.
    pub fn phase_plane(&self) -> [usize; 2] {
        self.output().map(|side| side + self.reach())
    }

    /// Floats after a plane's last position that a kernel may read.
    pub fn slack(&self) -> usize {
        STEP + self.kernel + self.before()[1]
    }

    pub fn phases(&self) -> usize {
        // A kernel smaller than the stride reads only the first phases.
        self.stride.min(self.kernel)
    }

    /// Floats of one plane of one phase, with the slack after it.
    pub fn plane_length(&self) -> usize {
        let [rows, columns] = self.phase_plane();
        rows * columns + self.slack()
    }

    /// Floats of all phases of one channel.
    pub fn channel_length(&self) -> usize {
        self.phases() * self.phases() * self.plane_length()
    }

    /// Flattened output positions, including the unused ones at the end of each row.
    pub fn positions(&self) -> usize {
        self.output()[0] * self.phase_plane()[1]
    }

    /// Offset of every tap, row by row, from an output position within a channel.
    pub fn taps(&self) -> Vec<usize> {
        let columns = self.phase_plane()[1];
        (0..self.kernel * self.kernel)
            .map(|tap| {
                let (y, x) = (tap / self.kernel, tap % self.kernel);
                let phase = (y % self.stride) * self.phases() + x % self.stride;
                phase * self.plane_length() + (y / self.stride) * columns + x / self.stride
            })
            .collect()
    }

    /// Height and width with the padding.
    pub fn padded(&self) -> [usize; 2] {
        std::array::from_fn(|axis| self.input[axis] + self.padding[axis].iter().sum::<usize>())
    }

    /// Floats of a padded image.
    pub fn padded_length(&self) -> usize {
        self.padded().iter().product::<usize>() * self.channels_in
    }

    /// Where the inputs of each output position begin in a padded image with channels last.
    pub fn starts(&self) -> Vec<usize> {
        self.channels_last(self.output(), self.stride, [0; 2])
    }

    /// Where each position of an image begins in a padded image with channels last.
    pub fn padded_places(&self) -> Vec<usize> {
        self.channels_last(self.input, 1, self.before())
    }

    /// Every `stride`th position of a padded image with channels last, from a row and column on.
    fn channels_last(
        &self,
        [rows, columns]: [usize; 2],
        stride: usize,
        [row, column]: [usize; 2],
    ) -> Vec<usize> {
        let width = self.padded()[1];
        let at = |y: usize, x: usize| ((row + y * stride) * width + column + x * stride) * self.channels_in;
        (0..rows).flat_map(|y| (0..columns).map(move |x| at(y, x))).collect()
    }

    pub fn input_length(&self) -> usize {
        self.channels_in * self.input[0] * self.input[1]
    }

    pub fn output_length(&self) -> usize {
        let [height, width] = self.output();
        self.channels_out * height * width
    }
}
