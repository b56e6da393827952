/* float16 and bfloat16 are stored as such and computed in float32. Written with integers only, so that the
 * compiler vectorises the loops around them at every instruction-set level.
 */
MHA_INLINE float mha_bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

MHA_INLINE uint32_t mha_float_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

MHA_INLINE float mha_from_bfloat16(uint16_t stored) { return mha_bits_to_float((uint32_t)stored << 16); }

MHA_INLINE uint16_t mha_to_bfloat16(float value)
{
    const uint32_t bits = mha_float_to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

MHA_INLINE float mha_from_float16(uint16_t stored)
{
    /* A multiplication by 2**112 moves the exponent and makes subnormals normal; infinities and NaN keep theirs. */
    const uint32_t magnitude = (uint32_t)(stored & 0x7fff) << 13;
    const uint32_t finite = mha_float_to_bits(mha_bits_to_float(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000;
    return mha_bits_to_float((magnitude >= 0x0f800000 ? special : finite) | (uint32_t)(stored & 0x8000) << 16);
}

MHA_INLINE uint16_t mha_to_float16(float value)
{
    const uint32_t bits = mha_float_to_bits(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t sign = (bits >> 16) & 0x8000;
    /* Adding 0.5 to a value below 2**-14 rounds it, to nearest even, into the last ten bits of the sum. */
    const uint32_t subnormal = mha_float_to_bits(mha_bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(half | sign);
}
