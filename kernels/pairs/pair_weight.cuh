// pair_weight.cuh: a pair's weight from its similarity, for the gradient and the threshold pass.
#ifndef DDTAS_PAIR_WEIGHT_CUH
#define DDTAS_PAIR_WEIGHT_CUH

#include "pairs/candidate_word.cuh"
#include "pairs/pairs.cuh"

// One anchor's share of a pair's weight, without the sigmoid: 0 if the anchor does not keep the pair.
DEVICE float kept_share(const RowWeights &weights, bool positive, float s) {
    if (positive) return s < weights.pos_bound ? -weights.pos_scale : 0.0f;
    return s > weights.neg_bound ? weights.neg_scale : 0.0f;
}

// The shares of anchor i and, if reference j is an anchor too, of j. The square form adds that of the earlier row first, so that
// M is symmetric to the last bit.
DEVICE float pair_share(const Pairs &pairs, uint32_t i, uint32_t j, float s, bool &positive) {
    positive = same_class(pairs.classes[i], j);
    if (positive && is_duplicate(pairs, i, j, s)) return 0.0f;
    float share = kept_share(pairs.weights[i], positive, s);
    if (pairs.column_weights != nullptr) share += kept_share(pairs.column_weights[j], positive, s);
    return share;
}

// A pair's term of the loss is softplus of sharpness * (S - lambda) (SPEC 4). This is that argument divided by log(2), for the
// hardware's powers of 2. f64 constants are two f32 parts each; S - lambda is exact near lambda, where it matters most.
constexpr double kLog2E = 1.4426950408889634;
struct Argument {
    float lambda, scale, scale_low, shift;
    DEVICE float at(float s) const {
        float left = s - lambda;
        return fmaf(scale, left, fmaf(scale_low, left, shift));
    }
};
DEVICE Argument argument_of(const Settings &settings, bool positive) {
    double lambda = positive ? settings.lambda_pos : settings.lambda_neg;
    if (settings.lambda != 0) lambda = reinterpret_cast<const double *>(settings.lambda)[positive ? 0 : 1];
    double scale = kLog2E * (positive ? -settings.beta : settings.alpha);
    auto lambda_high = static_cast<float>(lambda), scale_high = static_cast<float>(scale);
    return Argument{lambda_high, scale_high, static_cast<float>(scale - static_cast<double>(scale_high)),
                    static_cast<float>(scale * (static_cast<double>(lambda_high) - lambda))};
}

// log(1 + exp(x)) and its derivatives for x = log(2) y, for every y: the power never overflows. Only operations that every kernel
// rounds alike, so that a pair has the same weight in all of them.
struct Logistic {
    float power, share;  // 2^-|y| and 1 / (1 + 2^-|y|)
    float y;
    DEVICE explicit Logistic(float of) : power(exp2_fast(-fabsf(of))), share(reciprocal_fast(1.0f + power)), y(of) {}
    DEVICE float sigmoid() const { return (y >= 0.0f ? 1.0f : power) * share; }
    // sigmoid (1 - sigmoid), without the difference, which would cancel where the sigmoid is nearly 1.
    DEVICE float slope() const { return power * share * share; }
    // softplus - sigmoid; log(1 + z) / z is a polynomial with a relative error of 3e-7 on [0, 1].
    DEVICE float softplus_less_sigmoid() const {
        float ratio = fmaf(-8.539206348e-3f, power, 4.408962280e-2f);
        ratio = fmaf(ratio, power, -1.076816991e-1f);
        ratio = fmaf(ratio, power, 1.774524003e-1f);
        ratio = fmaf(ratio, power, -2.449546307e-1f);
        ratio = fmaf(ratio, power, 3.327547908e-1f);
        ratio = fmaf(ratio, power, -4.999740422e-1f);
        ratio = fmaf(ratio, power, 9.999998212e-1f);
        return fmaxf(fmaf(ratio, power, fmaf(0.69314718f, fmaxf(y, 0.0f), -sigmoid())), 0.0f);
    }
};
DEVICE float pair_sigmoid(const Settings &settings, bool positive, float s) {
    return Logistic(argument_of(settings, positive).at(s)).sigmoid();
}
DEVICE float pair_slope(const Settings &settings, bool positive, float s) {
    return Logistic(argument_of(settings, positive).at(s)).slope();
}

// An element of M: G_ij, plus G_ji if reference j is an anchor too.
DEVICE float pair_weight(const Pairs &pairs, uint32_t i, uint32_t j, float s) {
    bool positive;
    float share = pair_share(pairs, i, j, s, positive);
    return share == 0.0f ? 0.0f : share * pair_sigmoid(pairs.settings, positive, s);
}

#endif
