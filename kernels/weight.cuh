// weight.cuh: from a similarity to a pair's weight, for the gradient and the threshold pass.
#ifndef DDTAS_WEIGHT_CUH
#define DDTAS_WEIGHT_CUH

#include "tile.cuh"
#include "word.cuh"

// What one anchor's mining makes of a pair: its share, or 0 if the anchor does not keep it.
DEVICE float kept_share(const RowWeights &weights, bool positive, float s) {
    if (positive) return s < weights.pos_bound ? -weights.pos_scale : 0.0f;
    return s > weights.neg_bound ? weights.neg_scale : 0.0f;
}

// Both anchors' shares of the pair of anchor i and reference j, where reference j is an anchor too. The square form adds
// those of both rows, i before j, whoever asks: M is symmetric to the last bit.
DEVICE float pair_share(const Pairs &pairs, uint32_t i, uint32_t j, float s, bool &positive) {
    positive = same_class(pairs.classes[i], j);
    if (positive && is_duplicate(pairs, i, j, s)) return 0.0f;
    float share = kept_share(pairs.weights[i], positive, s);
    if (pairs.column_weights != nullptr) share += kept_share(pairs.column_weights[j], positive, s);
    return share;
}

// The pair's term of the loss is softplus of this (SPEC 4).
DEVICE float pair_argument(const Settings &settings, bool positive, float s) {
    double lambda = positive ? settings.lambda_pos : settings.lambda_neg;
    if (settings.lambda != 0) lambda = reinterpret_cast<const double *>(settings.lambda)[positive ? 0 : 1];
    double sharpness = positive ? -settings.beta : settings.alpha;
    return static_cast<float>(sharpness * (static_cast<double>(s) - lambda));
}
// log(1 + exp(x)) and its derivative, stable for every x: the exponential never overflows.
DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
DEVICE float sigmoid(float x) {
    float e = expf(-fabsf(x));
    return x >= 0.0f ? 1.0f / (1.0f + e) : e / (1.0f + e);
}
DEVICE float pair_sigmoid(const Settings &settings, bool positive, float s) {
    return sigmoid(pair_argument(settings, positive, s));
}
// Its slope, sigmoid (1 - sigmoid): a difference would have no digits left where the sigmoid is nearly 1.
DEVICE float pair_slope(const Settings &settings, bool positive, float s) {
    float e = expf(-fabsf(pair_argument(settings, positive, s)));
    return e / ((1.0f + e) * (1.0f + e));
}

// Element of M: G_ij, plus G_ji where reference j is an anchor too.
DEVICE float pair_weight(const Pairs &pairs, uint32_t i, uint32_t j, float s) {
    bool positive;
    float share = pair_share(pairs, i, j, s, positive);
    return share == 0.0f ? 0.0f : share * pair_sigmoid(pairs.settings, positive, s);
}

// The tile of S that holds the pairs of row tile x of one side with tile y of the other.
struct PairTile {
    uint64_t index;
    bool transposed;  // x are its columns
    bool diagonal;    // both at once: each pair stands there once, for two rows of x
};
DEVICE PairTile pair_tile(const Pairs &pairs, bool of_references, uint32_t x, uint32_t y) {
    bool transposed = pairs.square ? x > y : of_references;
    return PairTile{index_of(pairs, transposed ? y : x, transposed ? x : y), transposed, pairs.square && x == y};
}

#endif
