// What product.h defined for one stored type, so that it can be included for another.
#undef BF16
#undef NAME
#undef TO_FLOAT
#undef FROM_FLOAT
#undef LOAD_STORED
#undef PAIR
#undef TO_PACKED
#undef LOAD_WEIGHT
#undef LOAD_PACKED
#undef MULTIPLY_ADD
#undef STEP
