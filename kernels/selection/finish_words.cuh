// finish_words.cuh: candidates' words into elements of M, once the mined sets of all rows are known (SPEC 4); 16-bit rows.
//
// The gradient reads every word for both of its row tiles and for every 256 columns. All that depends on the pair alone is
// computed here once, so that the gradient has only a store to shared memory left.
#ifndef DDTAS_FINISH_WORDS_CUH
#define DDTAS_FINISH_WORDS_CUH

#include "gradient/weight_tile.cuh"

// 2 / (B |set|), the factor of an anchor in the weight of a pair that it keeps, without the sign (SPEC 4).
DEVICE double set_share(const Pairs &pairs, uint32_t count) {
    return 2.0 / (static_cast<double>(pairs.total) * static_cast<double>(count));
}

// The factors of a row in the weights of the pairs that it keeps.
struct Scales {
    float of_kind[2];  // for negatives, for positives
};
DEVICE Scales scales_of(const Pairs &pairs, uint32_t count_pos, uint32_t count_neg) {
    if (count_pos == 0 || count_neg == 0) return Scales{{0.0f, 0.0f}};
    return Scales{{static_cast<float>(set_share(pairs, count_neg)), -static_cast<float>(set_share(pairs, count_pos))}};
}

// The factors of entry `entry` of the tile: its rows, then its columns.
DEVICE Scales entry_scales(const Pairs &pairs, TileIndex tile, uint32_t entry) {
    bool row = entry < TILE;
    uint32_t i = entry_index(tile, entry);
    if ((row || pairs.square) && i < pairs.anchors.count) return scales_of(pairs, pairs.positives.count[i], pairs.negatives.count[i]);
    if (!row && pairs.columns != nullptr && i < pairs.references.count) {
        return scales_of(pairs, pairs.columns[i].count_pos, pairs.columns[i].count_neg);
    }
    return Scales{{0.0f, 0.0f}};
}

constexpr uint32_t kWeighWordsBytes = 2 * TILE * sizeof(Scales);

// The word as the gradient reads it (candidate_word.cuh); `scales` are those of the tile's entries.
template <class Precision>
DEVICE uint32_t finished_word(uint32_t word, const Scales *scales, float weight_scale) {
    uint32_t row = word_index(word) / TILE, column = word_index(word) % TILE, kind = word >> kPositive & 1;
    float share = word >> kKeptByRow & 1 ? scales[row].of_kind[kind] : 0.0f;
    share += word >> kKeptByColumn & 1 ? scales[TILE + column].of_kind[kind] : 0.0f;
    float weight = share * (word_sigmoid(word) / kSigmoidScale) * weight_scale;
    return matrix_offset<Precision>(row, column) << 16 | from_float<typename Precision::Element>(weight).bits;
}

// Finishes the words of a tile, by the whole block; `scales` is kWeighWordsBytes of shared memory.
template <class Precision>
DEVICE void weigh_words(const Pairs &pairs, uint64_t index, float weight_scale, Scales *scales) {
    using Words = Granule<uint32_t>;
    static_assert(THREADS == 2 * TILE, "a thread for every row and column");
    constexpr uint32_t kAhead = 4;
    uint32_t count = pairs.tile_counts[index], segment = pairs.tile_segments[index];
    if (count == 0 || segment == NO_ROW) return;
    auto *granules = reinterpret_cast<Words *>(pairs.pool_words + segment_at(segment));
    auto there = [&](uint32_t granule) { return granule * Words::count < count; };
    // Loaded while the scales are computed.
    Words ahead[kAhead];
#pragma unroll
    for (uint32_t a = 0; a < kAhead; ++a) {
        uint32_t granule = thread_index() + a * THREADS;
        if (there(granule)) ahead[a] = granules[granule];
    }
    scales[thread_index()] = entry_scales(pairs, tile_of(pairs, index), thread_index());
    block_sync();
    for (uint32_t first = thread_index(); there(first); first += kAhead * THREADS) {
#pragma unroll
        for (uint32_t a = 0; a < kAhead; ++a) {
            uint32_t granule = first + a * THREADS, next = granule + kAhead * THREADS;
            if (!there(granule)) break;
            Words words = ahead[a];
            if (there(next)) ahead[a] = granules[next];
#pragma unroll
            for (uint32_t i = 0; i < Words::count; ++i) {
                uint32_t finished = finished_word<Precision>(words.values[i], scales, weight_scale);
                // The rest of the last granule belongs to this tile, too; the gradient reads it as no candidate.
                words.values[i] = granule * Words::count + i < count ? finished : 0;
            }
            granules[granule] = words;
        }
    }
}

#endif
