/*
 * head_halves: a head in the registers of a few neighbouring lanes, to be normed and turned.
 *
 * Layout     a lane holds kPack elements of the first half of its head and the kPack elements of
 *            the second half that rotate with them, so nothing but the sum of squares crosses
 *            lanes
 * Types      fp32 in registers, rounded to the element type where memory would round
 * Source     Su et al., 2021, in the two-halves layout of Hugging Face checkpoints
 */
#pragma once

#include "device.cuh"

namespace ember {

/* As it lies in memory: in words, which take half the registers that elements would. */
template <typename Element, int kPack>
struct PackedHalves {
  using Word = typename Pack<Element, kPack>::Word;
  Word first, second;

  __device__ __forceinline__ void load(const Element* head, int half) {
    first = *reinterpret_cast<const Word*>(head);
    second = *reinterpret_cast<const Word*>(head + half);
  }
  __device__ __forceinline__ void store(Element* head, int half) const {
    *reinterpret_cast<Word*>(head) = first;
    *reinterpret_cast<Word*>(head + half) = second;
  }
};

/* Cosines and sines of a lane's elements: those of both halves are the same. */
template <int kPack>
struct Angles {
  static constexpr int kWide = kPack < 4 ? kPack : 4;
  Pack<float, kWide> cos[kPack / kWide], sin[kPack / kWide];

  __device__ __forceinline__ void load(const float* cosines, int half) {
#pragma unroll
    for (int i = 0; i < kPack / kWide; ++i) {
      cos[i].load(cosines + i * kWide);
      sin[i].load(cosines + half + i * kWide);
    }
  }
};

/* Two numbers as they are after they were stored as Elements: one conversion of a pair is a
 * fraction of the time of two. */
template <typename Element>
__device__ __forceinline__ void round_both(float& a, float& b) {
  if constexpr (sizeof(Element) == 2) {
    const u32 pair = pack_bf16(a, b);
    a = __uint_as_float(pair << 16);
    b = __uint_as_float(pair & 0xffff0000u);
  }
}

template <typename Element, int kPack, typename Word>
__device__ __forceinline__ void pack(const float (&values)[kPack], Word& word) {
  if constexpr (sizeof(Element) == 2 && kPack % 2 == 0) {
    u32* const pairs = reinterpret_cast<u32*>(&word);
#pragma unroll
    for (int i = 0; i < kPack; i += 2) pairs[i / 2] = pack_bf16(values[i], values[i + 1]);
  } else {
    Element* const elements = reinterpret_cast<Element*>(&word);
#pragma unroll
    for (int i = 0; i < kPack; ++i) elements[i] = from_float<Element>(values[i]);
  }
}

template <typename Element, int kPack>
struct HeadHalves {
  float first[kPack], second[kPack];

  __device__ __forceinline__ HeadHalves() = default;
  __device__ __forceinline__ explicit HeadHalves(const PackedHalves<Element, kPack>& packed) {
    const Element* a = reinterpret_cast<const Element*>(&packed.first);
    const Element* b = reinterpret_cast<const Element*>(&packed.second);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      first[i] = to_float(a[i]);
      second[i] = to_float(b[i]);
    }
  }

  __device__ __forceinline__ PackedHalves<Element, kPack> packed() const {
    PackedHalves<Element, kPack> result;
    pack<Element>(first, result.first);
    pack<Element>(second, result.second);
    return result;
  }

  __device__ __forceinline__ void add(const HeadHalves& other) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      first[i] += other.first[i];
      second[i] += other.second[i];
      round_both<Element>(first[i], second[i]);
    }
  }

  __device__ __forceinline__ float squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += first[i] * first[i] + second[i] * second[i];
    return sum;
  }

  __device__ __forceinline__ void norm(const HeadHalves& weight, float inverse_rms) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      first[i] *= inverse_rms;
      second[i] *= inverse_rms;
      round_both<Element>(first[i], second[i]);
      first[i] *= weight.first[i];
      second[i] *= weight.second[i];
      round_both<Element>(first[i], second[i]);
    }
  }

  __device__ __forceinline__ void turn(const Angles<kPack>& angles) {
    constexpr int kWide = Angles<kPack>::kWide;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float cos = angles.cos[i / kWide].values[i % kWide];
      const float sin = angles.sin[i / kWide].values[i % kWide];
      const float a = first[i], b = second[i];
      first[i] = a * cos - b * sin;
      second[i] = b * cos + a * sin;
    }
  }
};

}  // namespace ember
