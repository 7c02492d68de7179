//! The functions of the loss: softplus, and the sigmoid that is its derivative (SPEC 4); AT-ASMS adapts by
//! the sigmoid too.

/// `1 / (1 + exp(-x))`, stable for every x.
#[must_use]
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `log(1 + exp(x))`, stable for every x.
#[must_use]
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
