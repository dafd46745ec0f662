// What Winograd's forward pass and its weight gradient share: tiles of 4 x 4 results, and where their 36 numbers lie.
#pragma once
#include "conv.cuh"

namespace tilewise {

constexpr int WINOGRAD_THREADS = 128, POINTS = 36, TILE = 4;

// Those of a launch: `count` from `first` on, counted through all images, down x across an image. padded, channels, outputs:
// tiles, and channels and outputs of a group, as the matrices have them.
struct Tiles {
    long long first, count, padded, down, across, channels, outputs;
    int channels_last;
};

// A tile of the images and a channel of their matrices; neighbours differ in what lies side by side.
struct TileOfChannel {
    long long tile, group, channel;   // of the group

    __device__ __forceinline__ TileOfChannel(long long number, const Tiles &tiles, long long groups, long long channels) {
        const long long all = groups * channels;
        long long c = tiles.channels_last ? take_axis(number, all) : 0;
        tile = tiles.channels_last ? number : take_axis(number, tiles.padded);
        if (!tiles.channels_last) c = number;
        group = divide(c, channels);
        channel = c - group * channels;
    }
    // Its place in the first of the group's matrices; the next ones are padded * channels further.
    __device__ __forceinline__ long long place(const Tiles &tiles, long long channels) const {
        const long long inside = tiles.channels_last ? tile * channels + channel : channel * tiles.padded + tile;
        return group * POINTS * tiles.padded * channels + inside;
    }
};

// Of one tap, from a filter's place on.
__device__ __forceinline__ long long place_of_tap(const Axis &rows, const Axis &columns, const Filters &filters, int t,
                                                  int u) {
    return (rows.first_tap + t * rows.tap_step) * filters.width + columns.first_tap + u * columns.tap_step;
}

}   // namespace tilewise
