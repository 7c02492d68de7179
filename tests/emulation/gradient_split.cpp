// gradient_split.cpp: gradient.cpp for exact f32, with rows and weights in two parts.
#define PARTS 2
#include "gradient.cpp"
