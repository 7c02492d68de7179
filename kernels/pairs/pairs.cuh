// pairs.cuh: which rows form a pair, the bounds of mining, and reserving room in the pool for candidates (SPEC 1 to 3).
#ifndef DDTAS_PAIRS_CUH
#define DDTAS_PAIRS_CUH

#include "ptx/device.cuh"

// Whether anchor i and reference j form a pair. The square form has each pair once, i < j.
DEVICE bool is_pair(const Pairs &pairs, uint32_t i, uint32_t j) {
    return i < pairs.counters->valid_anchors && j < pairs.counters->valid_references && (!pairs.square || i < j);
}
DEVICE bool same_class(ClassRange range, uint32_t j) { return range.begin <= j && j < range.end; }

// A positive whose similarity reaches this share of the longer row's square sum is an exact duplicate (SPEC 1).
constexpr double kDuplicate = 1.0 - 1e-6;

// Whether j is i itself or an exact duplicate of it, for rows of one class (SPEC 1).
DEVICE bool is_duplicate(const Pairs &pairs, uint32_t i, uint32_t j, float s) {
    if (pairs.identity != nullptr && pairs.identity[i] == j) return true;
    return s >= fmaxf(pairs.anchors.duplicate[i], pairs.references.duplicate[j]);
}

// m+ minus a tolerance; +inf without a positive, so that no similarity is above it.
DEVICE float negative_bound(float min_pos, double tolerance) {
    return min_pos == INFINITE ? min_pos : static_cast<float>(static_cast<double>(min_pos) - tolerance);
}
// m- plus a tolerance; -inf without a negative (key 0), so that no similarity is below it.
DEVICE float positive_bound(uint32_t max_neg_key, double tolerance) {
    return max_neg_key == 0 ? -INFINITE : static_cast<float>(static_cast<double>(key_value(max_neg_key)) + tolerance);
}

// Reserves room in the pool for a tile's candidates, at least for their mask: the unit where it begins, NO_ROW if there is none.
// In a pool that is too small, timing decides which tiles get room. Results do not depend on it: a tile has the same bits stored
// or recomputed, and other decisions depend on the sum of all requests alone (goes_by_lists() in weigh.cu).
DEVICE uint32_t reserve(const Pairs &pairs, uint32_t count) {
    uint32_t units = ((count < TILE_MASK_WORDS ? TILE_MASK_WORDS : count) + 3) / 4;
    uint64_t first = atomic_fetch_add(&pairs.counters->pool_units, static_cast<uint64_t>(units));
    return first + units <= pairs.pool ? static_cast<uint32_t>(first) : NO_ROW;
}
// Writes the number of a tile's candidates, and reserves room for them if there are any: what `reserve` returns.
DEVICE uint32_t place_candidates(const Pairs &pairs, uint64_t tile, uint32_t count) {
    pairs.tile_counts[tile] = count;
    return pairs.tile_segments[tile] = count != 0 ? reserve(pairs, count) : NO_ROW;
}
DEVICE bool has_bad_row(const Counters &counters) { return counters.bad_anchor != NO_ROW || counters.bad_reference != NO_ROW; }
DEVICE bool is_stored(const Pairs &pairs, uint64_t tile) { return pairs.tile_segments[tile] != NO_ROW; }
// Index of the first candidate of a segment that begins at unit `unit` of the pool, and of a stored tile.
DEVICE uint64_t segment_at(uint32_t unit) { return static_cast<uint64_t>(unit) * 4; }
DEVICE uint64_t segment_of(const Pairs &pairs, uint64_t tile) { return segment_at(pairs.tile_segments[tile]); }

struct Tolerances {
    double pos;
    double neg;
};

// SPEC 3; src/loss/select.rs adapt().
DEVICE Tolerances adapt(const Pairs &pairs) {
    const Settings &settings = pairs.settings;
    uint64_t probe = pairs.totals[0], total = pairs.totals[1];
    if (!settings.adaptive || total == 0 || probe <= total) return Tolerances{settings.gamma_pos, settings.gamma_neg};
    double rho = static_cast<double>(probe) / static_cast<double>(total);
    double t = settings.tolerance / (1.0 + exp(-rho));
    return Tolerances{multiply_rn(settings.gamma_pos, 1.0 + t), multiply_rn(settings.gamma_neg, 1.0 - t)};
}

#endif
