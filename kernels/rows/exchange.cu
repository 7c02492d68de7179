// exchange.cu: numbers that go in and out between the steps of a part of a batch, and identity by index.
// Truth: src/loss/reference.rs, of the whole batch. Launcher: src/backend/device/steps.rs.
//
// invert_order, identity: the position of each anchor's own reference. A thread for each row.
// take_numbers: m+, m- or the sizes of the mined sets, as the caller gathered them. A thread for each row of either side.
// report_numbers: the numbers that a step found, in original order. A thread for each anchor.

#include "ptx/device.cuh"

KERNEL(invert_order, InvertParams, 1) {
    uint32_t position = block_x() * THREADS + thread_index();
    if (position < p.count) p.positions[p.order[position]] = position;
}

KERNEL(identity, IdentityParams, 1) {
    uint32_t i = block_x() * THREADS + thread_index();
    if (i >= p.count) return;
    uint32_t original = p.order[i];
    uint64_t reference = p.list != nullptr ? p.list[original] : p.first + original;
    p.identity[i] = reference < p.references ? p.positions[reference] : NO_ROW;
}

// The number of a row; `without`, that of a row without pairs, if the caller gave none.
DEVICE float number_of(const void *values, uint32_t row, bool there, float without) {
    return there ? static_cast<const float *>(values)[row] : without;
}
DEVICE uint32_t count_of(const void *values, uint32_t row, bool there) {
    return there ? static_cast<const uint32_t *>(values)[row] : 0;
}
DEVICE uint32_t max_neg_key(float max_neg) { return max_neg == -INFINITE ? 0 : ordered_key(max_neg); }

KERNEL(take_numbers, TakeParams, 1) {
    const Pairs &pairs = p.pairs;
    uint32_t i = block_x() * THREADS + thread_index();
    if (i == 0 && p.totals != nullptr) {
        pairs.totals[0] = p.totals[0];
        pairs.totals[1] = p.totals[1];
    }
    if (i < pairs.anchors.count) {
        uint32_t row = pairs.anchors.order[i];
        if (p.which == NUMBERS_MIN_POS) {
            pairs.same[i].min_pos = number_of(p.anchors, row, true, INFINITE);
        } else if (p.which == NUMBERS_MAX_NEG) {
            pairs.max_neg[i] = max_neg_key(number_of(p.anchors, row, true, -INFINITE));
        } else {
            pairs.positives.count[i] = count_of(p.anchors, row, true);
            pairs.negatives.count[i] = count_of(p.anchors_neg, row, true);
        }
    }
    if (i < pairs.references.count && pairs.columns != nullptr) {
        uint32_t row = pairs.references.order[i];
        bool there = row < p.given;
        RowNumbers &numbers = pairs.columns[i];
        if (p.which == NUMBERS_MIN_POS) {
            numbers.min_pos = number_of(p.references, row, there, INFINITE);
        } else if (p.which == NUMBERS_MAX_NEG) {
            numbers.max_neg = max_neg_key(number_of(p.references, row, there, -INFINITE));
        } else {
            numbers.count_pos = count_of(p.references, row, there);
            numbers.count_neg = count_of(p.references_neg, row, there);
        }
    }
}

KERNEL(report_numbers, ReportParams, 1) {
    const Pairs &pairs = p.pairs;
    uint32_t i = block_x() * THREADS + thread_index();
    if (i == 0 && p.totals != nullptr) {
        p.totals[0] = pairs.counters->probe_neg;
        p.totals[1] = pairs.counters->total_pos;
    }
    if (i >= pairs.anchors.count) return;
    uint32_t row = pairs.anchors.order[i];
    if (p.which == NUMBERS_MIN_POS) {
        static_cast<float *>(p.anchors)[row] = pairs.same[i].min_pos;
    } else if (p.which == NUMBERS_MAX_NEG) {
        uint32_t key = pairs.max_neg[i];
        static_cast<float *>(p.anchors)[row] = key == 0 ? -INFINITE : key_value(key);
    } else {
        static_cast<uint32_t *>(p.anchors)[row] = pairs.positives.count[i];
        static_cast<uint32_t *>(p.anchors_neg)[row] = pairs.negatives.count[i];
    }
}
