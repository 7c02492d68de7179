//! Scaling of pixel values, as a pretrained network expects it.

/// Order of a picture's channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelOrder {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red, as networks from Caffe expect.
    Bgr,
}

/// How pixels are scaled: `(value - mean) / deviation` for each channel, where value is in 0..=1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocessing {
    /// Mean of red, green and blue.
    pub mean: [f32; 3],
    /// Divisor of red, green and blue.
    pub deviation: [f32; 3],
    /// Order of the network's input channels.
    pub order: ChannelOrder,
    /// Whether pictures are resized as floats, without rounding to bytes, as PyTorch resizes tensors.
    pub floats: bool,
}

impl Default for Preprocessing {
    /// Mean and standard deviation of ImageNet, as torchvision's networks expect.
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

    /// Values scaled to -1..=1, as timm's AugReg transformers expect.
    #[must_use]
    pub fn symmetric() -> Self {
        Self { mean: [0.5; 3], deviation: [0.5; 3], ..Self::default() }
    }

    /// Bytes minus the mean of each channel, blue first, as Caffe's BN-Inception expects.
    #[must_use]
    pub fn caffe() -> Self {
        let mean = [128.0, 117.0, 104.0].map(|mean| mean / 255.0);
        Self { mean, deviation: [1.0 / 255.0; 3], order: ChannelOrder::Bgr, floats: true }
    }

    /// Index of the network's input channel for red, green or blue (`channel` 0, 1 or 2).
    pub(super) fn place(&self, channel: usize) -> usize {
        match self.order {
            ChannelOrder::Rgb => channel,
            ChannelOrder::Bgr => 2 - channel,
        }
    }
}
