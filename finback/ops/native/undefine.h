// What product.h defined for one stored type, so that it can be included for another.
#undef BF16
#undef NAME
#undef LOAD
#undef LOAD_PART
#undef STORE
#undef STORE_PART
#undef TO_FLOAT
#undef PAIR
#undef IN_PLACE
#undef LOAD_WEIGHT
#undef LOAD_PACKED
#undef STORE_PACKED
#undef STORE_PACKED_PART
#undef MULTIPLY_ADD
#undef STEP
#undef PERFORM
#undef TAKE
