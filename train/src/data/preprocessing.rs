//! From bytes of a picture to what a network was trained on.

/// Order of a picture's channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelOrder {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red: networks of Caffe.
    Bgr,
}

/// How values are scaled: `(value - mean) / deviation` of each channel, value and mean of 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocessing {
    /// Mean of red, green and blue.
    pub mean: [f32; 3],
    /// What red, green and blue are divided by.
    pub deviation: [f32; 3],
    /// Which channel is the network's first.
    pub order: ChannelOrder,
    /// Whether pictures are resized in floats, as PyTorch resizes tensors, and not rounded to bytes in between.
    pub floats: bool,
}

impl Default for Preprocessing {
    /// By mean and standard deviation of ImageNet, as torchvision's networks expect.
    fn default() -> Self {
        Self {
            mean: [0.485, 0.456, 0.406],
            deviation: [0.229, 0.224, 0.225],
            order: ChannelOrder::Rgb,
            floats: false,
        }
    }
}

impl Preprocessing {
    /// `(byte - 127) / 128`, as TensorFlow's EfficientNet-Lite expects.
    #[must_use]
    pub fn centred() -> Self {
        let (mean, deviation) = ([127.0 / 255.0; 3], [128.0 / 255.0; 3]);
        Self { mean, deviation, order: ChannelOrder::Rgb, floats: true }
    }

    /// Bytes less the mean of each channel, blue first, as Caffe's BN-Inception expects.
    #[must_use]
    pub fn caffe() -> Self {
        let mean = [128.0, 117.0, 104.0].map(|mean| mean / 255.0);
        Self { mean, deviation: [1.0 / 255.0; 3], order: ChannelOrder::Bgr, floats: true }
    }

    /// The network's channel that holds red, green or blue, 0 to 2.
    pub(super) fn place(&self, channel: usize) -> usize {
        match self.order {
            ChannelOrder::Rgb => channel,
            ChannelOrder::Bgr => 2 - channel,
        }
    }
}
