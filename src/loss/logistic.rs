//! Softplus and its derivative, the sigmoid (SPEC 4). AT-ASMS uses the sigmoid too (SPEC 3).

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
