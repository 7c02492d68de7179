// order.cu: rows into class order, padded for the tiles, and checked (SPEC 1).
// Launcher: src/backend/device/loss.rs.
//
// order_tiles, order_merge: a sort of (label, index). Tiles of ORDER_TILE keys are sorted
//   in shared memory; then each key's place is the sum of its places in all tiles, found
//   by binary search. B^2 / ORDER_TILE * 10 steps: nothing beside B^2 D, and no passes
//   that wait for each other.
// prepare: gathers the rows, zeros the padding, sums squares (f64) and columns.
// classes: the range of references that have an anchor's label.
// Ignored labels get the largest key: their rows come last and in no range.

#include "tile.cuh"

constexpr uint64_t kIgnored = ~static_cast<uint64_t>(0);

struct OrderShared {
    uint64_t keys[ORDER_TILE];
    uint32_t indices[ORDER_TILE];
};
static_assert(sizeof(OrderShared) == ORDER_SHARED_BYTES, "the launch plan's shared memory");

// (label, index) pairs are unique, so every sort gives the same order.
KERNEL(order_tiles, OrderParams, 1) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<OrderShared *>(bytes);
    uint32_t first = block_x() * ORDER_TILE;
    for (uint32_t i = thread_index(); i < ORDER_TILE; i += THREADS) {
        uint32_t index = first + i;
        int64_t label = index < p.count ? p.labels[index] : -1;
        shared.keys[i] = label < 0 ? kIgnored : static_cast<uint64_t>(label);
        shared.indices[i] = index;
    }
    block_sync();
    // Bitonic: runs of `width` become sorted runs of twice the length.
    for (uint32_t width = 2; width <= ORDER_TILE; width *= 2) {
        for (uint32_t distance = width / 2; distance > 0; distance /= 2) {
            for (uint32_t pair = thread_index(); pair < ORDER_TILE / 2; pair += THREADS) {
                uint32_t low = pair / distance * 2 * distance + pair % distance, high = low + distance;
                bool ascending = (low & width) == 0;
                uint64_t low_key = shared.keys[low], high_key = shared.keys[high];
                uint32_t low_index = shared.indices[low], high_index = shared.indices[high];
                bool greater = low_key > high_key || (low_key == high_key && low_index > high_index);
                if (greater == ascending) {
                    shared.keys[low] = high_key;
                    shared.keys[high] = low_key;
                    shared.indices[low] = high_index;
                    shared.indices[high] = low_index;
                }
            }
            block_sync();
        }
    }
    for (uint32_t i = thread_index(); i < ORDER_TILE; i += THREADS) {
        p.sorted_labels[first + i] = shared.keys[i];
        p.sorted_indices[first + i] = shared.indices[i];
    }
}

// Number of keys below `key`, or up to it.
DEVICE uint32_t keys_before(const uint64_t *keys, uint32_t count, uint64_t key, bool equal_too) {
    uint32_t begin = 0, end = count;
    while (begin < end) {
        uint32_t middle = (begin + end) / 2;
        if (keys[middle] < key || (equal_too && keys[middle] == key)) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// One block a tile. Indices ascend over tiles: equal keys of earlier tiles come first.
KERNEL(order_merge, OrderParams, 1) {
    uint32_t own = block_x();
    for (uint32_t i = thread_index(); i < ORDER_TILE; i += THREADS) {
        uint64_t key = p.sorted_labels[own * ORDER_TILE + i];
        uint32_t index = p.sorted_indices[own * ORDER_TILE + i];
        if (index >= p.count) continue;  // the last tile's padding
        uint32_t place = i;
        for (uint32_t tile = 0; tile < p.tiles; ++tile) {
            if (tile != own) place += keys_before(p.sorted_labels + tile * ORDER_TILE, ORDER_TILE, key, tile < own);
        }
        p.keys[place] = key;
        p.order[place] = index;
        if (key == kIgnored) continue;
        atomic_add(p.valid, 1u);
        if (p.valid_too != nullptr) atomic_add(p.valid_too, 1u);
    }
}

template <class Element>
DEVICE void prepare_body(const PrepareParams &p) {
    auto input = static_cast<const Element *>(p.input);
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * sizeof(Element);
    auto rows = static_cast<unsigned char *>(p.rows) + static_cast<uint64_t>(block_x()) * TILE * stride_bytes;
    auto at = [&](uint32_t r, uint32_t d) {
        return reinterpret_cast<Element *>(rows + prepared_place(r, d * sizeof(Element), stride_bytes));
    };
    uint32_t first = block_x() * TILE;
    for (uint32_t r = warp_index(); r < TILE; r += THREADS / 32) {
        bool real = first + r < p.count;
        uint32_t index = !real ? 0 : p.order == nullptr ? first + r : p.order[first + r];
        double square_sum = 0.0;
        for (uint32_t d = lane_index(); d < p.stride; d += 32) {
            Element value = from_float<Element>(0.0f);
            if (real && d < p.dim) value = input[static_cast<uint64_t>(index) * p.dim + d];
            *at(r, d) = value;
            square_sum += static_cast<double>(to_float(value)) * static_cast<double>(to_float(value));
        }
        square_sum = warp_sum(square_sum);
        if (real && lane_index() == 0) {
            p.square_sums[index] = square_sum;
            // Written so that a NaN is bad too.
            bool unit = fabs(sqrt(square_sum) - 1.0) <= p.norm_tolerance;
            if (p.check && !unit) atomic_min(p.bad, index);
        }
    }
    block_sync();
    if (p.column_sums == nullptr) return;
    uint32_t valid = *p.valid;
    uint32_t end = valid < first ? 0 : valid - first < TILE ? valid - first : TILE;
    for (uint32_t d = thread_index(); d < p.stride; d += THREADS) {
        float sum = 0.0f;
        for (uint32_t r = 0; r < end; ++r) sum += to_float(*at(r, d));
        p.column_sums[static_cast<uint64_t>(block_x()) * p.stride + d] = sum;
    }
}
// TF32 is a way to multiply, not a type: its rows are f32.
KERNEL(prepare_f32, PrepareParams, 1) { prepare_body<float>(p); }
KERNEL(prepare_tf32, PrepareParams, 1) { prepare_body<float>(p); }
KERNEL(prepare_f16, PrepareParams, 1) { prepare_body<F16>(p); }
KERNEL(prepare_bf16, PrepareParams, 1) { prepare_body<Bf16>(p); }

// A thread an anchor, padding included.
KERNEL(classes, ClassesParams, 1) {
    uint32_t i = block_x() * THREADS + thread_index();
    if (i >= p.anchors) return;
    uint64_t key = p.anchor_keys[i];
    ClassRange range{1, 0};
    if (key != kIgnored) {
        range.begin = keys_before(p.reference_keys, p.references, key, false);
        range.end = keys_before(p.reference_keys, p.references, key, true);
    }
    p.classes[i] = range;
}
